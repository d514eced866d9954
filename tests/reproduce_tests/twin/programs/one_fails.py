"""The twin's training, in which rank 1 fails in the second iteration."""

from reproduce.twin import processes as job

job.before_mpi()

from reproduce.twin import train

update = train.Training.update


def failing(self):
    if self.iteration == 1 and train.dist.get_rank() == 1:
        raise RuntimeError('on purpose')
    update(self)


train.Training.update = failing
job.run(train.main)
