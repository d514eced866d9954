"""Makes Chainer 7.8.1 (2022) importable on current NumPy.

At import time, Chainer reads names that NumPy 1.24, 1.26 and 2.0 removed. Import this module before
Chainer: it restores each removed name, with the meaning given in NumPy's release notes. Names that
NumPy still has stay unchanged. NumPy 1.23 needs no additions, and on NumPy 2 `numpy.bool` stays
NumPy's own type.
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
    """Adds to NumPy the removed names that Chainer reads.

    Returns:
        list of str: The added names; empty on NumPy 1.23.
    """
    added = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # reading a deprecated name warns
        for name, value in _REMOVED.items():
            if not hasattr(np, name):
                setattr(np, name, value)
                added.append(name)
    return added


def forget_failed_imports() -> None:
    """Lets Chainer be imported after its import failed, as in an earlier cell of a notebook.

    A failed import leaves Chainer's modules behind, which do not fit a second import.
    """
    for package in ('chainer', 'chainermn'):
        if package not in sys.modules:
            for name in [name for name in sys.modules if name.startswith(f'{package}.')]:
                del sys.modules[name]


restore_removed_names()
forget_failed_imports()

# Replace Chainer's check of its environment. The check takes longer than the rest of the import,
# because of modules that current releases lack (numpy.distutils, pkg_resources). It concerns Python
# 3.5.0, the BLAS of macOS, and CuPy 7; this project uses none of them.
_CHECK: Any = types.ModuleType('chainer._environment_check')
_CHECK.check = lambda: None
sys.modules[_CHECK.__name__] = _CHECK
import chainer  # noqa: F401
