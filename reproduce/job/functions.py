"""The implementation of Chainer's functions that --functions names."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

import numpy as np
from chainer.backends import cuda
from mpi4py import MPI

from extensions import cpu_functions, kernels, replaced_methods
from extensions.communicator_base import first_few
from reproduce.settings import InputError

_CUDNN_WORKSPACE = 1 << 29  # bytes (P)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def resolve(name: str, device) -> str:
    """Returns what ``'auto'`` stands for in this process; every other name as it is.

    Args:
        name (str): The setting ``functions``.
        device (~chainer.backend.Device): Where the model will be.

    Returns:
        str: On a GPU, ``'chainer'``. On a CPU, ``'compiled'``, or ``'numpy'`` where C is absent, or
            would be slow.
    """
    if name != 'auto':
        return name
    if device.xp is not np:
        return 'chainer'
    return 'numpy' if _why_not_compiled() else 'compiled'


def _why_not_compiled() -> str:
    if not kernels.functions:
        return f'{kernels.why_not}; install gcc or clang, then the project again'
    return '' if kernels.has_fma() else 'it has no fused multiply-adds for this processor'


def choose(mpi_comm, name: str, device) -> str:
    """Makes every rank compute by the implementation, the same on all. Collective.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        name (str): The setting ``functions``, the same on all ranks.
        device (~chainer.backend.Device): Where the model will be.

    Returns:
        str: Result of :func:`resolve`.

    Raises:
        InputError: ``'auto'`` is not the same on all ranks. Raised on every rank.
        InputError: As in :func:`use`. Raised on the ranks that it concerns.
    """
    host = MPI.Get_processor_name()
    own = resolve(name, device)
    everyone = mpi_comm.allgather((host, own, _why_not_compiled()))
    if any(theirs != own for _, theirs, _ in everyone):
        lacking = [
            f'rank {rank} on {host} ({reason})'
            for rank, (host, _, reason) in enumerate(everyone)
            if reason
        ]
        raise InputError(
            '--functions auto: some ranks would compute by the compiled library, but not '
            f'{first_few(lacking)}; or give --functions numpy'
        )
    try:
        use(own, device)
    except InputError as error:
        raise InputError(f'rank {mpi_comm.rank} on {host}: {error}') from None
    return own


def find(name: str):
    """Imports the implementation; ``'chainer'`` and ``'auto'`` need none.

    Args:
        name (str): The setting ``functions``.

    Returns:
        module: The module of extensions/ that has it; None for Chainer's own.

    Raises:
        InputError: A package cannot be imported, or there is no compiled library.
    """
    if name in ('auto', 'chainer'):
        return None
    if name == 'compiled' and not kernels.functions:
        raise InputError(
            f'--functions compiled: {sys.executable} has no compiled library '
            f'({_why_not_compiled()}), or take --functions numpy'
        )
    if name in ('compiled', 'numpy'):
        return cpu_functions
    try:
        from extensions import torch_functions
    except (ImportError, OSError) as error:  # OSError: a library that Torch loads
        reason = ' '.join(str(error).split())
        raise InputError(
            f'--functions {name}: {sys.executable} cannot import PyTorch: {reason}; install it, '
            'as hostfiles/README.md shows, or take --functions chainer'
        ) from error
    return torch_functions


def use(name: str, device):
    """Makes this process compute by the implementation, on a device, and by no other.

    Args:
        name (str): The setting ``functions``, but not ``'auto'``.
        device (~chainer.backend.Device): Where the model will be.

    Raises:
        InputError: The implementation cannot be imported, or cannot compute on the device.
    """
    if device.xp is np:
        _keep_freed_memory()
        _keep_subnormal_numbers()
    replaced_methods.undo()
    module = find(name)
    if module is None:
        # Chainer's 8 MiB keep cuDNN from its fast algorithms; chainer.config.autotune stays off,
        # as an algorithm found by timing, and its bits, may differ between runs.
        if cuda.cudnn_enabled and device.xp is cuda.cupy:
            cuda.set_max_workspace_size(_CUDNN_WORKSPACE)
        return
    if module is cpu_functions:
        if device.xp is not np:
            raise InputError(
                f'--functions {name}: they run on CPUs, not on {device.name}; take --functions '
                'chainer or torch'
            )
        module.enable(name)
        return
    try:
        module.enable(device)
    except module.UnusableTorchError as error:
        raise InputError(
            f'--functions {name}: {error}; install a PyTorch for this device, or take '
            '--functions chainer'
        ) from error


def _keep_freed_memory():
    """Makes glibc keep what is freed. Else each iteration gets its arrays' pages anew from Linux.

    See "Forward and backward on CPUs" in reproduce/results/README.md.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_M_TRIM_THRESHOLD, -1)
    mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(
        _M_MMAP_THRESHOLD, 1 << 25
    )  # what old ones allow


def _keep_subnormal_numbers():
    """Undoes what libraries compiled with -ffast-math set when they are loaded: they flush to 0."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).fesetenv(ctypes.c_void_p(-1))  # FE_DFL_ENV


def description(name: str, device) -> str:
    """Returns the implementation with its version, after :func:`use`."""
    module = find(name)
    if name == 'numpy':
        reason = _why_not_compiled()
        return module.description() + (
            f', since {reason}; the bits are not those of compiled C' if reason else ''
        )
    if module is not None:
        slow = name == 'compiled' and not kernels.has_fma()
        return module.description() + (', slow without fused multiply-adds' if slow else '')
    if device.xp is not cuda.cupy:
        return "Chainer's own"
    products = 'TF32' if os.environ.get('NVIDIA_TF32_OVERRIDE') == '1' else 'float32'
    cudnn = '' if cuda.cudnn_enabled else ', no cuDNN (--functions torch brings its own)'
    return f"Chainer's own, {products}{cudnn}"
