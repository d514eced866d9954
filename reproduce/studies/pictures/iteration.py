"""Where an iteration spends its time: measured on two CPU cores, and predicted for MN-1."""

from __future__ import annotations

from reproduce.job.plots import plt
from reproduce.studies.cluster.description import read
from reproduce.studies.cluster.model import Job, predict
from reproduce.studies.pictures.style import BLACK, BLUE, GREEN, ORANGE, SKY, WIDTH, label, styled

# Made by ./run_mpi.sh benchmark iteration --workers 1,2,4 --peer chainermn --repeat 7.
DATA = 'iteration/slim-compiled.json'
CAPTION = (
    'On MN-1, only the all-reduce grows with the GPUs: from 6 ms on 8 to 20 ms on 1,024, as '
    'predicted; on two cores, four workers share.'
)
ALT = (
    'Two panels of horizontal bars, each an iteration in parts. Left, measured with a slim '
    'ResNet-50 on two CPU cores: 80 ms with 1 worker, 78 with 2, 157 with 4 that share the cores. '
    'Right, predicted for ResNet-50 on MN-1: 176 ms on 1 GPU, 183 on 8, 186 on 128, 197 on 1,024. '
    'Forward and backward take most of each bar; only the all-reduce grows with the GPUs.'
)

# Key, title, colour, and hatching of a part.
PARTS = (
    ('compute', 'forward + backward', SKY, ''),
    ('pack', 'pack', ORANGE, '//'),
    ('allreduce', 'all-reduce', BLUE, ''),
    ('update', 'update', GREEN, 'xx'),
    ('rest', 'data, extensions', '0.8', '..'),
)
GPUS = (1, 8, 128, 1024)


def measured(content: dict) -> list:
    """Returns the rows of an ``iteration.json``: number of workers, and part to milliseconds."""
    rows = []
    for run in content['figures']['runs']:
        parts = {key: 1000 * run[key] for key, *_ in PARTS if key != 'rest'}
        parts['rest'] = 1000 * run['iteration'] - sum(parts.values())
        rows.append((run['workers'], parts))
    return rows


def predicted() -> list:
    """Returns rows as of :func:`measured` for GPUs of MN-1."""
    rows = []
    for n in GPUS:
        found = predict(read('mn1'), Job(), n)
        rows.append((n, {key: 1000 * found.get(key, 0) for key, *_ in PARTS}))
    return rows


@styled
def draw(content: dict):
    """Draws the picture.

    Args:
        content (dict): Of reproduce/results/iteration/slim-compiled.json.

    Returns:
        ~matplotlib.figure.Figure: The picture.
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.4))
    for axis, rows in zip(axes, (measured(content), predicted())):
        for y, (_, parts) in enumerate(rows):
            _bar(axis, y, parts)
        axis.set_yticks(range(len(rows)), [f'{n:,}' for n, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(0, 1.12 * max(sum(parts.values()) for _, parts in rows))
        axis.tick_params(axis='y', length=0)
        axis.grid(visible=False, axis='y')
        axis.set_xlabel('milliseconds per iteration')
    axes[0].set_ylabel('workers')
    axes[1].set_ylabel('GPUs')
    axes[0].set_title('Measured: slim ResNet-50, 2 cores')
    axes[1].set_title('Predicted: ResNet-50, MN-1')
    label(axes[0], 100, 1.3, '4 workers\nshare 2 cores', va='bottom')
    handles = [
        plt.Rectangle((0, 0), 1, 1, fc=color, ec=BLACK, hatch=hatch, label=title)
        for _, title, color, hatch in PARTS
    ]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(PARTS), frameon=False)
    return figure


def _bar(axis, y, parts):
    left = 0.0
    for key, _, color, hatch in PARTS:
        axis.barh(y, parts[key], 0.62, left, color=color, hatch=hatch, ec=BLACK, lw=0.6)
        left += parts[key]
    axis.text(left, y, f' {left:.0f}', va='center')
