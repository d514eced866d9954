"""Prepares a program that mpiexec runs, before the program imports MPI.

This module must import neither NumPy nor other packages that have to be installed.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import importlib.util
import os
import resource
import sys
import tempfile
import termios
import time
import traceback

from reproduce.job import janitor, mpi_library

# Names of a launcher and of its variables: the number of processes, and the number of this one. A
# launcher that Slurm's srun has started comes before srun.
_MPIEXEC = 'start with ./run_mpi.sh, which has its own mpiexec; MPIEXEC= sets another, and its MPI'
_SRUN = 'start with LAUNCHER=srun ./run_mpi.sh, or give srun --mpi=pmix, or --mpi=pmi2 for MPICH'
_LAUNCHERS = (
    ("Open MPI's mpiexec", 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK', _MPIEXEC),
    ("MPICH's mpiexec", 'PMI_SIZE', 'PMI_RANK', _MPIEXEC),
    ('srun', 'SLURM_STEP_NUM_TASKS', 'SLURM_PROCID', _SRUN),
)

_MOST_FILES = 1 << 16  # some programs close every file that they might have
_OWN_FILES = 64  # files of a rank that are not connections to other ranks, roughly


def before_mpi():
    """Starts this rank's helpers. From then on, an uncaught error ends all ranks.

    Call this function before anything imports ``mpi4py.MPI``: a process that is forked after MPI
    has opened InfiniBand can crash or hang. Call it before anything imports Chainer, too: an import
    can fail on one host alone. Python would then exit, and wait for the other ranks in MPI's
    finalization.

    Raises:
        SystemExit: A package is not installed, or MPI does not load. The message is one line.
    """
    _raise_file_limit()
    os.environ.setdefault('NVIDIA_TF32_OVERRIDE', '0')  # the paper's products are float32's
    os.environ.pop('CHAINER_DTYPE', None)  # the model's dtype; the paper's is Chainer's default
    if not os.environ.get('HOME'):  # Open MPI does not start without
        home = os.path.expanduser('~')
        os.environ['HOME'] = home if home.startswith('/') else tempfile.gettempdir()
    try:
        for name in ('chainer', 'matplotlib'):  # which are imported after MPI
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(name=name)
        from reproduce import loader

        loader.start_forkserver(janitor.remove_after_end)
        import mpi4py.MPI  # now, so that an error in a later import can end the job
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        what = f'has a package that fails: {" ".join(str(error).split())}'
        if isinstance(error, ModuleNotFoundError):
            what = f'has no package {error.name!r}'
        sys.exit(
            f'error: {sys.executable or "this Python"} {what}: start with ./run_mpi.sh, which '
            'installs everything, or install by hand (hostfiles/README.md)'
        )
    sys.excepthook = lambda kind, error, trace: abort(error)
    _refuse_jobs_of_one_rank()
    lack = lack_of_files(mpi4py.MPI.COMM_WORLD.size)
    if lack and mpi4py.MPI.COMM_WORLD.rank == 0:
        print(f'note: {lack}', file=sys.stderr, flush=True)


def _raise_file_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, _MOST_FILES) if hard != resource.RLIM_INFINITY else _MOST_FILES
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def lack_of_files(n_ranks: int) -> str:
    """Returns what is wrong if this rank cannot open a connection to each rank, else nothing.

    Open MPI connects the ranks by TCP where there is nothing better. A rank that may open no more
    files waits for ever, without a word.

    Args:
        n_ranks (int): Number of ranks.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= n_ranks + _OWN_FILES:
        return ''
    return (
        f'a rank may open {soft:,} files, but {n_ranks:,} ranks need {n_ranks + _OWN_FILES:,} if '
        'they are connected by TCP: raise the hard limit (ulimit -Hn, limits.conf) on every host'
    )


def _refuse_jobs_of_one_rank():
    """Ends this rank if its launcher has started several ranks, but MPI finds only this one."""
    from mpi4py import MPI

    launcher = next((names for names in _LAUNCHERS if names[1] in os.environ), None)
    # The shell of "srun --pty" has the variables of a rank.
    if launcher is None or MPI.COMM_WORLD.size > 1 or 'SLURM_PTY_PORT' in os.environ:
        return
    name, size, rank, remedy = launcher
    if os.environ[size] == '1':
        return
    if os.environ.get(rank) != '0':
        time.sleep(5)  # rank 0 says it; most launchers then end the others
    else:
        library = mpi_library(MPI.Get_library_version())
        print(
            f'error: {name} started {os.environ[size]} processes, but the MPI of this Python '
            f'({library}) sees {os.environ[size]} jobs of one process: {remedy}',
            file=sys.stderr,
            flush=True,
        )
    sys.exit(2)


def abort(error: BaseException):
    """Prints the traceback of ``error``, the rank and the host, and ends all ranks at once."""
    from mpi4py import MPI

    lines = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
    rank, host = MPI.COMM_WORLD.rank, MPI.Get_processor_name()
    print_before_abort(f'{lines}error: rank {rank} on {host} failed: {error!r}')
    MPI.COMM_WORLD.Abort(1)


def print_before_abort(text: str):
    """Prints to standard error, and waits until the launcher has read it, but not for ever.

    Open MPI's own words about an abort would often come first. They end with a byte of zero, after
    which the text would not begin a line.
    """
    print(text, file=sys.stderr, flush=True)
    unread = array.array('i', [0])
    deadline = time.monotonic() + 1
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            fcntl.ioctl(2, termios.FIONREAD, unread)
            if not unread[0]:
                break
            time.sleep(0.001)
