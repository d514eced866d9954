"""The twin's training, in which rank 1 hangs in the second iteration."""

import time

from reproduce.twin import processes as job

job.before_mpi()

from reproduce.twin import train

update = train.Training.update


def hanging(self):
    if self.iteration == 1 and train.dist.get_rank() == 1:
        time.sleep(1000)
    update(self)


train.Training.update = hanging
job.run(train.main)
