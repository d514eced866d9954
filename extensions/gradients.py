"""Gradient arrays that can be changed in place."""

from __future__ import annotations

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
    arrays = []
    for param in {id(param): param for param in params}.values():
        grad = param.grad
        if grad is None:
            continue
        flags = grad.flags
        # CuPy's arrays have no flag for writing: all can be written.
        if isinstance(grad, np.ndarray) and not flags.carray or not flags.c_contiguous:
            _copy(param)
        else:
            start = _address(grad)
            arrays.append((start, start + grad.nbytes, len(arrays), param))
    last_end = 0
    for start, end, _, param in sorted(arrays, key=lambda array: array[:3]):
        if start < min(last_end, end):
            _copy(param)
        last_end = max(last_end, end)


def _copy(param):
    # CuPy copies on the current device.
    with chainer.using_device(param.device):
        param.grad = param.device.xp.array(param.grad, order='C')


def _address(array) -> int:
    return array.__array_interface__['data'][0] if isinstance(array, np.ndarray) else array.data.ptr
