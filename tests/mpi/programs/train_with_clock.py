"""The program of invariance, but from the third update on the clock is an hour back."""

import sys
import time

import shallow  # noqa: F401  isort: skip
from reproduce import train
from reproduce.job import ranks
from reproduce.studies import invariance_program

update, now = train.extensions.VirtualWorkersUpdater.update, time.time


def update_and_set_clock(self):
    if self.iteration == 2:
        time.time = lambda: now() - 3600
    update(self)


train.extensions.VirtualWorkersUpdater.update = update_and_set_clock
ranks.run(lambda: invariance_program.main(sys.argv[1:]))
