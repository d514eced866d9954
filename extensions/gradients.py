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


def joined_gradients(params):
    """Returns copies of all gradients in one array, one after the other.

    On a GPU, CuPy copies many gradients with one kernel.

    Args:
        params (list of ~chainer.Parameter): Have gradients, all on one device.
    """
    device = params[0].device
    with chainer.using_device(device):
        return device.xp.concatenate([param.grad.ravel() for param in params])


def parts_of(array, params):
    """Yields each parameter's part of the array, as a view in the parameter's shape."""
    start = 0
    for param in params:
        yield array[start : start + param.size].reshape(param.shape)
        start += param.size


def _copy(param):
    # CuPy copies on the current device.
    with chainer.using_device(param.device):
        param.grad = param.device.xp.array(param.grad, order='C')
