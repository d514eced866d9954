"""Makes Chainer 7.8.1 (2022) importable on the NumPy of today.

Chainer reads names at import time that NumPy 1.24, 1.26 and 2.0 have removed. Importing this module
before Chainer gives those names back, with the meaning that NumPy's release notes state for each.
What NumPy still has is left as it is: on NumPy 1.23 nothing is added, and `numpy.bool` stays
NumPy's own type on NumPy 2.
"""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import numpy as np

_REMOVED = {
    'bool': bool,
    'int': int,
    'float': float,
    'complex': complex,
    'object': object,
    'str': str,
    'float_': np.float64,
    'complex_': np.complex128,
    'Inf': np.inf,
    'NaN': np.nan,
    'product': np.prod,
    'cumproduct': np.cumprod,
    'alltrue': np.all,
    'sometrue': np.any,
    'sctypes': {
        'int': [np.int8, np.int16, np.int32, np.int64],
        'uint': [np.uint8, np.uint16, np.uint32, np.uint64],
        'float': [np.float16, np.float32, np.float64, np.longdouble],
        'complex': [np.complex64, np.complex128, np.clongdouble],
        'others': [bool, object, bytes, str, np.void],
    },
}


def restore_removed_names() -> list[str]:
    """Adds to NumPy what Chainer reads and NumPy no longer has.

    Returns:
        list of str: The names that were added; empty on NumPy 1.23.
    """
    added = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # asking for a deprecated name warns
        for name, value in _REMOVED.items():
            if not hasattr(np, name):
                setattr(np, name, value)
                added.append(name)
    return added


restore_removed_names()

# Chainer's check of its environment takes longer than the rest of its import, by what current
# releases lack (numpy.distutils, pkg_resources). It is about Python 3.5.0, the BLAS of macOS, and
# CuPy 7, none of which this project uses.
_CHECK: Any = types.ModuleType('chainer._environment_check')
_CHECK.check = lambda: None
sys.modules[_CHECK.__name__] = _CHECK
import chainer  # noqa: F401
