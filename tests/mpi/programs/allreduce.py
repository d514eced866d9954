"""Averages seeded gradients over the ranks and saves what each rank gets: allreduce.py OUT DTYPE
WORKERS_EACH ORDER."""

import sys

import numpy as np
from mpi4py import MPI
from tests_common import gradients, model_of

import extensions

out, dtype, each, order = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
world = MPI.COMM_WORLD
if order == 'reversed':
    world = world.Split(0, -world.rank)
comm = extensions.create_communicator('mpi', dtype, world)
model = model_of(gradients(0))
for others in (100, 0):  # the second round reuses the buffers, and must forget the first
    for worker in range(comm.rank * each, (comm.rank + 1) * each):
        for name, param in model.namedparams():
            param.grad = gradients(worker + others)[name]
        if each > 1:
            comm.add_grad(model)
    if each > 1:
        comm.mean_grad(model)
    else:
        comm.multi_node_mean_grad(model)
np.savez(
    f'{out}/{MPI.COMM_WORLD.rank}.npz',
    **{n: p.grad for n, p in model.namedparams() if p.grad is not None},
)
