"""Gradient arrays that can be changed in place."""

from __future__ import annotations

import ctypes

import chainer
import numpy as np


def own_gradients(params):
    """Gives each parameter a gradient array of its own, in C order, that can be written.

    Backpropagation gives several parameters one array (``x + b1 + b2``), or a read-only view of
    another array (``F.sum(b)``). Such a gradient is replaced by a copy. A missing one stays
    missing. A parameter may be given twice, as one with two names is.

    Args:
        params (iterable of ~chainer.Parameter): Have a size, and are all on one device.
    """
    owners, starts, sizes = [], [], []
    addressof, as_buffer = ctypes.addressof, ctypes.c_char.from_buffer  # the fastest way
    for param in {id(param): param for param in params}.values():
        grad = param.grad
        if grad is None:
            continue
        on_cpu = isinstance(grad, np.ndarray)
        # CuPy's arrays have no flag for writing: all can be written.
        if not (grad.flags.carray if on_cpu else grad.flags.c_contiguous):
            _copy(param)
        elif grad.size:
            owners.append(param)
            starts.append(addressof(as_buffer(grad)) if on_cpu else grad.data.ptr)
            sizes.append(grad.nbytes)
    order = np.argsort(starts, kind='stable')
    starts = np.array(starts, np.uint64)[order]
    ends = starts + np.array(sizes, np.uint64)[order]
    for i in order[1:][starts[1:] < np.maximum.accumulate(ends)[:-1]]:
        _copy(owners[i])


def _copy(param):
    # CuPy copies on the current device.
    with chainer.using_device(param.device):
        param.grad = param.device.xp.array(param.grad, order='C')
