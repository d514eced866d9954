"""Prepares a program that mpiexec runs, before the program imports MPI."""

from __future__ import annotations

import sys
import traceback

from reproduce import loader
from reproduce.job import janitor


def before_mpi():
    """Starts this rank's helpers. From then on, an uncaught error ends all ranks.

    Call this function before anything imports ``mpi4py.MPI``: a process that is forked after MPI
    has opened InfiniBand can crash or hang. Call it before anything imports Chainer, too: an import
    can fail on one host alone. Python would then exit, and wait for the other ranks in MPI's
    finalization.
    """
    loader.start_forkserver(janitor.remove_after_end)
    import mpi4py.MPI  # noqa: F401  (now, so that an error in a later import can end the job)

    sys.excepthook = lambda kind, error, trace: abort(error)


def abort(error: BaseException):
    """Prints the traceback of ``error``, the rank and the host, and ends all ranks at once."""
    from mpi4py import MPI

    lines = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
    rank, host = MPI.COMM_WORLD.rank, MPI.Get_processor_name()
    print(f'{lines}error: rank {rank} on {host} failed: {error!r}', file=sys.stderr, flush=True)
    MPI.COMM_WORLD.Abort(1)
