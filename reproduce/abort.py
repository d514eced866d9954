"""One rank that fails ends all; otherwise the others would wait in a collective for ever."""

from __future__ import annotations

import sys
import traceback

from mpi4py import MPI


def abort(error: BaseException):
    """Prints traceback, rank and host of ``error``, and ends all ranks at once."""
    lines = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
    rank, host = MPI.COMM_WORLD.rank, MPI.Get_processor_name()
    print(f'{lines}error: rank {rank} on {host} failed: {error!r}', file=sys.stderr, flush=True)
    MPI.COMM_WORLD.Abort(1)


def on_uncaught_exception():
    """From now on an uncaught exception aborts, one while importing included.

    Python's own way out would wait for the other ranks in MPI's finalization.
    """
    sys.excepthook = lambda kind, error, trace: abort(error)
