"""The update of all parameters on a GPU in one launch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from chainer.backends import cuda

# A fused multiply-add would round once where the CPU and NumPy round twice.
OPTIONS = ('--fmad=false',)

THREADS = 256  # of a block
CHUNK = 8 * THREADS  # elements of a block

_FOLDER = Path(__file__).parent
_TYPES = {np.dtype(np.float32): 'float', np.dtype(np.float64): 'double'}


def source(dtype) -> str:
    """Returns the CUDA C of the kernel ``rmsprop_warmup_all`` for parameters of a dtype."""
    text = (_FOLDER / 'rmsprop_warmup.cu').read_text()
    element = 'rmsprop_warmup_element.h'
    text = text.replace(f'#include "{element}"', (_FOLDER / element).read_text())
    return f'typedef {_TYPES[np.dtype(dtype)]} T;\n#define CHUNK {CHUNK}\n{text}'


_sources = {dtype: source(dtype) for dtype in _TYPES}


def update(arrays, values) -> bool:
    """Updates parameters on the GPU. :class:`~extensions.RMSpropWarmup` states the equations.

    Everything runs on the current stream, and the host waits for nothing.

    Args:
        arrays (list of cupy.ndarray): Gradient, parameter, m and delta of the first parameter, then
            of the second, and so on. The four have one shape. All are in C order, on one device,
            and all are float32 or all are float64. No array is written for two parameters.
        values (list of tuples): The eight hyper-parameters of each parameter.

    Returns:
        bool: Whether the update was done. It is not done for other arrays.
    """
    dtypes = {array.dtype for array in arrays}
    devices = {array.device.id for array in arrays}
    grads, *written = (arrays[i::4] for i in range(4))
    shapes = [grad.shape for grad in grads]
    if (
        len(devices) != 1
        or len(dtypes) != 1
        or not dtypes <= _TYPES.keys()
        or any([array.shape for array in each] != shapes for each in written)
        or not all(array.flags.c_contiguous for array in arrays)
    ):
        return False
    dtype = dtypes.pop()
    rows, n_blocks = _table(arrays, values, dtype)
    if len(np.unique(rows['arrays'][:, 1:])) != 3 * len(rows):
        return False
    if n_blocks:
        with cuda.Device(devices.pop()):
            # CuPy copies the table from pinned memory that it keeps until the copy is done.
            table = cuda.cupy.asarray(rows.view(np.uint8))
            kernel = cuda.raw(_sources[dtype], 'rmsprop_warmup_all', OPTIONS)
            kernel((n_blocks,), (THREADS,), (table, np.int32(len(rows))))
    return True


def _table(arrays, values, dtype):
    """Returns the rows of the parameters that have elements, and the number of blocks."""
    row = [('arrays', 'u8', 4), ('size', 'i8'), ('first_block', 'i8'), ('values', dtype, 8)]
    rows = np.empty(len(values), row)  # the struct in rmsprop_warmup.cu
    rows['arrays'] = np.array([array.data.ptr for array in arrays], np.uint64).reshape(-1, 4)
    rows['size'] = [array.size for array in arrays[::4]]
    rows['values'] = values
    rows = rows[rows['size'] > 0]
    ends = np.cumsum(-(-rows['size'] // CHUNK))
    rows['first_block'][1:] = ends[:-1]
    rows['first_block'][:1] = 0
    return rows, int(ends[-1]) if len(rows) else 0
