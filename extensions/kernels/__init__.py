"""The CPU's inner loops in C. Without the compiled library, NumPy runs them.

NumPy has the bits of ``kernels.c``, but not those of ``functions.c`` (see ``numpy_functions.py``).
The library is plain C without Python's headers, loaded by ctypes.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import sysconfig
from pathlib import Path

import numpy as np

_FOLDER = Path(__file__).resolve().parent
FILES = (  # in the order of setup.py
    'kernels.c',
    'functions.c',
    '../rmsprop_warmup_element.h',
    'functions.h',
    'convolution.h',
    'layers.h',
    'exp_and_log.h',
)

# Elements per block of the NumPy loops. A block stays in a core's second-level cache.
_BLOCK = 1 << 15


def _open() -> ctypes.CDLL:
    """Opens the library that setup.py made of these sources; raises OSError or ImportError.

    A damaged file is not loaded: it could kill the process.
    """
    path = _FOLDER / f'_kernels{sysconfig.get_config_var("EXT_SUFFIX")}'
    if not path.exists():
        raise ImportError(_why_absent(path))
    content = path.read_bytes()
    sources = b''.join((_FOLDER / name).read_bytes() for name in FILES)
    if hashlib.sha256(content[:-64] + sources).hexdigest().encode() != content[-64:]:
        raise ImportError(f'{path} is damaged or of other sources: install again')
    return ctypes.CDLL(str(path))


def _why_absent(path) -> str:
    log = path.with_suffix('.log')
    failure = log.read_text('utf-8', 'replace').split('\n')[0] if log.exists() else ''
    return f'{failure}; see {log}' if failure else f'there is no {path}: install again'


def _load(library) -> dict:
    """Returns the compiled functions by their names in ``kernels.c``."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    pack = unpack = [size, pointer, pointer, ctypes.c_float, pointer, pointer]
    mean = [size, size, size, pointer, size, pointer, ctypes.c_double, pointer]
    arguments = {
        'rmsprop_warmup_float32': [size, pointer, pointer, pointer],
        'rmsprop_warmup_float64': [size, pointer, pointer, pointer],
        'pack_float32_float32': pack,
        'unpack_float32_float32': unpack,
        'mean_float32_float32': mean,
    }
    if hasattr(library, 'has_float16') and library.has_float16():
        arguments['pack_float32_float16'] = pack
        arguments['unpack_float16_float32'] = unpack
        arguments['widen_float16'] = arguments['add_float16'] = [size, pointer, pointer]
        arguments['mean_float16_float16'] = arguments['mean_float64_float16'] = mean
    functions = {name: getattr(library, name) for name in arguments}
    for name, function in functions.items():
        function.argtypes = arguments[name]
        function.restype = None
    return functions


