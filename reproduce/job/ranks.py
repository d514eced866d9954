"""What makes many ranks one job: they agree on errors before the start, and fall together."""

from __future__ import annotations

import sys

from mpi4py import MPI

from extensions import CheckpointError, CommunicatorError, NonFiniteGradients, Stopped
from reproduce.dataset import InputError
from reproduce.job.start import abort
from reproduce.listing import DataError, print_any_name

_USER_ERRORS = (InputError, DataError, CommunicatorError, CheckpointError)


class AgreedExit(SystemExit):
    """All ranks leave together, so that nobody waits for anybody."""

    agreed = True


def on_every_rank(mpi_comm, function):
    """Runs ``function`` on every rank. What it raises on any of them ends all: one line on the
    terminal, exit status 2.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        function (callable): If it communicates, it must raise on all ranks or on none.

    Returns:
        What ``function`` returned on this rank.

    Raises:
        AgreedExit: On every rank, if it raised an error of the user's, or SystemExit, on any.
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
    """Runs ``function`` on rank 0 alone; its result and its errors are every rank's."""
    result = on_every_rank(mpi_comm, function if mpi_comm.rank == 0 else lambda: None)
    return mpi_comm.bcast(result)


def run(main):
    """Runs ``main()``. Whatever ends it early on any rank prints rank, host and traceback, and ends
    all ranks at once.

    Without it the other ranks would wait in their next collective for ever; also after a
    ``sys.exit`` on one rank, which would itself wait for them in MPI's finalization.
    """
    print_any_name()
    try:
        main()
    except AgreedExit:
        raise
    except (NonFiniteGradients, Stopped) as error:  # which all ranks raise together
        if MPI.COMM_WORLD.rank == 0:
            print(f'error: {error}', file=sys.stderr, flush=True)
        raise AgreedExit(128 + error.signum if isinstance(error, Stopped) else 1) from None
    except BaseException as error:
        abort(error)
        raise
