"""train.py, but in the third iteration rank 1 has a gradient of inf; prints the sum of the
parameters before every all-reduce, and at the end."""

import sys

import numpy as np

import shallow  # noqa: F401  isort: skip
from reproduce import train
from reproduce.job import ranks

Communicator = train.extensions.HalfPrecisionMpiCommunicator
add_grad = Communicator.add_grad
rank = train.MPI.COMM_WORLD.rank
sums, models = [], []


def total(model):
    return float(sum(param.data.sum(dtype=np.float64) for param in model.params()))


def add_grad_with_inf(self, model, zero_fill=False):
    sums.append(total(model))
    models.append(model)
    if rank == 1 and len(sums) == 3:
        model.fc.W.grad[0, 0] = np.inf
    add_grad(self, model, zero_fill)


Communicator.add_grad = add_grad_with_inf
try:
    ranks.run(train.main)
finally:
    if sys.exc_info()[0] is not None:
        kept = total(models[-1]) == sums[-1] != sums[-2]
        print(f'rank {rank}: parameters kept: {kept}, {len(sums)} iterations', flush=True)
