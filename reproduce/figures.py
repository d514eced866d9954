"""The plots.

python -m reproduce.figures schedules         alpha_SGD, both forms, and the learning rates
python -m reproduce.figures comparison        published results: training time against top-1
python -m reproduce.figures runs RUN ...      loss and top-1 of runs of train.py, by epoch

Training, the benchmarks, cluster.py and miniature.py draw their own.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import matplotlib
import numpy as np

from extensions import schedules

matplotlib.use('Agg')  # ranks have no screen
from matplotlib import pyplot as plt


def curves(log: list, settings, out: str):
    """Draws OUT/curves.png: loss and top-1 by epoch, the learning rate and alpha_SGD under them.

    The two schedules are lines, what the last update of each epoch used is dots on them.

    Args:
        log (list of dict): Entries of Chainer's ``log``.
        settings (Settings): Of the run.
        out (str): Folder; the file is replaced as a whole.
    """
    epochs = [entry['epoch'] for entry in log]
    top1 = [100 * entry['validation/main/accuracy'] for entry in log]
    fine = np.linspace(0, settings.epochs, 2000)
    of_90 = fine * schedules.PAPER_EPOCHS / settings.epochs
    transition = (settings.beta_center, settings.beta_period, settings.alpha_form)

    # All ranks wait for this, and a layout found by drawing would double the time.
    borders = {'left': 0.07, 'right': 0.98, 'bottom': 0.08, 'top': 0.94, 'hspace': 0.16}
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, gridspec_kw=borders)
    axes[0, 0].plot(epochs, [entry['main/loss'] for entry in log], 'k-', label='training')
    axes[0, 0].plot(
        epochs, [entry['validation/main/loss'] for entry in log], 'k--', label='validation'
    )
    axes[0, 0].legend()
    axes[0, 1].plot(epochs, top1, 'k--')
    axes[1, 0].plot(fine, settings.lr(of_90), 'k-', lw=0.8)
    axes[1, 0].plot(epochs, [entry['lr'] for entry in log], 'k.')
    axes[1, 0].set_yscale('log')
    axes[1, 1].plot(fine, schedules.alpha_sgd(of_90, *transition), 'k-', lw=0.8)
    axes[1, 1].plot(epochs, [entry['alpha_sgd'] for entry in log], 'k.')
    titles = (
        'loss',
        f'validation top-1 (%), last {top1[-1]:.2f}',
        f'learning rate eta, {settings.lr_schedule}',
        f'alpha_SGD, {settings.alpha_form}',
    )
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[1]:
        axis.set_xlabel('epoch')
    _save(figure, os.path.join(out, 'curves.png'))


def precision(errors: dict, out: str):
    """Draws OUT/precision.png: the error of the mean gradient by number of workers.

    Args:
        errors (dict): Number of workers, kind of layer, name of the sum to the relative error.
        out (str): Folder; the file is replaced as a whole.
    """
    workers = list(errors)
    kinds = list(errors[workers[0]])
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(10, 3.6), sharex=True, sharey=True, constrained_layout=True
    )
    for axis, kind in zip(axes, kinds):
        for name, style in zip(errors[workers[0]][kind], ('ko-', 'ks--', 'k^:')):
            axis.loglog(workers, [errors[n][kind][name] for n in workers], style, label=name)
        axis.set_title(kind)
        axis.set_xlabel('workers n')
        axis.set_xticks(workers, [f'{n:,}' for n in workers])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('relative error of the mean')
    axes[0].legend()
    _save(figure, os.path.join(out, 'precision.png'))


_STYLES = ('k-', 'k--', 'k:', 'k-.')
_MARKERS = 'os^Dvx+*'

# Team, batch, hardware, hours, top-1 in per cent, and where that is known from: A, the abstract and
# tables of later papers; U, unsourced.
PUBLISHED = (
    ('He et al.', 256, 'P100 x 8', 29, 75.3, 'A'),
    ('Goyal et al.', 8192, 'P100 x 256', 1, 76.3, 'A'),
    ('Codreanu et al.', 32768, 'KNL x 1,024', 42 / 60, 75.3, 'U'),
    ('You et al.', 32768, 'KNL x 2,048', 20 / 60, 75.4, 'A'),
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
    _save(figure, os.path.join(out, 'runs.png'))


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
        axes[2].plot(epochs, schedules.learning_rate(epochs, batch, name), style, label=title)
    axes[2].set_yscale('log')
    for axis, title in zip(
        axes,
        ('alpha_SGD', 'alpha_RMSprop (1e-5)', f'learning rate eta, total batch {batch:,}'),
    ):
        axis.set_title(title)
        axis.set_xlabel('epoch of 90')
        axis.grid(alpha=0.3)
        axis.legend(fontsize='small')
    _save(figure, os.path.join(out, 'schedules.png'))


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
    _save(figure, os.path.join(out, 'comparison.png'))


def cluster(tables: dict, name: str, published: dict, out: str):
    """Draws OUT/cluster.png: an iteration, its efficiency and the whole training by GPUs.

    Args:
        tables (dict): Type on the wire to the rows of :func:`reproduce.cluster.table`.
        name (str): Of the cluster.
        published (dict): Results to stand beside, drawn and not used; may be empty.
        out (str): Folder; the file is replaced as a whole.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), constrained_layout=True)
    gpus = [row['processes'] for row in next(iter(tables.values()))]
    for dtype, rows in tables.items():
        marker = {'ms': 5, 'marker': 'o' if dtype == 'float16' else 's'}
        marker['mfc'] = 'k' if dtype == 'float16' else 'w'
        for key, style, label in (('iteration', 'k-', dtype), ('allreduce', 'k:', 'all-reduce')):
            label = label if label == dtype else f'{label}, {dtype}'
            drawn = [1000 * row[key] or np.nan for row in rows]  # one GPU has no all-reduce
            axes[0].plot(gpus, drawn, style, label=label, **marker)
        efficiency = [100 * row['efficiency_to_one_gpu'] for row in rows]
        axes[1].plot(gpus, efficiency, 'k-', **marker)
        axes[2].plot(gpus, [row['total'] / 60 for row in rows], 'k-', **marker)
    if 'efficiency_to_one_gpu' in published:
        share = 100 * published['efficiency_to_one_gpu']
        axes[1].plot(gpus[-1:], [share], 'k*', ms=10, label='of the paper, unsourced')
        axes[1].legend(loc='lower left')
    if 'seconds' in published:
        minutes = published['seconds'] / 60
        axes[2].axhline(minutes, color='k', ls='--', lw=1, label=f'published: {minutes:g} min')
        axes[2].legend()
    axes[0].set_title('an iteration, ms')
    axes[1].set_title('efficiency against one GPU, %')
    axes[1].set_ylim(0, 105)
    axes[2].set_title('90 epochs, minutes')
    for axis in axes:
        axis.set_xscale('log', base=2)
        axis.set_xticks(gpus[::2], [f'{n:,}' for n in gpus[::2]])
        axis.set_xlabel('GPUs, 32 images each')
        axis.grid(alpha=0.3)
    for axis in (axes[0], axes[2]):
        axis.set_yscale('log')
        axis.yaxis.set_major_formatter(lambda y, _: f'{y:,g}')
    figure.suptitle(f'{name}: predictions')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
    _save(figure, os.path.join(out, 'cluster.png'))


