"""train.py, but rank 1 ends in the third update, in the way that the first argument names."""

import ctypes
import os
import sys
import time

import shallow  # noqa: F401  isort: skip
from reproduce import train
from reproduce.job import ranks

how = sys.argv.pop(1)
update = train.extensions.VirtualWorkersUpdater.update


def failing_update(self):
    if self.iteration == 2 and train.MPI.COMM_WORLD.rank == 1:
        print(f'fails at {time.time()}', flush=True)
        if how == 'raise':
            raise KeyError('on purpose')
        if how == 'exit':
            sys.exit(3)
        if how == 'interrupt':
            raise KeyboardInterrupt
        if how == 'segfault':
            ctypes.string_at(0)
        os._exit(3)
    update(self)


train.extensions.VirtualWorkersUpdater.update = failing_update
ranks.run(train.main)
