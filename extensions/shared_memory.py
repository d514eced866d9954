"""Leaves no shared memory behind a process that mpiexec did not start."""

from __future__ import annotations

import contextlib
import os

from mpi4py import MPI

_OF_LAUNCHERS = ('PMIX_RANK', 'OMPI_COMM_WORLD_RANK', 'PMI_RANK')


def mapped() -> list[str]:
    """Returns the files that this process has mapped: libraries, and memory shared by ranks."""
    try:
        with open('/proc/self/maps') as maps:
            paths = {line.split()[-1] for line in maps}
    except OSError:
        return []
    return sorted(path for path in paths if path.startswith('/'))


def remove_own():
    """Removes Open MPI's file of a process that is alone, for which nobody else would.

    Open MPI 5 leaves 16 MiB in /dev/shm for each such process (open-mpi/ompi#13261). The memory
    stays mapped. Files of a process that mpiexec started stay: other ranks map them.
    """
    if MPI.Is_initialized() and not any(name in os.environ for name in _OF_LAUNCHERS):
        for path in mapped():
            if os.path.basename(path).startswith('sm_segment.'):
                with contextlib.suppress(OSError):
                    os.remove(path)


remove_own()