def sensitivity(found: dict, name: str, published: dict, out: str):
    """Draws OUT/sensitivity.png: the whole training if one thing is otherwise.

    Args:
        found (dict): Of :func:`reproduce.cluster.sensitivity`.
        name (str): Of the cluster.
        published (dict): Results to stand beside, drawn and not used; may be empty.
        out (str): Folder; the file is replaced as a whole.
    """
    base = found['as described'] / 60
    inputs = sorted(found['inputs'].items(), key=lambda item: abs(item[1][0] - item[1][1]))
    what_if = list(found['what if'].items())[::-1]
    figure, axis = plt.subplots(figsize=(9, 6.5), constrained_layout=True)
    for y, (_, (half, twice)) in enumerate(inputs):
        axis.plot([half / 60, base, twice / 60], [y, y, y], 'k-', lw=0.8)
        axis.plot(twice / 60, y, 'ks', ms=6)
        axis.plot(half / 60, y, 'ko', mfc='w', ms=6)
    for y, (_, value) in enumerate(what_if, len(inputs) + 1):
        axis.plot([base, value / 60], [y, y], 'k-', lw=0.8)
        axis.plot(value / 60, y, 'kD', ms=5)
    axis.plot([], [], 'kD', ms=5, label='what if')
    axis.plot([], [], 'ko', mfc='w', ms=6, label='half of it')
    axis.plot([], [], 'ks', ms=6, label='twice')
    axis.axvline(base, color='k', lw=1, label=f'as described: {base:.1f} min')
    if 'seconds' in published:
        minutes = published['seconds'] / 60
        axis.axvline(minutes, color='k', ls='--', lw=1, label=f'published: {minutes:g} min')
    axis.set_yticks(
        [*range(len(inputs)), *range(len(inputs) + 1, len(inputs) + 1 + len(what_if))],
        [label for label, _ in inputs + what_if],
    )
    axis.set_xscale('log')
    axis.xaxis.set_major_formatter(lambda x, _: f'{x:g}')
    axis.xaxis.set_minor_formatter(lambda x, _: f'{x:g}')
    axis.set_xlabel('90 epochs on all GPUs, minutes')
    axis.grid(alpha=0.3)
    axis.legend(loc='lower right')
    axis.set_title(f'{name}: one thing otherwise (predictions)')
    _save(figure, os.path.join(out, 'sensitivity.png'))


