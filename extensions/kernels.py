"""Inner loops in C for the CPU, where the installation found a compiler; NumPy does them elsewhere.

Both give the same bits. The library is plain C without Python's headers, loaded by ctypes.
"""

from __future__ import annotations

import ctypes
import hashlib
import sysconfig
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
SOURCES = ('kernels.c', 'rmsprop_warmup_element.h')


def source_digest() -> str:
    """Identifies the sources: a library that was compiled from others is not used."""
    return hashlib.sha256(b''.join((_FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()


def _load() -> ctypes.CDLL | None:
    path = _FOLDER / f'_kernels{sysconfig.get_config_var("EXT_SUFFIX")}'
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    library.source_digest.restype = ctypes.c_char_p
    if library.source_digest().decode() != source_digest():
        return None
    for name, scalar in (('float32', ctypes.c_float), ('float64', ctypes.c_double)):
        pointer = ctypes.c_void_p
        function = getattr(library, f'rmsprop_warmup_{name}')
        function.argtypes = [ctypes.c_int64, pointer, *[scalar] * 7, pointer, pointer, pointer]
        function.restype = None
    return library


library = _load()


def function(name: str, *arrays):
    """The compiled function for these arrays, or None.

    Args:
        name (str): Its name in ``kernels.c``, without the dtype.
        arrays (numpy.ndarray): All must have one dtype, that of a compiled function, and be
            C-contiguous.
    """
    dtype = arrays[0].dtype
    if all(array.dtype == dtype and array.flags.c_contiguous for array in arrays):
        return getattr(library, f'{name}_{dtype.name}', None)
    return None


def address(array) -> int:
    return array.__array_interface__['data'][0]
