"""Makes many ranks one job: they agree on errors before training starts, and stop together."""

from __future__ import annotations

import sys

from mpi4py import MPI

from extensions import CheckpointError, CommunicatorError, NonFiniteGradients, Stopped
from reproduce.job.start import abort
from reproduce.listing import DataError, print_any_name
from reproduce.settings import InputError

_USER_ERRORS = (InputError, DataError, CommunicatorError, CheckpointError)


class AgreedExit(SystemExit):
    """An exit that all ranks take together, so that no rank waits for another."""

    agreed = True


def on_every_rank(mpi_comm, function):
    """Runs ``function`` on every rank. An error on any rank ends all ranks.

    One line on the terminal names the error. The exit status is 2.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        function (callable): Takes no arguments. A function that communicates must raise on all
            ranks or on none.

    Returns:
        The result of ``function`` on this rank.

    Raises:
        AgreedExit: On every rank, if ``function`` raised InputError, DataError, CommunicatorError,
            CheckpointError or SystemExit on any rank. SystemExit keeps its own exit status.
    """
    result, ending = None, None
    try:
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


def on_rank_zero(mpi_comm, function):
    """Runs ``function`` on rank 0 alone. Every rank gets the result, or AgreedExit."""
    result = on_every_rank(mpi_comm, function if mpi_comm.rank == 0 else lambda: None)
    return mpi_comm.bcast(result)


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
        if MPI.COMM_WORLD.rank == 0:
            print(f'error: {error}', file=sys.stderr, flush=True)
        raise AgreedExit(128 + error.signum if isinstance(error, Stopped) else 1) from None
    except BaseException as error:
        abort(error)
        raise
