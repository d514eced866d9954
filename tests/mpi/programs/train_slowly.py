"""The program of invariance, but its iterations take 1.5 s longer while there is OUT-slow."""

import os
import sys
import time

import shallow  # noqa: F401  isort: skip
from reproduce import train
from reproduce.job import ranks
from reproduce.studies import invariance_program

update = train.extensions.VirtualWorkersUpdater.update


def update_slowly(self):
    if os.path.exists(f'{sys.argv[1]}-slow'):
        time.sleep(1.5)  # Slurm looks for jobs at their limit every 30 s; there are 34 iterations
    update(self)


train.extensions.VirtualWorkersUpdater.update = update_slowly
ranks.run(lambda: invariance_program.main(sys.argv[1:]))
