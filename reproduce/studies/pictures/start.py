"""The training loss in the first updates, by plain SGD, gradual warm-up and RMSprop warm-up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from reproduce.job.plots import plt
from reproduce.studies.pictures.style import BLACK, BLUE, GREY, VERMILION, WIDTH, label, styled

RUNS = Path(__file__).parents[2] / 'results' / 'miniature'
DATA = None
CAPTION = (
    'With a batch of 1,024, SGD at the full learning rate is at first worse than guessing, and so '
    'is gradual warm-up; by RMSprop warm-up the loss falls at once.'
)
ALT = (
    'Training loss in the first 27 of 538 updates, mean and range of five seeds; three lines from '
    '2.3, the loss of guessing. By SGD at the full learning rate it rises to 7.5, and returns to '
    '2.3; by gradual warm-up it rises to 3.8, and ends at 2.2; by RMSprop warm-up it falls to '
    '1.9.'
)

LINES = {  # variants of reproduce/studies/miniature
    'b': ('SGD, full learning rate', VERMILION, 's:'),
    'c': ('gradual warm-up', BLUE, '^--'),
    'd': ('RMSprop warm-up', BLACK, 'o-'),
}
PLACES = {'b': (6.5, 6.0), 'c': (15.5, 3.6), 'd': (16, 1.82)}
N_CLASSES = 10


def losses_of(variant) -> np.ndarray:
    """Returns the training loss of each of the first updates, a row per seed.

    Raises:
        OSError: There is no run.
    """
    runs = sorted(RUNS.glob(f'{variant}-seed*/run.json'))
    runs = runs or [RUNS / f'{variant}-seed0' / 'run.json']  # to be named in the error
    return np.array([json.loads(run.read_text())['first losses'] for run in runs])


@styled
def draw():
    """Draws the picture.

    Returns:
        ~matplotlib.figure.Figure: The picture.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 4.6))
    for variant, (title, color, line) in LINES.items():
        losses = losses_of(variant)
        updates = np.arange(1, losses.shape[1] + 1)
        axis.semilogy(updates, np.mean(losses, axis=0), line, color=color, label=variant)
        least, most = np.min(losses, axis=0), np.max(losses, axis=0)
        axis.fill_between(updates, least, most, color=color, alpha=0.2, lw=0)
        label(axis, *PLACES[variant], title, color)
    guess = math.log(N_CLASSES)
    axis.axhline(guess, color=GREY, lw=1)
    label(axis, updates[-1], guess, 'guessing', GREY, 'right', 'bottom', (0, 2))
    axis.set_title('Training loss in the first 5 % of the updates: CIFAR-10, batch 1,024')
    axis.set_xlabel('update of 538')
    axis.set_ylim(1.6, 10)
    axis.set_yticks([2, 3, 4, 6, 8], ['2', '3', '4', '6', '8'])
    axis.minorticks_off()
    return figure
