"""Draws the plot of a run, and writes every plot."""

from __future__ import annotations

import os

import numpy as np

os.environ['MPLBACKEND'] = 'Agg'  # ranks have no screen; a notebook's backend is not installed here
import matplotlib

matplotlib.use('Agg')  # if something has imported matplotlib before
matplotlib.rcdefaults()  # not the user's, which may need LaTeX, for example
from matplotlib import pyplot as plt


def curves(log: list, settings, out: str):
    """Draws OUT/curves.png: loss and top-1 by epoch, and below them learning rate and alpha_SGD.

    Lines show the two schedules. Dots show the values that each epoch's last update used.

    Args:
        log (list of dict): Entries of Chainer's ``log``.
        settings (Settings): Settings of the run.
        out (str): The folder OUT. The file is replaced as a whole.
    """
    epochs = [entry['epoch'] for entry in log]
    top1 = [100 * entry['validation/main/accuracy'] for entry in log]
    fine = np.linspace(0, settings.epochs, 2000)
    of_90 = settings.epoch_of_90(fine)

    # Fixed borders, because all ranks wait for the plot. An automatic layout would double the time.
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
    axes[1, 1].plot(fine, settings.alpha_sgd(of_90), 'k-', lw=0.8)
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
    save(figure, os.path.join(out, 'curves.png'))


def save(figure, path):
    """Writes a figure as a PNG file, and closes the figure. The file is replaced as a whole."""
    figure.savefig(path + '.tmp', format='png', dpi=150)
    plt.close(figure)
    os.replace(path + '.tmp', path)
