"""Averages seeded gradients over the ranks and saves what each rank gets.

allreduce.py OUT DTYPE WORKERS_EACH SEED ACCUMULATE SCALE: with a SEED above 0 the ranks are in
another order than the processes. A process plays the same workers in any order of the ranks.
"""

import sys

import numpy as np
from mpi4py import MPI
from tests_common import gradients, model_of, shuffled

import extensions

out, dtype, accumulate = sys.argv[1], sys.argv[2], sys.argv[5]
each, seed, scale = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[6])
world = MPI.COMM_WORLD
comm = extensions.create_communicator(
    'mpi',
    dtype,
    world.Split(0, shuffled(world.size, seed).index(world.rank)),
    accumulate=accumulate,
    gradient_scale=scale,
    stop_on_nonfinite=False,
)
assert shuffled(world.size, seed)[comm.rank] == world.rank
model = model_of(gradients(0))
for others in (100, 0):  # the second round reuses the buffers, and must forget the first
    comm.cast_counts[...] = 0
    for worker in range(world.rank * each, (world.rank + 1) * each):
        for name, param in model.namedparams():
            param.grad = gradients(worker + others)[name]
        if each > 1:
            comm.add_grad(model)
    if each > 1:
        comm.mean_grad(model)
    else:
        comm.multi_node_mean_grad(model)
np.savez(
    f'{out}/{world.rank}.npz',
    cast_counts=comm.cast_counts,
    **{n: p.grad for n, p in model.namedparams() if p.grad is not None},
)
