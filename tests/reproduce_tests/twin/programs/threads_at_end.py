"""The twin's training. At the end of the interpreter, each process prints its threads' names."""

import atexit
from pathlib import Path

from reproduce.twin import processes as job


def print_threads():
    names = sorted(path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm'))
    print(f'threads: {" ".join(names)}\n', end='', flush=True)


atexit.register(print_threads)  # the first, which is called last
job.before_mpi()

from reproduce.twin import train

job.run(train.main)
