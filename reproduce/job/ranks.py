"""Makes many ranks one job: they agree on errors before training starts, and stop together."""

from __future__ import annotations

import contextlib
import sys

import numpy as np
from mpi4py import MPI

from extensions import CheckpointError, CommunicatorError, NonFiniteGradients, Stopped
from reproduce.job import launch
from reproduce.job.start import abort
from reproduce.listing import DataError, print_any_name
from reproduce.settings import InputError

_PART = 1 << 30  # bytes that are sent at a time: MPI counts to 2**31
_USER_ERRORS = (InputError, DataError, CommunicatorError, CheckpointError)


class AgreedExit(SystemExit):
    """An exit that all ranks take together, so that no rank waits for another."""

    agreed = True


def on_every_rank(mpi_comm, function, part=None):
    """Runs ``function`` on every rank. An error on any rank ends all ranks.

    One line on the terminal names the error. The exit status is 2.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        function (callable): Takes no arguments. A function that communicates must raise on all
            ranks or on none.
        part (context manager): Encloses the function: the Watchdog's
            :meth:`~reproduce.job.watchdog.Watchdog.part`.

    Returns:
        The result of ``function`` on this rank.

    Raises:
        AgreedExit: On every rank, if ``function`` raised InputError, DataError, CommunicatorError,
            CheckpointError or SystemExit on any rank. SystemExit keeps its own exit status.
    """
    result, ending = None, None
    try:
        with part or contextlib.nullcontext():
            result = function()
    except _USER_ERRORS as error:
        ending = (2, f'error: {error}')
    except SystemExit as end:
        ending = (end.code or 0, None)
    endings = mpi_comm.allgather(ending)
    for rank, ending in enumerate(endings):
        if ending:
            status, message = ending
            if message and rank == mpi_comm.rank:
                print(message, file=sys.stderr, flush=True)
            raise AgreedExit(status)
    return result


def on_rank_zero(mpi_comm, function, part=None):
    """Runs ``function`` on rank 0 alone. Every rank gets the result, or AgreedExit."""
    result = on_every_rank(mpi_comm, function if mpi_comm.rank == 0 else lambda: None, part)
    return mpi_comm.bcast(result)


def bcast_arrays(mpi_comm, arrays):
    """Sends rank 0's arrays to all ranks, one by one: ``bcast`` would need twice their memory.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        arrays (dict): Arrays by name, on rank 0. Those of dtype object are None.

    Returns:
        dict: The same on all ranks.
    """
    kinds = [(name, array.shape, array.dtype) for name, array in (arrays or {}).items()]
    result = {}
    for name, shape, dtype in mpi_comm.bcast(kinds):
        if dtype == object:
            result[name] = np.array(None)
            continue
        array = np.ascontiguousarray(arrays[name]) if mpi_comm.rank == 0 else np.empty(shape, dtype)
        octets = array.reshape(-1).view(np.uint8)
        for start in range(0, octets.size, _PART):
            mpi_comm.Bcast(octets[start : start + _PART])
        result[name] = array.reshape(shape)
    return result


def run(main):
    """Runs ``main()``. An exception on any rank ends all ranks at once.

    The rank that fails prints its traceback, its rank and its host. Without this function, the
    other ranks would wait in their next collective for ever. This also holds for a ``sys.exit`` on
    one rank, which would wait for the others in MPI's finalization.

    Args:
        main (callable): The program of a rank, without arguments.
    """
    print_any_name()
    try:
        main()
    except AgreedExit:
        raise
    except (NonFiniteGradients, Stopped) as error:  # all ranks raise these together
        stopped = isinstance(error, Stopped)
        if MPI.COMM_WORLD.rank == 0:
            line = (
                f'{error}. To go on: {launch.command_to_go_on(n_processes=MPI.COMM_WORLD.size)}'
                if stopped
                else f'error: {error}'
            )
            print(line, file=sys.stderr, flush=True)
        raise AgreedExit(128 + error.signum if stopped else 1) from None
    except BaseException as error:
        abort(error)
        raise
