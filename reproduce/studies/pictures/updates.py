"""Why a large batch is hard: fewer updates in as many epochs, and more epochs to the same top-1."""

from __future__ import annotations

import numpy as np

from reproduce.job.plots import plt
from reproduce.settings import Settings
from reproduce.studies.figures import MLPERF
from reproduce.studies.pictures.style import BLACK, BLUE, VERMILION, WIDTH, label, styled

DATA = None
CAPTION = (
    'In 90 epochs, a batch of 32,768 makes 3,519 updates; large batches also need more epochs.'
)
ALT = (
    'Two panels over the batch, from 256 to 65,536 images. Left: updates in 90 epochs of ImageNet '
    'fall as a straight line, from 450,411 (He et al., 256 images) over 14,076 (Goyal et al., '
    '8,192) to 3,519 (Akiba et al., 32,768). Right: epochs that ResNet-50 needs to reach 75.9 % '
    'top-1 rise from 35 at 1,632 images to 56 at 32,768 and 86 at 67,840.'
)

TEAMS = (('He et al.', 256), ('Goyal et al.', 8192), ('Akiba et al.', 32768))


def updates(batch) -> int:
    """Returns the number of updates in the paper's 90 epochs of ImageNet."""
    paper = Settings(workers=batch, local_batch_size=1)
    return paper.iterations(paper.n_train_images)


@styled
def draw():
    """Draws the picture.

    Returns:
        ~matplotlib.figure.Figure: The picture.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.6), sharex=True)
    batches = np.array([256, 65536])
    left.loglog(batches, [updates(batch) for batch in batches.tolist()], color=BLACK, lw=1.5)
    for team, batch in TEAMS:
        ours = team.startswith('Akiba')
        color, marker, size = (VERMILION, '*', 17) if ours else (BLUE, 'o', 9)
        left.plot(batch, updates(batch), marker, color=color, ms=size, zorder=3)
        name = f'{team}, {batch:,}:\n{updates(batch):,} updates'
        place = ('right', 'top', (-12, -2)) if ours else ('left', 'bottom', (8, 2))
        label(left, batch, updates(batch), name, color, *place)
    left.set_title('Updates in 90 epochs of ImageNet')
    left.set_ylim(450, 2e6)
    left.set_yticks([1e3, 1e4, 1e5, 1e6], ['1,000', '10,000', '100,000', '1,000,000'])

    x, epochs = zip(*MLPERF.items())
    right.plot(x, epochs, 'o-', color=BLUE, lw=1.5)
    for batch, y in MLPERF.items():
        if batch in (1632, 32768, 67840):
            label(right, batch, y, f'{y:.0f}', BLUE, 'right', 'bottom', (-5, 5))
    right.set_title('Epochs to 75.9 % top-1')
    label(
        right,
        256,
        97,
        'ResNet-50 with LARS, means over\nseeds (MLPerf Training 4.0)',
        BLUE,
        va='top',
    )
    right.set_ylim(0, 100)
    for axis in (left, right):
        axis.set_xlabel('total batch, images per update')
        axis.set_xticks([256, 2048, 8192, 32768], ['256', '2,048', '8,192', '32,768'])
        axis.minorticks_off()
    return figure
