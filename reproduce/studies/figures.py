"""Draws the schedules, published results, or the curves of several runs.

./run_mpi.sh figures schedules       draws both forms of alpha_SGD, and the learning rates
./run_mpi.sh figures comparison      draws published results: training time against top-1
./run_mpi.sh figures runs RUN ...    draws loss and top-1 of runs of train.py, by epoch

A training draws its own curves, and a study draws its own plot.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from extensions import schedules
from reproduce.baselines import LR_SCHEDULES
from reproduce.job.command_line import Parser, reason
from reproduce.job.plots import plt, save

_STYLES = ('k-', 'k--', 'k:', 'k-.')
_MARKERS = 'os^Dvx+*'

# Team, total batch, hardware, hours, top-1 in per cent, and the letter of the source.
PUBLISHED = (
    ('He et al.', 256, 'P100 x 8', 29, 75.3, 'A'),
    ('Goyal et al.', 8192, 'P100 x 256', 1, 76.3, 'A'),
    ('Codreanu et al.', 11520, 'KNL 7250 x 720', 62 / 60, 75.0, 'T'),
    ('You et al.', 16000, 'Xeon 8160 x 1,600', 31 / 60, 75.3, 'T'),
    ('Akiba et al.', 32768, 'P100 x 1,024', 15 / 60, 74.9, 'A'),
)


def runs(logs: dict, out: str):
    """Draws OUT/runs.png: training loss and validation top-1 of several runs by epoch.

    Args:
        logs (dict): Title to a list of Chainer's logs. The list is drawn as its mean, with a band
            from the lowest to the highest value.
        out (str): The folder. The file is replaced as a whole.
    """
    quantities = (('main/loss', 1, 'training loss'), ('validation/main/accuracy', 100, 'top-1 (%)'))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    for axis, (key, scale, title) in zip(axes, quantities):
        for number, (name, several) in enumerate(logs.items()):
            n_epochs = min(map(len, several))
            epochs = [entry['epoch'] for entry in several[0][:n_epochs]]
            values = np.array([[scale * entry[key] for entry in log[:n_epochs]] for log in several])
            axis.plot(
                epochs,
                values.mean(axis=0),
                _STYLES[number % len(_STYLES)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
                lw=1,
                label=name,
            )
            axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), color='k', alpha=0.06)
        axis.set_title(title)
        axis.set_xlabel('epoch')
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(fontsize='small')
    save(figure, os.path.join(out, 'runs.png'))


def first_losses(losses: dict, out: str):
    """Draws OUT/start.png: the training loss at the start of several runs.

    Runs of other batches have other numbers of updates: the axis is the share of all images.

    Args:
        losses (dict): Title to a list of runs, each a list of losses, one per update of the first
            5 %. The mean is drawn.
        out (str): The folder. The file is replaced as a whole.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.6), constrained_layout=True)
    for number, (name, several) in enumerate(losses.items()):
        mean = np.mean(several, axis=0)
        # A small batch's losses vary: draw means over groups of updates.
        groups = np.array_split(np.arange(len(mean)), min(27, len(mean)))
        mean = np.array([mean[group].mean() for group in groups])
        share = [5 * (group.mean() + 0.5) / (groups[-1][-1] + 1) for group in groups]
        style = _STYLES[number % len(_STYLES)] + _MARKERS[number % len(_MARKERS)]
        axis.plot(share, mean, style, markersize=4, lw=1, label=name)
    axis.set_xlabel('share of the training (%)')
    axis.set_title('training loss')
    axis.grid(alpha=0.3)
    axis.legend(fontsize='small')
    save(figure, os.path.join(out, 'start.png'))


