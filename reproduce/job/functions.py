"""The implementation of Chainer's functions that --functions names."""

from __future__ import annotations

import os
import sys

import numpy as np
from chainer.backends import cuda

from extensions import cpu_functions, kernels
from reproduce.settings import InputError

_CUDNN_WORKSPACE = 1 << 29  # bytes (P)


def find(name: str):
    """Imports the implementation; ``'chainer'`` needs none.

    Args:
        name (str): The setting ``functions``.

    Returns:
        module: The module of extensions/ that has it; None for Chainer's own.

    Raises:
        InputError: A package cannot be imported, or there is no compiled library.
    """
    if name == 'chainer':
        return None
    if name == 'compiled':
        if not kernels.functions:
            raise InputError(
                f'--functions compiled: {sys.executable} runs {kernels.description()}; install gcc '
                'or clang, then the project again, or take --functions chainer'
            )
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
    """Makes this process compute by the implementation, on a device.

    Args:
        name (str): The setting ``functions``.
        device (~chainer.backend.Device): Where the model will be.

    Raises:
        InputError: The implementation cannot be imported, or cannot compute on the device.
    """
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
                f'--functions compiled: they run on CPUs, not on {device.name}; take --functions '
                'chainer or torch'
            )
        module.enable()
        return
    try:
        module.enable(device)
    except module.UnusableTorchError as error:
        raise InputError(
            f'--functions {name}: {error}; install a PyTorch for this device, or take '
            '--functions chainer'
        ) from error


def description(name: str, device) -> str:
    """Returns the implementation with its version, after :func:`use`."""
    module = find(name)
    if module is not None:
        return module.description()
    if device.xp is not cuda.cupy:
        return "Chainer's own"
    products = 'TF32' if os.environ.get('NVIDIA_TF32_OVERRIDE') == '1' else 'float32'
    cudnn = '' if cuda.cudnn_enabled else ', no cuDNN (--functions torch brings its own)'
    return f"Chainer's own, {products}{cudnn}"
