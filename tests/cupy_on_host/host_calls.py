"""What the CuPy of host memory was asked to do, one line a call, in order.

The lines begin with ``launch`` (a kernel or another operation on the device), ``wait`` (the host
waits for the device), ``copy`` (from the host to the device), ``nccl`` or ``use`` (a GPU). The real
CuPy has no such module. At the exit of a process, its lines go to the file HOST_CALLS.RANK, if the
variable HOST_CALLS is set. They are followed by a line ``kernel JSON`` for each kernel that was
launched and whose text is not CuPy's own: see record_kernel.
"""

import atexit
import json
import os

calls: list = []
kernels: set = set()


def record(*words):
    calls.append(' '.join(map(str, words)))


def record_kernel(kernel, made_with, arguments=()):
    """Notes a launch, and what CuPy would make the kernel's source from.

    Args:
        kernel: An object of one of CuPy's classes.
        made_with (dict): The arguments that made the object.
        arguments (list): What is known of each argument of the launch: the dtype of an array, its
            number of axes, and whether it is contiguous. None is for a number.
    """
    launched = {'class': type(kernel).__name__, 'made with': made_with, 'arguments': arguments}
    kernels.add(json.dumps(launched))
    record('launch', kernel.name)


def count(kind, since=0):
    """Returns how many calls of a kind were made, without the first ``since`` calls."""
    return sum(call.startswith(kind + ' ') for call in calls[since:])


def _write():
    if os.environ.get('HOST_CALLS'):
        rank = os.environ.get('OMPI_COMM_WORLD_RANK', '0')
        with open(f'{os.environ["HOST_CALLS"]}.{rank}', 'w') as file:
            file.writelines(call + '\n' for call in calls)
            file.writelines(f'kernel {kernel}\n' for kernel in sorted(kernels))


atexit.register(_write)
