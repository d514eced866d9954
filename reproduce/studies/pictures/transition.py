"""The training loss while SGD takes over from RMSprop, smoothly and abruptly."""

from __future__ import annotations

import math

from reproduce.job.plots import plt
from reproduce.studies.pictures import hand_over
from reproduce.studies.pictures.style import BLACK, BLUE, GREY, VERMILION, WIDTH, label, styled

DATA = hand_over.DATA
CAPTION = (
    'An abrupt switch from RMSprop to SGD throws the loss above guessing, and ten epochs later it '
    'has not caught up; the printed and the continuous transition differ little.'
)
ALT = (
    'Training loss over 20 of 90 epochs, three lines that fall together from 2.3 to 1.7 by epoch '
    '10. With an abrupt switch the loss then jumps to 3.3, above the 2.3 of guessing, and is 1.6 '
    'at epoch 20. With the printed transition it peaks at 2.0, with the continuous one at 1.8; '
    'both reach 1.5.'
)

measure = hand_over.measure
NEEDS_IMAGES = True

LINES = {
    'abrupt': ('abrupt, at epoch 10', VERMILION, ':'),
    'printed': ('as printed', BLACK, '-'),
    'continuous': ('without the jump', BLUE, '--'),
}
PLACES = {'abrupt': (11.6, 2.7), 'printed': (10.9, 1.93), 'continuous': (8.6, 1.5)}
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
    losses(axis, content, LINES)
    for name, (x, y) in PLACES.items():
        title, color, _ = LINES[name]
        label(axis, x, y, title, color)
    axis.set_title('Training loss: CIFAR-10, 32 workers, batch 1,024')
    axis.set_ylim(1.3, 3.4)
    return figure


def losses(axis, content, lines):
    """Draws a line for each training, and the loss of guessing."""
    for name, (_, color, style) in lines.items():
        axis.plot(content[name]['epoch'], content[name]['loss'], style, color=color, label=name)
    guess = math.log(N_CLASSES)
    axis.axhline(guess, color=GREY, lw=1)
    label(axis, 20, guess, 'guessing', GREY, 'right', 'bottom', (0, 2))
    axis.set_xlabel('epoch of 90')
    axis.set_xlim(0, 20)
    axis.set_xticks(range(0, 21, 5))
