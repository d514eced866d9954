"""Learning rates of Goyal et al. (G), for comparison with the paper's."""

from __future__ import annotations

import numpy as np

from extensions import base_learning_rate, learning_rate

_ENDS = (30, 60, 80)  # epochs
_FACTORS = np.array((1.0, 0.1, 0.01, 0.001))
_WARMUP_EPOCHS = 5


def steps(epoch, total_batch_size):
    """Returns Goyal's eta without warm-up (G): eta_base, divided by 10 at epochs 30, 60 and 80.

    Args:
        epoch (float or array): Fractional epochs of the paper's 90.
        total_batch_size (int): B, images of all workers together in one iteration.

    Returns:
        float, or float64 array of ``epoch``'s shape: eta.
    """
    factor = _FACTORS[np.searchsorted(_ENDS, epoch, side='right')]
    lr = base_learning_rate(total_batch_size) * factor
    return lr if np.ndim(lr) else float(lr)


def gradual_warmup(epoch, total_batch_size):
    """Returns Goyal's eta with warm-up (G): a linear rise over 5 epochs, then :func:`steps`.

    The rise leads from 0.1, the rate for 256 images, to eta_base. There is no warm-up if eta_base
    is below 0.1.

    Args:
        epoch (float or array): Fractional epochs of the paper's 90.
        total_batch_size (int): B, images of all workers together in one iteration.

    Returns:
        float, or float64 array of ``epoch``'s shape: eta.
    """
    base = base_learning_rate(total_batch_size)
    start = min(base_learning_rate(256), base)
    rising = start + (base - start) * np.asarray(epoch, np.float64) / _WARMUP_EPOCHS
    lr = np.minimum(steps(epoch, total_batch_size), rising)
    return lr if np.ndim(lr) else float(lr)


LR_SCHEDULES = {'slow_start': learning_rate, 'steps': steps, 'gradual_warmup': gradual_warmup}
