"""The plots."""

from __future__ import annotations

import os

import matplotlib

matplotlib.use('Agg')  # ranks have no screen
from matplotlib import pyplot as plt


def curves(log: list, path: str):
    """Loss and top-1 by epoch, the learning rate and alpha_SGD under them, as a PNG.

    Args:
        log (list of dict): Entries of Chainer's ``log``.
        path (str): Of the file; replaced as a whole.
    """
    epochs = [entry['epoch'] for entry in log]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, constrained_layout=True)
    (loss, top1), (lr, alpha) = axes
    loss.plot(epochs, [e['main/loss'] for e in log], 'k-', label='training')
    loss.plot(epochs, [e['validation/main/loss'] for e in log], 'k--', label='validation')
    loss.set_ylabel('loss')
    loss.legend()
    accuracy = [100 * e['validation/main/accuracy'] for e in log]
    top1.plot(epochs, accuracy, 'k--')
    top1.set_ylabel('validation top-1 (%)')
    top1.annotate(f'{accuracy[-1]:.2f} %', (epochs[-1], accuracy[-1]), ha='right', va='top')
    lr.plot(epochs, [e['lr'] for e in log], 'k.-')
    lr.set_yscale('log')
    lr.set_ylabel('learning rate')
    alpha.plot(epochs, [e['alpha_sgd'] for e in log], 'k.-')
    alpha.set_ylabel('alpha_SGD')
    for axis in (lr, alpha):
        axis.set_xlabel('epoch')
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path + '.tmp', format='png', dpi=150)
    plt.close(figure)
    os.replace(path + '.tmp', path)
