"""Inner loops in C for the CPU, where the installation found a compiler; NumPy does them elsewhere.

Both give the same bits. The library is plain C without Python's headers, loaded by ctypes.
"""

from __future__ import annotations

import ctypes
import hashlib
import sysconfig
from pathlib import Path

import numpy as np

_FOLDER = Path(__file__).resolve().parent
SOURCES = ('kernels.c', 'rmsprop_warmup_element.h')


def source_digest() -> str:
    """Identifies the sources: a library that was compiled from others is not used."""
    return hashlib.sha256(b''.join((_FOLDER / name).read_bytes() for name in SOURCES)).hexdigest()


def _load() -> dict:
    """The compiled functions by their names in ``kernels.c``; none without the library."""
    path = _FOLDER / f'_kernels{sysconfig.get_config_var("EXT_SUFFIX")}'
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return {}
    library.source_digest.restype = ctypes.c_char_p
    if library.source_digest().decode() != source_digest():
        return {}
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    arguments = {}
    for name, scalar in (('float32', ctypes.c_float), ('float64', ctypes.c_double)):
        arguments[f'rmsprop_warmup_{name}'] = [size, pointer, *[scalar] * 7, *[pointer] * 3]
    if hasattr(library, 'has_float16') and library.has_float16():
        for name in ('float32_to_float16', 'float16_to_float32', 'float16_to_float64'):
            arguments[name] = [size, pointer, pointer]
        arguments['float16_add'] = [size, pointer, pointer]
        arguments['float16_mean'] = [size, pointer, ctypes.c_double, pointer]
    functions = {name: getattr(library, name) for name in arguments}
    for name, function in functions.items():
        function.argtypes, function.restype = arguments[name], None
    return functions


compiled = _load()


def address(array) -> int:
    return array.__array_interface__['data'][0]


def cast(source, target):
    """``target[...] = source`` for arrays of one size; beyond 65,504 a float16 is infinite."""
    function = compiled.get(f'{source.dtype.name}_to_{target.dtype.name}')
    if function and source.flags.c_contiguous and target.flags.c_contiguous:
        function(source.size, address(source), address(target))
    else:
        with np.errstate(over='ignore', invalid='ignore'):
            target[...] = source.reshape(target.shape)


def add(source, target):
    """``target += source`` for contiguous arrays, ``target`` of float64."""
    function = compiled.get(f'{source.dtype.name}_add')
    if function:
        function(source.size, address(source), address(target))
    else:
        target += source


def mean(total, n, target):
    """``target[...] = total / n`` for contiguous arrays, ``total`` of float64, rounded once."""
    function = compiled.get(f'{target.dtype.name}_mean')
    if function:
        function(total.size, address(total), n, address(target))
    else:
        with np.errstate(over='ignore', invalid='ignore'):
            target[...] = total / n
