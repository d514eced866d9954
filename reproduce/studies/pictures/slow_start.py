"""The training loss at half and at the full learning rate, with and without a warm-up."""

from __future__ import annotations

from reproduce.job.plots import plt
from reproduce.studies.pictures import hand_over, transition
from reproduce.studies.pictures.style import BLACK, VERMILION, WIDTH, label, styled

DATA = hand_over.DATA
CAPTION = (
    'After an abrupt switch SGD recovers at half the learning rate, and not at the full one; '
    "after the paper's smooth transition both do well here."
)
ALT = (
    'Three panels over 20 of 90 epochs, each with a line for the full learning rate and one for '
    'half of it. SGD from the first update: the loss jumps to 8.1 at the full rate, and to 4.1 at '
    'half; at epoch 20 it is 2.0 and 1.7. Abrupt switch from RMSprop at epoch 10: it jumps to 6.5 '
    'and 3.3, and is 2.0 and 1.6 at epoch 20. The paper: both stay below 2.1 after epoch 3, and '
    'reach 1.5.'
)

measure = hand_over.measure
NEEDS_IMAGES = True

WAYS = {'SGD': 'SGD from the first update', 'abrupt': 'abrupt, at epoch 10', 'printed': 'the paper'}
HALF, FULL = (BLACK, '-'), (VERMILION, ':')


@styled
def draw(content: dict):
    """Draws the picture.

    Args:
        content (dict): Of :func:`measure`.

    Returns:
        ~matplotlib.figure.Figure: The picture.
    """
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 4.2), sharey=True)
    for axis, (name, title) in zip(axes, WAYS.items()):
        transition.losses(axis, content, {f'{name}, full rate': ('', *FULL), name: ('', *HALF)})
        axis.set_title(title)
    axes[0].set_ylabel('training loss')
    label(axes[0], 8, 2.9, 'full rate', FULL[0])
    label(axes[0], 8, 1.6, 'half', HALF[0])
    return figure
