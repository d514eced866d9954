"""Removes what a killed process leaves on its host: semaphores, shared memory, temporary folders.

Nothing here may import MPI: it runs before MPI starts.
"""

from __future__ import annotations

import os
import subprocess
import sys

# Reads paths until the rank's end, however it comes, closes the pipe. What follows is removed a
# second later, and what belongs to the launcher after its end: it mostly does so itself, and where
# it goes on, as a batch system's does, it still needs them.
_SCRIPT = """
trap '' INT TERM HUP
while read -r owner path; do
    if [ "$owner" = rank ]; then rank="$rank $path"; else launcher="$launcher $path"; fi
done
sleep 1
rm -rf $rank
for _ in 1 2 3 4 5 6 7 8 9 10; do
    if [ ! -d /proc/$1 ]; then rm -rf $launcher; break; fi
    sleep 1
done
"""
_janitor = None


def remove_after_end(path, owner='rank'):
    """Has a path removed after the end of this process, or of the launcher that started it.

    Args:
        path (str): Of a file or folder on this host; a pattern of the shell. Without spaces.
        owner (str): ``'rank'`` or ``'launcher'``.
    """
    global _janitor
    if _janitor is None:
        # In a session of its own: mpiexec kills all of a rank's group.
        _janitor = subprocess.Popen(
            ['/bin/sh', '-c', _SCRIPT, 'sh', str(os.getppid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
    if not set(path) & set(' \n\t;&|$`"\'\\'):
        print(owner, path, file=_janitor.stdin, flush=True)


def remove_those_of_open_mpi():
    """Open MPI's shared memory and its folder outlive a launcher that was killed."""
    if not sys.platform.startswith('linux'):
        return
    with open('/proc/self/maps') as maps:
        mapped = {line.split()[-1] for line in maps}
    for path in sorted(mapped):
        if path.startswith('/dev/shm/sm_segment.'):
            remove_after_end(path, 'launcher')
    folder = os.environ.get('PMIX_SERVER_TMPDIR', '')
    if os.path.basename(folder) == f'ompi.{os.getppid()}':
        remove_after_end(folder, 'launcher')
