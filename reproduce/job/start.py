"""The start of every program that mpiexec runs, before it imports MPI."""

from __future__ import annotations

import sys
import traceback

from reproduce import loader
from reproduce.job import janitor


def before_mpi():
    """Starts this rank's helpers. From now on an uncaught error ends all ranks.

    Call it before anything imports ``mpi4py.MPI``: a process that is forked after MPI has opened
    InfiniBand can crash or hang. Call it before Chainer is imported, too: an import can fail on one
    host alone, and Python's own way out would wait for the other ranks in MPI's finalization.
    """
    loader.start_forkserver(janitor.remove_after_end)
    import mpi4py.MPI  # noqa: F401  (now, so that an error of the other imports can end the job)

    sys.excepthook = lambda kind, error, trace: abort(error)


def abort(error: BaseException):
    """Prints traceback, rank and host of ``error``, and ends all ranks at once."""
    from mpi4py import MPI

    lines = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
    rank, host = MPI.COMM_WORLD.rank, MPI.Get_processor_name()
    print(f'{lines}error: rank {rank} on {host} failed: {error!r}', file=sys.stderr, flush=True)
    MPI.COMM_WORLD.Abort(1)
