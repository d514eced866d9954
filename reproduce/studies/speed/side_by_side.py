"""Times functions side by side, and starts the ranks that do so: quote the ratios."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


def side_by_side(candidates, repeat, synchronize=lambda: None) -> dict:
    """Times functions in turn, A B C A B C ...: a machine whose speed drifts hits all alike.

    Args:
        candidates (dict): Name to function.
        repeat (int): Rounds that count; one more comes first.
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
    """Prints medians, and the median over the rounds of the ratio ours / peer.

    Returns:
        dict: The same, for JSON.
    """
    print(title)
    print(f'{"":44}{"ms":>9}  {"ours / it":>9}')
    result = {}
    for name, values in seconds.items():
        ratio = float(np.median(np.divide(seconds[ours], values)))
        median = float(np.median(values))
        result[name] = {'median_seconds': median, 'ratio_of_ours': ratio}
        print(f'{name:44}{1000 * median:>9.2f}  {ratio:>9.3f}')
    return result


def slowest_rank(title, candidates, repeat, comm, ours) -> dict | None:
    """The table, on rank 0, of the times that the slowest rank took."""
    from mpi4py import MPI  # here: the command that starts the ranks must not start MPI

    seconds = side_by_side(candidates, repeat, comm.mpi_comm.Barrier)
    slowest = {name: np.array(values) for name, values in seconds.items()}
    for values in slowest.values():
        comm.mpi_comm.Allreduce(MPI.IN_PLACE, values, MPI.MAX)
    if comm.rank > 0:
        return None
    where = f'{comm.size} ranks on {comm.inter_size} host(s), slowest rank'
    return table(f'{title}, {where}', slowest, ours)


def start_ranks(n: int, arguments, module='reproduce.studies.speed', hostfile=None, **options):
    """Runs a module under mpiexec; returns the CompletedProcess."""
    beside = Path(sys.executable).parent / 'mpiexec'
    mpiexec = os.environ.get('MPIEXEC') or (str(beside) if beside.exists() else 'mpiexec')
    environment = {
        'PRTE_MCA_rmaps_default_mapping_policy': ':oversubscribe',
        'OMPI_MCA_rmaps_base_oversubscribe': '1',  # the same for Open MPI 4
        # A rank's loader processes would share the one core that it is tied to.
        'PRTE_MCA_hwloc_default_binding_policy': 'none',
        'OMPI_MCA_hwloc_base_binding_policy': 'none',
        **{name: '1' for name in THREADS},
        **os.environ,
    }
    if os.geteuid() == 0:
        environment.update(OMPI_ALLOW_RUN_AS_ROOT='1', OMPI_ALLOW_RUN_AS_ROOT_CONFIRM='1')
    on_hosts = []
    if hostfile:
        on_hosts = ['--hostfile', str(hostfile)]
        version = subprocess.run([mpiexec, '--version'], check=True, stdout=subprocess.PIPE).stdout
        if b'Open' in version:  # which hands on to other hosts what is named
            names = (*THREADS, 'PATH', 'LD_LIBRARY_PATH', 'PYTHONPATH')
            on_hosts += [word for name in names if name in environment for word in ('-x', name)]
    command = [mpiexec, '-n', str(n), *on_hosts, sys.executable, '-m', module, *arguments]
    return subprocess.run(command, env=environment, check=False, **options)