def _arguments() -> dict:
    """Returns the types of the arguments of the functions in ``functions.c``, by their names."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    integer, real = ctypes.c_int32, ctypes.c_double
    geometry, pool = 11 * [size], 10 * [size]
    return {
        'convolution': [*geometry, *3 * [pointer]],
        'convolution_gx': [*geometry, *3 * [pointer]],
        'convolution_gw': [*geometry, *3 * [pointer]],
        'batch_normalization': [size, size, real, real, *7 * [pointer]],
        'fixed_batch_normalization': [size, size, real, *6 * [pointer]],
        'batch_normalization_gradients': [size, size, *7 * [pointer]],
        'relu': [size, pointer, pointer],
        'relu_gx': [size, pointer, pointer, pointer],
        'max_pooling': [*pool, pointer, pointer, pointer],
        'max_pooling_gx': [size, size, size, pointer, pointer, pointer],
        'sum_pixels': [size, size, size, real, pointer, pointer],
        'spread': [size, size, size, real, pointer, pointer],
        'add_bias': [size, size, pointer, pointer],
        'softmax_cross_entropy': [size, size, integer, real, *5 * [pointer]],
        'softmax_cross_entropy_gx': [size, size, integer, real, *3 * [pointer]],
    }


_OF_MEMORY = {  # they return whether there is too little memory
    'convolution',
    'convolution_gx',
    'convolution_gw',
    'batch_normalization',
    'fixed_batch_normalization',
    'batch_normalization_gradients',
    'sum_pixels',
}


def _check_memory(result, function, _arguments):
    if result:
        raise MemoryError(f'no memory for {function.__name__}')


def _load_functions(library) -> dict:
    """Returns the functions in ``functions.c``, by their names, by the name of an instruction set.

    The sets are the processor's, the fastest first.
    """
    library.instruction_sets.restype = ctypes.c_char_p
    sets: dict = {name: {} for name in library.instruction_sets().decode().split()}
    for name, types in _arguments().items():
        for instruction_set, functions in sets.items():
            function = functions[name] = getattr(library, f'{name}_{instruction_set}')
            function.argtypes, function.restype = types, None
            if name in _OF_MEMORY:
                function.restype, function.errcheck = ctypes.c_int, _check_memory
    return sets


compiled: dict = {}
functions: dict = {}
why_not = ''  # Why both are empty. AttributeError: the library lacks a function.
try:
    _library = _open()
    compiled, functions = _load(_library), _load_functions(_library)
except (OSError, ImportError, AttributeError) as error:
    why_not = str(error)


def description() -> str:
    """Says in one line what runs the loops; without the library, also why."""
    if not compiled:
        return f'NumPy ({why_not})' if why_not else 'NumPy'
    if 'pack_float32_float16' not in compiled:
        return 'compiled C, float16 in NumPy (the processor lacks AVX2 or F16C)'
    return 'compiled C'


def has_fma() -> bool:
    """Whether the processor has fused multiply-adds, without which ``functions.c`` is slow.

    Processors of other kinds than x86-64 are taken to have them.
    """
    return platform.machine() not in ('x86_64', 'AMD64') or 'avx2' in functions


_addressof, _as_buffer = ctypes.addressof, ctypes.c_char.from_buffer
_NAMES = {np.dtype(name): name for name in ('float16', 'float32', 'float64')}


def name_of(dtype) -> str:
    """Returns ``dtype.name``, which takes NumPy microseconds; empty for other dtypes."""
    return _NAMES.get(dtype, '')


def address(array) -> int:
    """Returns where the array's elements begin."""
    try:  # four times as fast, but fails for arrays that are read-only, empty or not packed
        return _addressof(_as_buffer(array))
    except (TypeError, ValueError):
        return array.__array_interface__['data'][0]


def _common_name(arrays) -> str:
    """Returns the name of the arrays' common dtype; empty if their dtypes differ."""
    dtypes = {array.dtype for array in arrays}
    return name_of(dtypes.pop()) if len(dtypes) == 1 else ''


def _table(arrays):
    """Returns the sizes and addresses of several arrays, for a function in C."""
    sizes = np.array([array.size for array in arrays], np.int64)
    return sizes, np.array([address(array) for array in arrays], np.uintp)


def _is_readable(array) -> bool:
    """Whether C can read the array. NumPy's flag ``carray`` says whether C can write it."""
    flags = array.flags
    return flags.c_contiguous and flags.aligned


def _scaled(array, scale, dtype):
    """Returns the product in ``dtype``, or in float32 if ``dtype`` is float16."""
    dtype = np.promote_types(dtype, np.float32)
    return array.astype(dtype, copy=False) * dtype.type(scale)


def _parts(array, sizes):
    """Splits the array into consecutive parts of these sizes."""
    return [array[stop - size : stop] for size, stop in zip(sizes, np.cumsum(sizes))]


