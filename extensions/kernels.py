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

# Elements that NumPy works on at a time: they stay in a core's second-level cache.
_BLOCK = 1 << 15


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
    arguments: dict = {'float32_add_scaled': [size, pointer, ctypes.c_float, pointer]}
    for name, scalar in (('float32', ctypes.c_float), ('float64', ctypes.c_double)):
        arguments[f'rmsprop_warmup_{name}'] = [size, pointer, *[scalar] * 7, *[pointer] * 3]
    pack = [size, pointer, ctypes.c_float, pointer, pointer]
    mean = [size, size, size, pointer, size, pointer, ctypes.c_double, pointer]
    arguments['pack_float32_float32'] = pack
    arguments['unpack_float32_float32'] = pack[:-1]
    arguments['mean_float32_float32'] = mean
    if hasattr(library, 'has_float16') and library.has_float16():
        arguments['pack_float32_float16'] = pack
        arguments['unpack_float16_float32'] = pack[:-1]
        arguments['widen_float16'] = arguments['add_float16'] = [size, pointer, pointer]
        arguments['mean_float16_float16'] = arguments['mean_float64_float16'] = mean
    functions = {name: getattr(library, name) for name in arguments}
    for name, function in functions.items():
        function.argtypes = arguments[name]
        function.restype = size if name.startswith('unpack') else None
    return functions


compiled = _load()


_NAMES = {np.dtype(name): name for name in ('float16', 'float32', 'float64')}


def name_of(dtype) -> str:
    """``dtype.name``, which NumPy takes microseconds to make; other dtypes have none."""
    return _NAMES.get(dtype, '')


def address(array) -> int:
    return array.__array_interface__['data'][0]


def pack(grad, scale, target, counts):
    """``target[...] = scale * grad`` in one pass, which also counts what the cast makes of them.

    Args:
        grad (array): Of any shape.
        scale (float): A power of two, applied in the dtype of ``grad``.
        target (array): As many elements, contiguous; beyond 65,504 a float16 is infinite.
        counts (array): int64 [4]. The numbers of elements are added that are not zero in ``grad``,
            and not zero, infinite, and NaN in ``target``.
    """
    grad = np.ascontiguousarray(grad)
    function = compiled.get(f'pack_{name_of(grad.dtype)}_{name_of(target.dtype)}')
    if function:
        function(grad.size, address(grad), scale, address(target), address(counts))
        return
    grad = grad.reshape(-1)
    for start in range(0, grad.size, _BLOCK):
        g, t = grad[start : start + _BLOCK], target[start : start + _BLOCK]
        with np.errstate(over='ignore', invalid='ignore'):
            t[...] = g if scale == 1 else g * grad.dtype.type(scale)
        not_finite = t.size - np.count_nonzero(np.isfinite(t))
        nan = np.count_nonzero(np.isnan(t)) if not_finite else 0
        counts += (np.count_nonzero(g), np.count_nonzero(t), not_finite - nan, nan)


def unpack(mean, scale, grad) -> int:
    """``grad[...] = mean / scale`` in one pass.

    Args:
        mean (array): Contiguous.
        scale (float): A power of two, taken out in the dtype of ``grad``.
        grad (array): As many elements, of any shape.

    Returns:
        int: How many elements of ``mean`` are infinite or NaN.
    """
    function = compiled.get(f'unpack_{name_of(mean.dtype)}_{name_of(grad.dtype)}')
    if function and grad.flags.c_contiguous:
        return function(mean.size, address(mean), 1 / scale, address(grad))
    with np.errstate(over='ignore', invalid='ignore'):
        grad[...] = mean.reshape(grad.shape)
        if scale != 1:
            grad *= grad.dtype.type(1 / scale)
    return mean.size - np.count_nonzero(np.isfinite(mean))


def widen(source, target):
    """``target[...] = source`` for contiguous arrays, ``target`` of float64."""
    function = compiled.get(f'widen_{name_of(source.dtype)}')
    if function:
        function(source.size, address(source), address(target))
    else:
        target[...] = source


def add(source, target):
    """``target += source`` for contiguous arrays, ``target`` of float64."""
    function = compiled.get(f'add_{name_of(source.dtype)}')
    if function:
        function(source.size, address(source), address(target))
    else:
        target += source


def mean(rows, n, target, own=None, place=0):
    """``target[...] = (sum of the rows) / n`` in float64, in their order, rounded once.

    Args:
        rows (array): [k, size], each row contiguous.
        n (int): What the sum is divided by.
        target (array): [size], contiguous.
        own (array): One more row, contiguous, which may be ``target``.
        place (int): Its index among all of them.
    """
    function = compiled.get(f'mean_{name_of(rows.dtype)}_{name_of(target.dtype)}')
    if function:
        k = len(rows) + (own is not None)
        own, place = (rows, k) if own is None else (own, place)
        row_addresses = (address(own), rows.strides[0] // rows.itemsize, address(rows))
        function(target.size, k, place, *row_addresses, n, address(target))
        return
    every = list(rows)
    if own is not None:
        every.insert(place, own)
    total = np.empty(min(_BLOCK, target.size), np.float64)
    for start in range(0, target.size, _BLOCK):
        block = slice(start, min(start + _BLOCK, target.size))
        t = total[: block.stop - start]
        widen(every[0][block], t)
        for row in every[1:]:
            add(row[block], t)
        with np.errstate(over='ignore', invalid='ignore'):
            target[block] = t / n


def add_scaled(source, factor, target):
    """``target += factor * source`` in one pass, for arrays of one dtype.

    Returns:
        bool: Whether it was done: there is C for contiguous float32 alone.
    """
    function = compiled.get('float32_add_scaled')
    if not function or not all(
        a.dtype == np.float32 and a.flags.c_contiguous for a in (source, target)
    ):
        return False
    function(source.size, address(source), factor, address(target))
    return True
