"""The plots."""

from __future__ import annotations

import os

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

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, constrained_layout=True)
    axes[0, 0].plot(epochs, [entry['main/loss'] for entry in log], 'k-', label='training')
    axes[0, 0].plot(
        epochs, [entry['validation/main/loss'] for entry in log], 'k--', label='validation'
    )
    axes[0, 0].legend()
    axes[0, 1].plot(epochs, top1, 'k--')
    axes[1, 0].plot(fine, settings.lr_base * schedules.slow_start_factor(of_90), 'k-', lw=0.8)
    axes[1, 0].plot(epochs, [entry['lr'] for entry in log], 'k.')
    axes[1, 0].set_yscale('log')
    axes[1, 1].plot(fine, schedules.alpha_sgd(of_90, *transition), 'k-', lw=0.8)
    axes[1, 1].plot(epochs, [entry['alpha_sgd'] for entry in log], 'k.')
    titles = (
        'loss',
        f'validation top-1 (%), last {top1[-1]:.2f}',
        'learning rate eta',
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
