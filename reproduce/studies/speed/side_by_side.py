"""Times functions side by side, and starts the ranks that do so. Quote the ratios."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from reproduce.job import BLAS_THREADS
from reproduce.job.command_line import reason

NO_MPIEXEC = 'error: mpiexec does not run: {}; set MPIEXEC= to one that does'


def side_by_side(candidates, repeat, synchronize=lambda: None) -> dict:
    """Times functions in the order A B C A B C ..., so that a drifting machine hits all equally.

    Args:
        candidates (dict): Name to function.
        repeat (int): Rounds that are timed. One more round comes first, and does not count.
        synchronize (callable): Called before each measurement.

    Returns:
        dict: Name to the list of seconds.
    """
    seconds: dict = {name: [] for name in candidates}
    for round_ in range(repeat + 1):
        for name, function in candidates.items():
            synchronize()
            start = time.perf_counter()
            function()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(title, seconds, ours) -> dict:
    """Prints the median time of each candidate, and the median of the ratios ours / candidate.

    Args:
        title (str): Printed above.
        seconds (dict): Name to the list of seconds, one per round.
        ours (str): The name of ours.

    Returns:
        dict: Name to both medians, for JSON.
    """
    print(title)
    print(f'{"":44}{"ms":>9}  {"ours/peer":>9}')
    result = {}
    for name, values in seconds.items():
        ratio = float(np.median(np.divide(seconds[ours], values)))
        median = float(np.median(values))
        result[name] = {'median_seconds': median, 'ratio_of_ours': ratio}
        print(f'{name:44}{1000 * median:>9.2f}  {ratio:>9.3f}')
    return result


def slowest_rank(title, candidates, repeat, comm, ours) -> dict | None:
    """Times the candidates on all ranks, and prints a table of each round's slowest rank.

    Args:
        title (str): Printed above.
        candidates (dict): Name to function.
        repeat (int): Rounds that are timed.
        comm (~chainermn.CommunicatorBase): The ranks.
        ours (str): The name of ours.

    Returns:
        dict: The table, on rank 0; None on the other ranks.
    """
    from mpi4py import MPI  # not above: the command that starts the ranks must not start MPI

    seconds = side_by_side(candidates, repeat, comm.mpi_comm.Barrier)
    slowest = {name: np.array(values) for name, values in seconds.items()}
    for values in slowest.values():
        comm.mpi_comm.Allreduce(MPI.IN_PLACE, values, MPI.MAX)
    if comm.rank > 0:
        return None
    where = f'{comm.size} ranks on {comm.inter_size} host(s), slowest rank'
    return table(f'{title}, {where}', slowest, ours)


def start_ranks(n: int, arguments, module='reproduce.studies.speed', hostfile=None, **options):
    """Runs a module on ranks that ``mpiexec`` starts.

    Args:
        n (int): Ranks.
        arguments (list of str): The module's words.
        module (str): The module's name.
        hostfile (str): The hosts, in mpiexec's format; None: this host.
        options: Passed on to :func:`subprocess.run`.

    Returns:
        subprocess.CompletedProcess: The job, which has ended.

    Raises:
        SystemExit: There is no such ``mpiexec``.
    """
    command, environment = job_of(n, arguments, module, hostfile)
    try:
        return subprocess.run(command, env=environment, check=False, **options)
    except OSError as error:
        sys.exit(NO_MPIEXEC.format(reason(error)))


def job_of(n: int, arguments, module: str, hostfile=None) -> tuple:
    """Returns the command and the environment with which :func:`start_ranks` starts a job."""
    beside = Path(sys.executable).parent / 'mpiexec'
    mpiexec = os.environ.get('MPIEXEC') or (str(beside) if beside.exists() else 'mpiexec')
    environment = {
        'PRTE_MCA_rmaps_default_mapping_policy': ':oversubscribe',
        'OMPI_MCA_rmaps_base_oversubscribe': '1',  # the same for Open MPI 4
        # A bound rank would share its one core with its loader processes.
        'PRTE_MCA_hwloc_default_binding_policy': 'none',
        'OMPI_MCA_hwloc_base_binding_policy': 'none',
        **{name: '1' for name in BLAS_THREADS},
        **os.environ,
    }
    if os.geteuid() == 0:
        environment.update(OMPI_ALLOW_RUN_AS_ROOT='1', OMPI_ALLOW_RUN_AS_ROOT_CONFIRM='1')
    on_hosts = ['--hostfile', str(hostfile)] if hostfile else []
    try:
        if hostfile and b'Open' in subprocess.check_output([mpiexec, '--version']):
            # Open MPI passes on to other hosts only the variables that are named.
            names = (*BLAS_THREADS, 'PATH', 'LD_LIBRARY_PATH', 'PYTHONPATH')
            on_hosts += [word for name in names if name in environment for word in ('-x', name)]
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(NO_MPIEXEC.format(reason(error)))
    python = [sys.executable, *['-I'] * sys.flags.isolated]  # as run_mpi.sh started this one
    return [mpiexec, '-n', str(n), *on_hosts, *python, '-m', module, *arguments], environment