def paper_schedules(out: str):
    """Draws OUT/schedules.png: both forms of alpha_SGD, alpha_RMSprop, and the learning rates.

    All curves are for the paper's 90 epochs and total batch of 32,768.

    Args:
        out (str): The folder. The file is replaced as a whole.
    """
    batch = 32768
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), constrained_layout=True)
    early = np.linspace(0, 15, 3001)
    for form, style in (('printed', 'k-'), ('continuous', 'k--')):
        alpha = schedules.alpha_sgd(early, form=form)
        axes[0].plot(early, alpha, style, lw=1.2, label=form)
        lr = schedules.learning_rate(early, batch)
        axes[1].plot(early, 1e5 * schedules.alpha_rmsprop(alpha, lr), style, lw=1.2, label=form)
    epochs = np.linspace(0, 90, 9001)
    titles = {
        'slow_start': 'slow start (Akiba et al.)',
        'gradual_warmup': 'gradual warm-up (Goyal et al.)',
        'steps': 'the same without warm-up',
    }
    for (name, title), style in zip(titles.items(), ('k-', 'k--', 'k:')):
        axes[2].plot(epochs, LR_SCHEDULES[name](epochs, batch), style, label=title)
    axes[2].set_yscale('log')
    for axis, title in zip(
        axes,
        ('alpha_SGD', 'alpha_RMSprop (1e-5)', f'learning rate eta, total batch {batch:,}'),
    ):
        axis.set_title(title)
        axis.set_xlabel('epoch of 90')
        axis.grid(alpha=0.3)
        axis.legend(fontsize='small')
    save(figure, os.path.join(out, 'schedules.png'))


def comparison(out: str):
    """Draws OUT/comparison.png: published training times against published top-1.

    Args:
        out (str): The folder. The file is replaced as a whole.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.8), constrained_layout=True)
    for team, batch, hardware, hours, top1, _ in PUBLISHED:
        ours = team.startswith('Akiba')
        axis.plot(60 * hours, top1, 'k*' if ours else 'ko', markersize=14 if ours else 7)
        axis.annotate(
            f'{team}\n{batch:,}, {hardware}',
            (60 * hours, top1),
            xytext=(9, 0) if hours < 10 else (-9, 0),
            ha='left' if hours < 10 else 'right',
            va='bottom' if team.startswith('You') else 'top' if hours < 0.8 else 'center',
            textcoords='offset points',
            fontsize='small',
        )
    axis.set_xscale('log')
    axis.set_xlim(10, 3000)
    ticks = (15, 30, 60, 120, 300, 600, 1740)
    axis.set_xticks(ticks, ['15', '30', '60', '120', '300', '600', '29 h'])
    axis.minorticks_off()
    axis.set_ylim(74.5, 76.7)
    axis.set_xlabel('training time (minutes)')
    axis.set_ylabel('top-1 on ImageNet (%), ResNet-50')
    axis.set_title('published; total batch and hardware below each name')
    axis.grid(alpha=0.3)
    save(figure, os.path.join(out, 'comparison.png'))


def read_log(run: Path) -> list:
    """Reads Chainer's log of a run.

    Args:
        run (Path): The folder of the run.

    Returns:
        list: An entry per epoch.

    Raises:
        OSError: The log cannot be read.
        ValueError: The log has another content.
    """
    log = json.loads((run / 'log').read_text())
    try:
        complete = bool(log) and all(
            key in entry
            for entry in log
            for key in ('epoch', 'main/loss', 'validation/main/accuracy')
        )
    except TypeError:
        complete = False
    if not complete:
        raise ValueError('its log has no epoch, or an epoch without loss or validation')
    return log


def main():
    parser = Parser(prog='./run_mpi.sh figures', description=__doc__)
    parser.add_argument(
        'name',
        choices=('schedules', 'comparison', 'runs'),
        metavar='NAME',
        help='plot to draw: schedules, comparison or runs',
    )
    parser.add_argument(
        'runs',
        nargs='*',
        default=[],
        type=Path,
        metavar='RUN',
        help='for runs: the --out folder of a run',
    )
    parser.add_argument(
        '--out',
        default='results/figures',
        metavar='FOLDER',
        help='write NAME.png to FOLDER [%(default)s]',
    )
    options = parser.parse_args()
    if options.name == 'runs' and not options.runs:
        parser.refuse(
            "figures runs needs at least one run's folder: ./run_mpi.sh figures runs RUN ..."
        )
    if options.name != 'runs' and options.runs:
        parser.refuse(f'{options.name} takes no folder, but got {options.runs[0]}: leave it out')
    logs = {}
    for run in options.runs:
        try:
            logs[str(run)] = [read_log(run)]
        except (OSError, ValueError) as error:
            parser.refuse(f'{run} is not the --out of a run of train.py: {reason(error)}')
    try:
        os.makedirs(options.out, exist_ok=True)
        if options.name == 'runs':
            runs(logs, options.out)
        else:
            {'schedules': paper_schedules, 'comparison': comparison}[options.name](options.out)
    except OSError as error:
        parser.refuse(f'--out {reason(error)}')
    print(Path(options.out) / f'{options.name}.png')


if __name__ == '__main__':
    main()
