"""Checks, before the first iteration, that all ranks run one program on the same numbers."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from pathlib import Path

import extensions  # isort: skip  (makes Chainer importable on NumPy 2)
import numpy as np
from chainer.backends import cuda
from mpi4py import MPI

from extensions import kernels
from extensions.communicator_base import first_few
from reproduce.job import BLAS_THREADS, report
from reproduce.settings import InputError

_REMEDIES = {
    'options': 'start every rank with the same options',
    'images': 'copy the same folder to every host',
    'BLAS threads': f'set the same values of {", ".join(BLAS_THREADS)} on every host',
    'parameters': "every rank received rank 0's values, so memory or network is at fault",
}


def items(model, settings, arguments, images) -> dict:
    """Returns everything that all ranks must share.

    Args:
        model (~chainer.Link): The model, before the first iteration.
        settings (~reproduce.settings.Settings): The settings that this rank has received.
        arguments (list of str): This rank's own command line.
        images (dict): Result of :func:`sample`.

    Returns:
        dict: {name: short text}.
    """
    parameters = hashlib.sha256()
    for name, param in sorted(model.namedparams()):
        parameters.update(name.encode() + cuda.to_cpu(param.data).tobytes())
    return {
        **of_host(),
        'options': shlex.join(map(str, arguments)) or 'none',
        'settings': _short(repr(settings).encode()),
        'images': _short(repr(images).encode()),
        'parameters': parameters.hexdigest()[:16],
    }


def of_host() -> dict:
    """Returns everything that all hosts must share in any run, as {name: short text}."""
    return {
        **report.versions(),
        'code': _code(),
        'TF32': 'on' if os.environ.get('NVIDIA_TF32_OVERRIDE') == '1' else 'off',
        'BLAS threads': ' '.join(os.environ.get(name, '-') for name in BLAS_THREADS),
    }


def sample(*folders, n=32) -> dict:
    """Returns the sizes of ``n`` images of each folder, as this host sees them.

    A host that has its own copy of the images may see other sizes.

    Args:
        *folders (ImageFolder): The image folders.
        n (int): Number of images per folder.

    Returns:
        dict: {path: size in bytes}; None instead of the size if the file cannot be read.
    """
    paths = [
        folder.path(int(i)) for folder in folders for i in np.linspace(0, len(folder.labels) - 1, n)
    ]
    return {
        path: os.path.getsize(path) if os.access(path, os.R_OK) else None for path in sorted(paths)
    }


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _code() -> str:
    """Returns a hash of this program's sources."""
    digest = hashlib.sha256()
    for package in (extensions, sys.modules['reproduce']):
        folder = Path(package.__path__[0])
        for path in sorted(_sources(folder)):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _sources(folder):
    for parent, folders, files in os.walk(folder):
        # On a network file system, each of 1,024 ranks would ask for the logs in results, too.
        folders[:] = [name for name in folders if name not in ('results', 'data', '__pycache__')]
        yield from (
            Path(parent, name) for name in files if name.endswith(('.py', '.c', '.h', '.cu'))
        )


def check(mpi_comm, own: dict, images: dict, functions: str):
    """Checks that all ranks agree. Collective.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        own (dict): Result of :func:`items` on this rank.
        images (dict): Result of :func:`sample`. Every rank must be able to read these images.
        functions (str): The setting ``functions``, but not ``'auto'``.

    Raises:
        InputError: Ranks differ or cannot read an image. Raised on every rank, with the names of
            these ranks.
    """
    unreadable = next((path for path, size in images.items() if size is None), None)
    everyone = mpi_comm.allgather(
        (MPI.Get_processor_name(), own, unreadable, _processor(functions))
    )
    blind = [f'rank {r} on {host}' for r, (host, _, path, _) in enumerate(everyone) if path]
    if blind:
        path = next(path for _, _, path, _ in everyone if path)
        raise InputError(
            f'{path} cannot be read by {first_few(blind)}: copy the folder to every host, or, if '
            'the image was removed, delete the list that names it, in the folder of --manifests'
        )
    host, first, _, processor = everyone[0]
    for name in first:
        others = [
            f'rank {rank} on {where} has {theirs.get(name)}'
            for rank, (where, theirs, _, _) in enumerate(everyone)
            if theirs.get(name) != first[name]
        ]
        if others:
            remedy = _REMEDIES.get(name, 'install the same version on every host')
            raise InputError(
                f'the ranks differ in {name}: rank 0 on {host} has {first[name]}, '
                f'{first_few(others)}; {remedy}'
            )
    differing = sorted({theirs for *_, theirs in everyone} - {processor})
    if differing and mpi_comm.rank == 0:
        print(
            f'note: processors of several kinds ({processor}; {"; ".join(differing)}): the last '
            'bits may depend on which processes play which workers',
            flush=True,
        )


def _processor(functions) -> str:
    """Describes what a result's last bits depend on, as far as the processor matters.

    Beside compiled functions that is little: see "Functions on CPUs" in extensions/README.md.
    """
    if functions == 'compiled':
        return platform.machine() + (' with FMA' if kernels.has_fma() else ' without FMA')
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