def pack(grads, scale, target, counts):
    """Casts ``target[...] = scale * grads`` in one pass, and counts the effects of the cast.

    ``target`` holds the gradients one after the other.

    Args:
        grads (list of arrays): Gradients of any shapes.
        scale (float): A power of two, applied in the dtype of ``grads``, but at least in float32.
        target (array): Contiguous, with as many elements as ``grads``. A float16 beyond 65,504 is
            infinite.
        counts (array): int64 [len(grads), 4], increased for each gradient. The first count is of
            its nonzero elements. The others are of the nonzero, infinite and NaN elements in its
            part of ``target``.
    """
    function = compiled.get(f'pack_{_common_name(grads)}_{name_of(target.dtype)}')
    grads = [grad if _is_readable(grad) else np.array(grad, order='C') for grad in grads]
    if function:
        sizes, addresses = _table(grads)
        tables = address(sizes), address(addresses)
        function(len(grads), *tables, scale, address(target), address(counts))
        return
    for grad, part, count in zip(grads, _parts(target, [grad.size for grad in grads]), counts):
        grad = grad.reshape(-1)
        for start in range(0, grad.size, _BLOCK):
            g, t = grad[start : start + _BLOCK], part[start : start + _BLOCK]
            with np.errstate(over='ignore', invalid='ignore'):
                t[...] = g if scale == 1 else _scaled(g, scale, grad.dtype)
            not_finite = t.size - np.count_nonzero(np.isfinite(t))
            nan = np.count_nonzero(np.isnan(t)) if not_finite else 0
            count += (np.count_nonzero(g), np.count_nonzero(t), not_finite - nan, nan)


def unpack(mean, scale, grads):
    """Computes ``grads[...] = mean / scale`` in one pass.

    ``mean`` holds the gradients one after the other.

    Args:
        mean (array): Contiguous, with as many elements as ``grads``.
        scale (float): A power of two. The division is in the dtype of ``grads``, but at least in
            float32.
        grads (list of arrays): Gradients of any shapes. They can be written.

    Returns:
        array: int64 [len(grads)], the number of infinite or NaN elements in each gradient's part of
            ``mean``.
    """
    function = compiled.get(f'unpack_{name_of(mean.dtype)}_{_common_name(grads)}')
    if function and all(grad.flags.carray for grad in grads):
        sizes, addresses = _table(grads)
        not_finite = np.empty(len(grads), np.int64)
        tables = address(sizes), address(mean), 1 / scale, address(addresses)
        function(len(grads), *tables, address(not_finite))
        return not_finite
    parts = _parts(mean, [grad.size for grad in grads])
    for grad, part in zip(grads, parts):
        with np.errstate(over='ignore', invalid='ignore'):
            part = part.reshape(grad.shape)
            grad[...] = part if scale == 1 else _scaled(part, 1 / scale, grad.dtype)
    return np.array([part.size - np.count_nonzero(np.isfinite(part)) for part in parts], np.int64)


def rmsprop_warmup(arrays, values) -> bool:
    """Updates parameters on the CPU. :class:`~extensions.RMSpropWarmup` states the equations.

    Args:
        arrays (list): Gradient, parameter, m and delta of the first parameter, then of the second,
            and so on. The four have one shape. All are in C order, and all are float32 or all are
            float64. All except the gradients can be written.
        values (list of tuples): The eight hyper-parameters of each parameter.

    Returns:
        bool: Whether the update was done. It is not done for other arrays or without the library.
    """
    function = compiled.get(f'rmsprop_warmup_{_common_name(arrays)}')
    grads, *written = (arrays[i::4] for i in range(4))
    if not function or not all(map(_is_readable, grads)):
        return False
    shapes = [grad.shape for grad in grads]
    for each in written:
        if [array.shape for array in each] != shapes or not all(a.flags.carray for a in each):
            return False
    sizes, addresses = _table(arrays)
    sizes, scalars = sizes[::4].copy(), np.array(values, np.float64)
    function(len(sizes), address(sizes), address(addresses), address(scalars))
    return True


def widen(source, target):
    """Computes ``target[...] = source`` for contiguous arrays. ``target`` is float64."""
    function = compiled.get(f'widen_{name_of(source.dtype)}')
    if function:
        function(source.size, address(source), address(target))
    else:
        target[...] = source


def add(source, target):
    """Computes ``target += source`` for contiguous arrays. ``target`` is float64."""
    function = compiled.get(f'add_{name_of(source.dtype)}')
    if function:
        function(source.size, address(source), address(target))
    else:
        target += source


def mean(rows, n, target, own=None, place=0):
    """Computes ``target[...] = (sum of the rows) / n``.

    The rows are added in their order, in float64. The quotient is rounded once.

    Args:
        rows (array): [k, size], each row contiguous.
        n (int): The divisor.
        target (array): [size], contiguous.
        own (array): One more row, contiguous. It may be ``target``.
        place (int): Index of ``own`` among all rows.
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
