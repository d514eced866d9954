"""Weight decay in one pass over the gradients."""

from __future__ import annotations

import numpy as np
from chainer import optimizer_hooks

from extensions import kernels


class WeightDecay(optimizer_hooks.WeightDecay):
    """Chainer's optimizer hook, and its bits: ``grad += rate * param``.

    On CPUs, Chainer's own makes an array of the product first, which takes about as long as the
    update itself. It still serves where there is no C.

    Args:
        rate (float): Of the decay.
    """

    def __call__(self, rule, param):
        arrays = param.data, param.grad
        plain = all(isinstance(a, np.ndarray) for a in arrays) and param._loss_scale is None
        if not (plain and kernels.add_scaled(param.data, self.rate, param.grad)):
            super().__call__(rule, param)
