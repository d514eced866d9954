"""Removes what a killed process leaves on its host: semaphores, shared memory, temporary folders.

This module must not import MPI: it runs before MPI starts.
"""

from __future__ import annotations

import os
import subprocess
import sys

# Reads paths until the pipe closes, which happens however the rank ends. Removes the rank's paths a
# second later. Removes the launcher's paths only if the launcher has ended: most launchers remove
# them, and a launcher that goes on, such as a batch system's, still needs them.
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
    """Lets the janitor remove a path after this process, or its launcher, has ended.

    Args:
        path (str): File or folder on this host, or a shell pattern. A path with spaces or special
            characters is ignored.
        owner (str): Whose end to wait for: ``'rank'`` or ``'launcher'``.
    """
    global _janitor
    if _janitor is None:
        # A session of its own, because mpiexec kills a rank's whole group.
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
    """Lets the janitor remove the shared memory and the folder of Open MPI.

    Both outlive a launcher that was killed.
    """
    if not sys.platform.startswith('linux'):
        return
    with open('/proc/self/maps') as maps:
        mapped = {line.split()[-1] for line in maps}
    for path in sorted(mapped):
        if os.path.basename(path).startswith('sm_segment.'):
            remove_after_end(path, 'launcher')
    folder = os.environ.get('PMIX_SERVER_TMPDIR', '')
    # The launcher's, and on other hosts that of its daemon.
    if os.path.basename(folder) in (f'ompi.{os.getppid()}', f'prted.{os.getppid()}'):
        remove_after_end(folder, 'launcher')
