"""Makes Chainer 7.8.1 (2022) importable on the NumPy of today.

Chainer reads names at import time that NumPy 1.24, 1.26 and 2.0 have removed. Importing this module
before Chainer gives those names back, with the meaning that NumPy's release notes state for each.
What NumPy still has is left as it is: on NumPy 1.23 nothing is added, and `numpy.bool` stays
NumPy's own type on NumPy 2.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
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


def _stub(name) -> Any:
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None))
    sys.modules[name] = module
    return module


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
    if importlib.util.find_spec('numpy.distutils') is None:
        # Chainer asks it for the BLAS on macOS only, but imports it everywhere.
        distutils = _stub('numpy.distutils')
        distutils.system_info = _stub('numpy.distutils.system_info')
        distutils.system_info.get_info = lambda name: {}
        setattr(np, 'distutils', distutils)  # noqa: B010  (mypy knows that NumPy has none)
        added.append('distutils')
    return added


restore_removed_names()
with warnings.catch_warnings():
    # Chainer's check of its environment imports two deprecated packages; every rank would say so.
    warnings.simplefilter('ignore', DeprecationWarning)
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
    import chainer  # noqa: F401
