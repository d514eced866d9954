"""Before the first iteration: all ranks run the same program on the same numbers."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import extensions  # isort: skip  (makes Chainer importable on NumPy 2)
from chainer.backends import cuda
from mpi4py import MPI

from reproduce import report
from reproduce.settings import InputError


def items(model) -> dict:
    """What must be the same on all ranks: name to a short text."""
    parameters = hashlib.sha256()
    for name, param in sorted(model.namedparams()):
        parameters.update(name.encode() + cuda.to_cpu(param.data).tobytes())
    threads = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')
    return {
        **report.versions(),
        'code': _code(),
        'BLAS threads': ' '.join(os.environ.get(name, '-') for name in threads),
        'parameters': parameters.hexdigest()[:16],
    }


def _code() -> str:
    """Identifies the sources of this program."""
    digest = hashlib.sha256()
    for package in (extensions, sys.modules['reproduce']):
        for path in sorted(Path(package.__path__[0]).glob('*.[pch]*')):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check(mpi_comm, own: dict, path: str):
    """Compares all ranks; collective.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        own (dict): This rank's :func:`items`.
        path (str): A file that every rank must be able to read.

    Raises:
        InputError: On every rank: ranks and items that differ, or ranks that cannot read the file.
    """
    readable = os.access(path, os.R_OK)
    everyone = mpi_comm.allgather((MPI.Get_processor_name(), own, readable, _processor()))
    blind = [f'rank {r} on {host}' for r, (host, _, sees, _) in enumerate(everyone) if not sees]
    if blind:
        raise InputError(f'{path} cannot be read by {_some(blind)}: is the folder on every host?')
    host, first, _, processor = everyone[0]
    for name in first:
        others = [
            f'rank {rank} on {where} has {theirs.get(name)}'
            for rank, (where, theirs, _, _) in enumerate(everyone)
            if theirs.get(name) != first[name]
        ]
        if others:
            raise InputError(
                f'the ranks differ in {name}: rank 0 on {host} has {first[name]}, {_some(others)}; '
                'install the same on every host'
            )
    differing = sorted({theirs for *_, theirs in everyone} - {processor})
    if differing and mpi_comm.rank == 0:
        print(
            f'note: processors of several kinds ({processor}; {"; ".join(differing)}): with other '
            'processes for the same workers the last bits may differ',
            flush=True,
        )


def _processor() -> str:
    try:
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _some(texts, n=3) -> str:
    more = f' and {len(texts) - n} more' if len(texts) > n else ''
    return ', '.join(texts[:n]) + more
