"""Plots of the paper's schedules, of published results, and of runs side by side.

./run_mpi.sh figures schedules         alpha_SGD, both forms, and the learning rates
./run_mpi.sh figures comparison        published results: training time against top-1
./run_mpi.sh figures runs RUN ...      loss and top-1 of runs of train.py, by epoch

A training and each study draw their own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from extensions import schedules
from reproduce.baselines import LR_SCHEDULES
from reproduce.job.command_line import Parser
from reproduce.job.plots import plt, save

_STYLES = ('k-', 'k--', 'k:', 'k-.')
_MARKERS = 'os^Dvx+*'

# Team, batch, hardware, hours, top-1 in per cent, and the letter of the source.
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
        logs (dict): Title to a list of Chainer's ``log``s, which are drawn as their mean, with a
            band from the lowest to the highest.
        out (str): Folder; the file is replaced as a whole.
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


def paper_schedules(out: str):
    """Draws OUT/schedules.png: alpha_SGD in both forms, alpha_RMSprop, and the learning rates over
    the paper's 90 epochs with its total batch of 32,768."""
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
    """Draws OUT/comparison.png: what others published, training time against top-1."""
    figure, axis = plt.subplots(figsize=(7.5, 4.8), constrained_layout=True)
    for team, batch, hardware, hours, top1, source in PUBLISHED:
        ours = team.startswith('Akiba')
        axis.plot(
            60 * hours,
            top1,
            'k*' if ours else 'ko',
            markersize=14 if ours else 7,
            fillstyle='none' if source == 'U' else 'full',
        )
        axis.annotate(
            f'{team}{" (unsourced)" if source == "U" else ""}\n{batch:,}, {hardware}',
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


def main():
    parser = Parser(prog='./run_mpi.sh figures', description=__doc__)
    parser.add_argument('what', choices=('schedules', 'comparison', 'runs'), metavar='NAME')
    parser.add_argument('runs', nargs='*', type=Path, metavar='RUN', help='results of train.py')
    parser.add_argument('--out', default='results/figures', metavar='FOLDER')
    options = parser.parse_args()
    if bool(options.runs) != (options.what == 'runs'):
        parser.error('"runs" needs folders, and only "runs" takes any')
    logs = {}
    for run in options.runs:
        try:
            logs[str(run)] = [json.loads((run / 'log').read_text())]
        except (OSError, ValueError) as error:
            parser.error(f'{run} is no folder of a run of train.py: {error}')
        if 'validation/main/accuracy' not in logs[str(run)][0][-1]:
            parser.error(f'{run / "log"} has no validation')
    os.makedirs(options.out, exist_ok=True)
    if options.what == 'runs':
        runs(logs, options.out)
    else:
        {'schedules': paper_schedules, 'comparison': comparison}[options.what](options.out)
    print(Path(options.out) / f'{options.what}.png')


if __name__ == '__main__':
    main()