def iteration(runs: dict, out: str):
    """Draws OUT/iteration.png: iteration and all-reduce by number of workers, and the efficiency.

    Args:
        runs (dict): Name to the entries of ``iteration.json``; three at most.
        out (str): Folder; the file is replaced as a whole.
    """
    workers = sorted({run['workers'] for entries in runs.values() for run in entries})
    figure, (times, efficiencies) = plt.subplots(1, 2, figsize=(9, 4), constrained_layout=True)
    for (name, entries), marker, color in zip(runs.items(), 'os^', ('k', '0.45', '0.65')):
        n = [run['workers'] for run in entries]
        for key, title, style in (
            ('iteration', 'iteration', '-'),
            ('allreduce', 'all-reduce', ':'),
        ):
            milliseconds = [1000 * run[key] for run in entries]
            times.plot(n, milliseconds, marker + style, color=color, label=f'{title}, {name}')
        for key, title, style in (
            ('efficiency_one_worker', 'of one worker', '-'),
            ('efficiency_one_host', 'of one host', '--'),
        ):
            found = [(run['workers'], 100 * run[key]) for run in entries if run.get(key)]
            if len(found) > 1:
                efficiencies.plot(
                    *zip(*found), marker + style, color=color, label=f'{title}, {name}'
                )
    times.set_title('milliseconds')
    efficiencies.set_title('scaling efficiency (%)')
    efficiencies.axhline(100, color='k', lw=0.5)
    for axis in (times, efficiencies):
        axis.set_xscale('log')
        axis.set_xlabel('workers n')
        axis.set_xticks(workers, [f'{n:,}' for n in workers])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize='small')
        else:
            axis.set_xlim(times.get_xlim())
            axis.text(0.5, 0.5, 'no one worker or one host', ha='center', transform=axis.transAxes)
    _save(figure, os.path.join(out, 'iteration.png'))


def _save(figure, path):
    figure.savefig(path + '.tmp', format='png', dpi=150)
    plt.close(figure)
    os.replace(path + '.tmp', path)


def main():
    parser = argparse.ArgumentParser(
        prog='python -m reproduce.figures',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('what', choices=('schedules', 'comparison', 'runs'))
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
