"""What the CuPy of host memory was asked to do, one line a call, in order.

The lines begin with ``launch`` (a kernel or another operation on the device), ``wait`` (the host
waits for the device), ``copy`` (from the host to the device), ``nccl`` or ``use`` (a GPU). The real
CuPy has no such module. At the exit of a process, its lines go to the file HOST_CALLS.RANK, if the
variable HOST_CALLS is set.
"""

import atexit
import os

calls: list = []


def record(*words):
    calls.append(' '.join(map(str, words)))


def count(kind, since=0):
    """Returns how many calls of a kind were made, without the first ``since`` calls."""
    return sum(call.startswith(kind + ' ') for call in calls[since:])


def _write():
    if os.environ.get('HOST_CALLS'):
        rank = os.environ.get('OMPI_COMM_WORLD_RANK', '0')
        with open(f'{os.environ["HOST_CALLS"]}.{rank}', 'w') as file:
            file.writelines(call + '\n' for call in calls)


atexit.register(_write)
