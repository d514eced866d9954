"""Makes Chainer 7.8.1 (2022) use the CuPy and the CUDA of today. Import this module before Chainer.

CuPy looks for CUDA's libraries in the system, not in the folders where NVIDIA's wheels put them.
This module loads them from there. CuPy 14 moved the type ``half`` into a header that ChainerMN's
kernels do not include: :func:`mend_kernels` names this header in their source.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from pathlib import Path

# Each after those that it needs. NVRTC opens its builtins by name, when it compiles.
_LIBRARIES = (
    *('cudart', 'nvJitLink', 'cublasLt', 'cublas', 'nvrtc-builtins', 'nvrtc'),
    *('cufft', 'curand', 'cusparse', 'cusolver', 'nccl', 'cudnn'),
)


def load_libraries_of_wheels() -> list[str]:
    """Loads CUDA's libraries that pip has installed, if there is a CuPy to use them.

    Returns:
        list of str: The paths of the loaded files. CuPy itself says what is missing.
    """
    spec = importlib.util.find_spec('nvidia') if has_cupy() else None
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    loaded = []
    for name in _LIBRARIES:
        for path in [path for root in roots for path in root.glob(f'*/lib/lib{name}.so.*')]:
            try:
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
                loaded.append(str(path))
            except OSError:
                pass
    return loaded


def mend_kernels():
    """Makes ChainerMN's kernels compile with CuPy 14. Call it after the import of Chainer."""
    from chainer.backends import cuda

    if not cuda.available or int(cuda.cupy.__version__.split('.')[0]) < 14:
        return
    raw = cuda.raw

    def with_half(code, name, *args, **kwargs):
        return raw(code.replace('<cupy/carray.cuh>', '<cuda_fp16.h>'), name, *args, **kwargs)

    cuda.raw = with_half


def has_cupy() -> bool:
    """Returns whether a CuPy is installed. It may fail to import."""
    return importlib.util.find_spec('cupy') is not None


def count_gpus() -> int:
    """Returns how many NVIDIA GPUs this host shows this process."""
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    n = len(list(Path('/dev').glob('nvidia[0-9]*')))
    if hidden():
        return 0
    return min(n, len(visible.split(','))) if visible else n


def hidden() -> str:
    """Returns the setting with which the user hides all GPUs from CUDA; empty without one."""
    value = os.environ.get('CUDA_VISIBLE_DEVICES')
    return f'CUDA_VISIBLE_DEVICES={value}' if value in ('', '-1', 'NoDevFiles') else ''


load_libraries_of_wheels()
# Each rank would print it, and with CuPy 14 nothing helps. A run's header tells cuDNN's version.
warnings.filterwarnings('ignore', 'cuDNN is not enabled', UserWarning)
