"""The parts of cupyx that Chainer needs."""

import sys

import numpy as np
from cupy._array import apply
from cupy._names import complete


def rsqrt(x, dtype=None):
    return apply('rsqrt', lambda host: (1 / np.sqrt(host)).astype(dtype or host.dtype), x)


def scatter_add(a, slices, value):
    apply('scatter_add', np.add.at, a, slices, value)


complete(sys.modules['cupyx'], 'cupyx')
