"""train.py, but in the third iteration rank 1 has a gradient of inf; prints the sum of the
parameters before every all-reduce, and at the end."""

import os
import sys

import numpy as np

import shallow  # noqa: F401  isort: skip
from reproduce import train
from reproduce.job import ranks

GPUS = bool(os.environ.get('CUDA_VISIBLE_DEVICES'))
Communicator = train.extensions.HalfPrecisionMpiCommunicator
METHOD = 'add_grad'
if GPUS:  # whose communicator adds no worker's gradients
    Communicator, METHOD = train.extensions.HalfPrecisionNcclCommunicator, 'multi_node_mean_grad'
average = getattr(Communicator, METHOD)
rank = train.MPI.COMM_WORLD.rank
sums, models = [], []


def total(model):
    return float(sum(param.data.sum(dtype=np.float64) for param in model.params()))


def average_with_inf(self, model, zero_fill=False):
    sums.append(total(model))
    models.append(model)
    if rank == 1 and len(sums) == 3:
        model.fc.W.grad[0, 0] = np.inf
    average(self, model, zero_fill)


setattr(Communicator, METHOD, average_with_inf)
try:
    ranks.run(train.main)
finally:
    if sys.exc_info()[0] is not None:
        kept = total(models[-1]) == sums[-1] != sums[-2]
        print(f'rank {rank}: parameters kept: {kept}, {len(sums)} iterations', flush=True)
