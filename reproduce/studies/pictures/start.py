"""The training loss in the first updates, by plain SGD, gradual warm-up and RMSprop warm-up."""

from __future__ import annotations

import math

from reproduce.job.plots import plt
from reproduce.studies.pictures import first_updates
from reproduce.studies.pictures.style import BLACK, BLUE, GREY, VERMILION, WIDTH, label, styled

DATA = first_updates.DATA
CAPTION = (
    'With a batch of 1,024 digits, SGD at the full learning rate is at first worse than '
    'guessing; by RMSprop warm-up the loss falls fastest.'
)
ALT = (
    'Training loss over the first 14 of 90 epochs, three lines from 2.3, the loss of guessing. By '
    'SGD at the full learning rate the loss rises to 2.8 in the first 5 % of the epochs, and only '
    'then falls; by gradual warm-up it stays near 2.2 there; by RMSprop warm-up it falls from the '
    'first update on, to 1.5. All three end below 0.3.'
)

measure = first_updates.measure

LINES = {
    'SGD': ('SGD, full learning rate', VERMILION, 's:'),
    'gradual warm-up': ('gradual warm-up', BLUE, '^--'),
    'RMSprop warm-up': ('RMSprop warm-up', BLACK, 'o-'),
}
PLACES = {'SGD': (3.9, 2.85), 'gradual warm-up': (5.8, 1.95), 'RMSprop warm-up': (2.2, 0.7)}
N_CLASSES = 10


@styled
def draw(content: dict):
    """Draws the picture.

    Args:
        content (dict): Of :func:`measure`.

    Returns:
        ~matplotlib.figure.Figure: The picture.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 4.6))
    for variant, (title, color, line) in LINES.items():
        found = content[variant]
        axis.plot(found['epoch'], found['loss'], line, color=color, label=variant)
        label(axis, *PLACES[variant], title, color)
    guess = math.log(N_CLASSES)
    axis.axhline(guess, color=GREY, lw=1)
    label(axis, 14, guess, 'guessing', GREY, 'right', 'bottom', (0, 2))
    axis.axvspan(0, 4.5, color='0.94', zorder=0)
    label(axis, 0.1, 0.06, 'the first 5 %', GREY, va='bottom')
    axis.set_title('Training loss: digits, 32 workers, batch 1,024')
    axis.set_xlabel('epoch of 90')
    axis.set_xlim(0, 14)
    axis.set_ylim(0, 3)
    return figure
