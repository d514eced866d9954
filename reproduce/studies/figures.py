"""Draws what the method does, the schedules, published results, or the curves of several runs.

./run_mpi.sh figures schedules       draws both forms of alpha_SGD, and the learning rates
./run_mpi.sh figures comparison      draws published results: training time, and top-1
./run_mpi.sh figures runs RUN ...    draws loss and top-1 of runs of train.py, by epoch

./run_mpi.sh figures updates         why a large batch is hard: updates and epochs by batch
./run_mpi.sh figures start           the loss in the first updates, with and without a warm-up
./run_mpi.sh figures step            the step of each layer in the first updates
./run_mpi.sh figures transition      the loss when SGD takes over, smoothly and abruptly
./run_mpi.sh figures slow_start      the loss at half and at the full learning rate
./run_mpi.sh figures statistics      BN statistics: moving averages and the last minibatch's
./run_mpi.sh figures rounding        what float16 costs a sum of gradients
./run_mpi.sh figures mn1             MN-1 as a drawing, with the ring of the all-reduce
./run_mpi.sh figures iteration       where an iteration spends its time

reproduce/results/figures has the data of step, transition, slow_start, statistics and rounding;
--measure makes them anew. A training draws its own curves, and a study draws its own plot.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import numpy as np

from extensions import schedules
from reproduce.baselines import LR_SCHEDULES
from reproduce.job.command_line import Parser, reason, run_program
from reproduce.job.plots import plt, save
from reproduce.listing import DataError
from reproduce.studies.pictures import style

_STYLES = ('k-', 'k--', 'k:', 'k-.')
_MARKERS = 'os^Dvx+*'
RESULTS = Path(__file__).parents[1] / 'results'
CIFAR10 = 'a folder with CIFAR-10 as train/CLASS/* and val/CLASS/*'
SCHEDULES_ALT = (
    'Three panels over the epochs of 90. alpha_SGD rises from 0.01 to 1/2 at epoch 10; the printed '
    'form goes on to 1.5 at epoch 12.5 and drops to 1; the continuous one reaches 1 with no jump. '
    'alpha_RMSprop falls from 4.6e-5 to 0 meanwhile. The learning rate of the slow start is 6.4 '
    'until epoch 40, then 0.96, 0.128, 0.0128; that of Goyal et al. rises to 12.8 in 5 epochs and '
    'falls tenfold at epochs 30, 60 and 80.'
)

# Team, total batch, hardware, software, minutes, top-1 in per cent, and the letters of the sources.
# The first rows are the authors' own comparison (T); the others came after the paper, or are of a
# later version.
PUBLISHED = (
    ('He et al.', '256', 'P100 x 8', 'Caffe', 29 * 60, 75.3, 'A, T'),
    ('Goyal et al.', '8,192', 'P100 x 256', 'Caffe2', 60, 76.3, 'A, T'),
    ('Codreanu et al.', '11,520', 'KNL 7250 x 720', 'Intel Caffe', 62, 75.0, 'T'),
    ('You et al.', '16,000', 'Xeon 8160 x 1,600', 'Intel Caffe', 31, 75.3, 'T'),
    ('Akiba et al.', '32,768', 'P100 x 1,024', 'Chainer', 15, 74.9, 'A, T'),
)
LATER = (
    ('You et al., a later version', '32,768', 'KNL x 2,048', '', 20, 75.4, 'A'),
    ('Smith et al.', '8,192 -> 16,384', 'TPU pod', '', 30, 76.1, 'O'),
    ('Jia et al.', '65,536', 'P40 x 2,048', '', 6.6, 75.8, 'O'),
    ('Ying et al.', '65,536', 'TPUv3 x 1,024', '', 1.8, 75.2, 'O'),
    ('Mikami et al.', '55,296', 'V100 x 3,456', '', 2.0, 75.29, 'O'),
    ('Yamazaki et al.', '81,920', 'V100 x 2,048', '', 74.7 / 60, 75.08, 'O'),
)

# Total batch to epochs until a top-1 of 75.9 %, means over many seeds, with LARS (M).
MLPERF = {
    1632: 35.0,
    3264: 35.2,
    4096: 40.0,
    8192: 42.0,
    13056: 45.4,
    32768: 56.0,
    49152: 68.0,
    58880: 79.9,
    65536: 84.5,
    67840: 85.9,
}


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
    style.save(_schedules(32768), os.path.join(out, 'schedules.png'), SCHEDULES_ALT)


@style.styled
def _schedules(batch):
    figure, axes = plt.subplot_mosaic('ac;bc', figsize=(style.WIDTH, 5.2))
    early = np.linspace(0, 15, 3001)
    for form, line, color in (('continuous', '--', style.BLUE), ('printed', '-', style.BLACK)):
        alpha = schedules.alpha_sgd(early, form=form)
        lr = schedules.learning_rate(early, batch)
        for axis, y in ((axes['a'], alpha), (axes['b'], 1e5 * schedules.alpha_rmsprop(alpha, lr))):
            axis.plot(early, y, line, color=color, label=form)
    style.label(axes['a'], 11.6, 1.2, 'printed: jumps', ha='right')
    style.label(axes['a'], 11.4, 0.72, 'continuous', style.BLUE, va='top', offset=(4, 0))
    style.label(axes['b'], 10.9, 0.5, 'printed', ha='right')
    style.label(axes['b'], 11.3, 1.3, 'continuous', style.BLUE, va='bottom', offset=(2, 0))
    _learning_rates(axes['c'], batch)
    for axis, title in zip(
        (axes['a'], axes['b'], axes['c']),
        (
            r'$\alpha_\mathrm{SGD}$: weight of SGD',
            r'$10^5\,\alpha_\mathrm{RMSprop}$: weight of RMSprop',
            rf'$\eta$: learning rate, batch {batch:,}',
        ),
    ):
        axis.set_title(title)
    axes['a'].set_yticks([0, 0.5, 1, 1.5])
    axes['a'].tick_params(labelbottom=False)
    for name in 'bc':
        axes[name].set_xlabel('epoch of 90')
    return figure


def _learning_rates(axis, batch):
    epochs = np.linspace(0, 90, 9001)
    for name, title, line, color in (
        ('steps', 'the same without warm-up', ':', style.VERMILION),
        ('gradual_warmup', 'gradual warm-up (Goyal et al.)', '--', style.BLUE),
        ('slow_start', 'slow start (Akiba et al.)', '-', style.BLACK),
    ):
        axis.plot(epochs, LR_SCHEDULES[name](epochs, batch), line, color=color, label=title)
    axis.set_yscale('log')
    axis.set_ylim(8e-3, 60)
    style.label(axis, 0, 17, 'Goyal et al. without warm-up (dotted)', style.VERMILION, va='bottom')
    style.label(axis, 3, 0.25, 'gradual\nwarm-up\n(Goyal\net al.)', style.BLUE)
    style.label(axis, 40, 6.4, 'slow start\n(Akiba et al.)', offset=(6, 0))


def comparison(out: str):
    """Draws OUT/comparison.png: published training times, and top-1 beside each.

    A row for each result, the fastest below. The authors' own comparison has filled markers, and
    later results have open ones.

    Args:
        out (str): The folder. The file is replaced as a whole.
    """
    rows = [(*row, 'ks') for row in PUBLISHED] + [(*row, 'wo') for row in LATER]
    rows.sort(key=lambda row: row[4])
    figure, axis = plt.subplots(figsize=(9.5, 5.2), constrained_layout=True)
    for y, (team, _, _, _, minutes, top1, source, marker) in enumerate(rows):
        marker = 'k*' if team.startswith('Akiba') else marker
        axis.plot([0.7, minutes], [y, y], 'k:', lw=0.6)
        axis.plot(minutes, y, marker, mec='k', ms=13 if '*' in marker else 7)
        percent = max(f'{top1:.1f}', f'{top1:g}', key=len)
        text = f'{_time(minutes)}, {percent} % ({source})'
        axis.annotate(text, (minutes, y), (9, 0), textcoords='offset points', va='center')
    axis.plot([], [], 'k*', ms=12, label='Akiba et al.')
    axis.plot([], [], 'ks', label='what the authors compared with')
    axis.plot([], [], 'wo', mec='k', label='later')
    axis.set_yticks(range(len(rows)), [f'{row[0]}: {row[1]}, {row[2]}' for row in rows])
    axis.set_xscale('log')
    axis.set_xlim(0.7, 20000)
    axis.set_xticks((1, 10, 100, 1000), ['1', '10', '100', '1,000'])
    axis.minorticks_off()
    axis.set_xlabel('training time, minutes')
    axis.set_title('ResNet-50 on ImageNet, published: time, top-1 (source)')
    axis.grid(alpha=0.3)
    axis.legend(loc='lower right')
    save(figure, os.path.join(out, 'comparison.png'))


def _time(minutes) -> str:
    return f'{minutes / 60:g} h' if minutes >= 600 else f'{minutes:.3g} min'


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


def picture(name: str, measure: bool, images: Path | None, out: str):
    """Draws OUT/NAME.png, a picture of reproduce/studies/pictures.

    Args:
        name (str): Name of the module.
        measure (bool): Whether to make the data anew, and to write them to OUT, too.
        images (Path or None): CIFAR-10, for a picture whose data need it.
        out (str): The folder. The files are replaced as a whole.

    Raises:
        DataError: There are no data, no command that makes them, or no images for it.
    """
    module = importlib.import_module(f'reproduce.studies.pictures.{name}')
    path = RESULTS / (module.DATA or '')
    if measure:
        if not hasattr(module, 'measure'):
            raise DataError(f'--measure: {name} has no data of its own: leave it out')
        needed = [images] if getattr(module, 'NEEDS_IMAGES', False) else []
        if None in needed:
            raise DataError(f'--measure: {name} needs --images: {CIFAR10}')
        path = Path(out) / path.name
        path.write_text(json.dumps(module.measure(*needed)) + '\n')
    try:
        content = [json.loads(path.read_text())] if module.DATA else []
        figure = module.draw(*content)
    except OSError as error:
        raise DataError(f'no data: {reason(error)}; run from a checkout of the project') from error
    style.save(figure, os.path.join(out, f'{name}.png'), module.ALT)


def main():
    parser = Parser(prog='./run_mpi.sh figures', description=__doc__)
    parser.add_argument(
        'name',
        choices=(
            'schedules',
            'comparison',
            'runs',
            'updates',
            'start',
            'step',
            'transition',
            'slow_start',
            'statistics',
            'rounding',
            'mn1',
            'iteration',
        ),
        metavar='NAME',
        help='plot to draw, as listed above',
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
        '--measure',
        action='store_true',
        help='train for the data, some minutes, and write them to FOLDER, too [take those in '
        'reproduce/results/figures]',
    )
    parser.add_argument(
        '--images',
        type=Path,
        metavar='FOLDER',
        help=f'for transition and slow_start with --measure: {CIFAR10}',
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
    draw = {'schedules': paper_schedules, 'comparison': comparison}
    try:
        os.makedirs(options.out, exist_ok=True)
        if options.name == 'runs':
            runs(logs, options.out)
        elif options.name in draw:
            draw[options.name](options.out)
        else:
            picture(options.name, options.measure, options.images, options.out)
    except DataError as error:
        parser.refuse(error)
    except OSError as error:
        parser.refuse(f'--out {reason(error)}')
    print(Path(options.out) / f'{options.name}.png')


if __name__ == '__main__':
    run_program(main)
