"""Rank 1 lacks a gradient, or has more workers, than rank 0: different_gradients.py WHAT.

WHAT is missing, zero_fill or workers.
"""

import sys

from mpi4py import MPI
from tests_common import gradients, model_of

import extensions

comm = extensions.create_communicator('mpi')
model = model_of(gradients(0))
for name, param in model.namedparams():
    param.grad = gradients(comm.rank)[name]
if sys.argv[1] != 'workers' and comm.rank == 1:
    model.scalar.cleargrad()
if sys.argv[1] == 'zero_fill':
    comm.multi_node_mean_grad(model, zero_fill=True)
    print(f'rank {comm.rank}: {model.scalar.grad!r} {model.missing.grad!r}')
    sys.exit()
for _ in range(2 if sys.argv[1] == 'workers' and comm.rank == 1 else 1):
    comm.add_grad(model)
try:
    comm.mean_grad(model)
except ValueError as error:
    print(f'rank {comm.rank}: {error}')
    MPI.COMM_WORLD.Barrier()
    sys.exit(3)
