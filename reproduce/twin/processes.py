"""Makes the processes that torchrun or mpiexec started one job of torch.distributed."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import importlib.util
import os
import socket
import sys
import time
import traceback

from reproduce.job import janitor, start

_NEVER = 365 * 86400  # seconds; torch.distributed needs some limit


def before_mpi():
    """Starts the server that forks image loaders; then, unless torchrun started this, MPI.

    Limits PyTorch to one thread, unless the environment says otherwise.

    Call it before anything imports ``mpi4py.MPI`` or PyTorch.

    Raises:
        SystemExit: A package is not installed. The message is one line.
    """
    if importlib.util.find_spec('torch') is None:
        sys.exit(
            f'error: {sys.executable} has no package torch: start with EXTRAS=twin ./run_mpi.sh, '
            'or install it by hand (hostfiles/README.md)'
        )
    # Another number would change the bits. MKL_NUM_THREADS would count more than a number set here.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    if not _by_torchrun():
        start.before_mpi()
        return
    import mpi4py

    mpi4py.rc.initialize = False  # MPI, which other modules import, stays unused
    os.environ.setdefault('NVIDIA_TF32_OVERRIDE', '0')  # as start.before_mpi() does
    from reproduce import loader

    loader.start_forkserver(janitor.remove_after_end)


def init_process_group(*words, **options):
    """Calls torch.distributed's function of this name so that the group does not outlive its job.

    Gloo's threads free tensors. One that does so while the interpreter ends aborts the process,
    after all its work is done ("terminate called without an active exception"). The threads end
    with the last reference to the group. Two would remain: the functions of
    torch.distributed.nn.functional, which an optimizer imports, have as their default the group
    of the time of the import; and DistributedDataParallel may be in a cycle.
    """
    import torch.distributed.nn.functional  # before there is a group

    torch.distributed.init_process_group(*words, **options)
    atexit.register(gc.collect)


class TogetherError(Exception):
    """An error that all processes find at the same place."""


class Processes:
    """All processes of the job.

    To reproduce/job/supervise.py this is an MPI communicator and a watchdog. The watchdog is the
    limit on the time of an exchange.

    Args:
        seconds (float): An exchange that takes longer ends the job. 0: never.

    Attributes:
        rank, size (int): Number of this process, and of all.
        device (torch.device): This process's GPU; without GPUs, the CPU.
    """

    def __init__(self, seconds):
        import torch
        import torch.distributed as dist

        self._dist = dist
        options: dict = {'timeout': datetime.timedelta(seconds=seconds or _NEVER)}
        local_rank = int(os.environ.get('LOCAL_RANK', '0'))
        if not _by_torchrun():
            local_rank, options['rank'], options['world_size'], place = _by_mpi()
            is_first = options['rank'] == 0
            if is_first:  # on a port that the system chooses
                store = dist.TCPStore(place, 0, options['world_size'], True, wait_for_workers=False)
            place = _bcast((place, store.port) if is_first else None)
            options['store'] = store if is_first else dist.TCPStore(*place, is_master=False)
        self.device = torch.device('cpu')
        if torch.cuda.is_available():
            self.device = torch.device('cuda', local_rank)
            torch.cuda.set_device(self.device)
        on_cpu = self.device.type == 'cpu'
        init_process_group('gloo' if on_cpu else 'cpu:gloo,cuda:nccl', **options)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def allgather(self, value):
        """Returns the values of all processes."""
        values = [None] * self.size
        self._dist.all_gather_object(values, value)
        return values

    def bcast(self, value):
        """Returns the value of rank 0."""
        values = [value]
        self._dist.broadcast_object_list(values)
        return values[0]

    def part(self, name, position=None):
        return contextlib.nullcontext()

    def enter(self, position):
        pass

    def close(self):
        """Leaves the job, after all have come here."""
        self._dist.barrier()
        self._dist.destroy_process_group()


def _by_torchrun() -> bool:
    return 'TORCHELASTIC_RUN_ID' in os.environ


def _by_mpi():
    """Returns the rank on this host, rank and number of processes, and rank 0's address."""
    from mpi4py import MPI

    mpi = MPI.COMM_WORLD
    hosts = mpi.allgather(socket.gethostname())
    place = 'localhost' if len(set(hosts)) == 1 else hosts[0]
    return hosts[: mpi.rank].count(hosts[mpi.rank]), mpi.rank, mpi.size, place


def _bcast(value):
    from mpi4py import MPI

    return MPI.COMM_WORLD.bcast(value)


def run(main):
    """Runs ``main()``. An exception on any process ends all.

    The process that fails prints its traceback, its rank and its host, and ends at once. torchrun
    and mpiexec then end the others; these find the connection closed, too.

    Args:
        main (callable): The program of a process, without arguments.
    """
    try:
        main()
    except SystemExit as error:
        if not getattr(error, 'agreed', False):
            _fail(error)
        raise
    except TogetherError as error:
        if _rank() == '0':
            print(f'error: {error}', file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # the launcher ends all when one has ended
        os._exit(1)
    except BaseException as error:  # noqa: BLE001  (the others must not wait)
        _fail(error)


def _rank() -> str:
    return os.environ.get('RANK') or os.environ.get('OMPI_COMM_WORLD_RANK', '0')


def _fail(error):
    lines = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
    with contextlib.suppress(OSError):
        print(
            f'{lines}error: rank {_rank()} on {socket.gethostname()} failed: {error!r}',
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)  # not sys.exit, which would wait for the others
