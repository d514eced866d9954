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
    path = os.path.join(out, 'curves.png')
    figure.savefig(path + '.tmp', format='png', dpi=150)
    plt.close(figure)
    os.replace(path + '.tmp', path)
