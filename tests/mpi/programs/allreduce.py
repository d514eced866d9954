"""Averages seeded gradients over the ranks and saves what each rank gets.

allreduce.py OUT CASES: a JSON list of [workers of each process, dtype, seed, accumulate, scale].
With a seed above 0 the ranks are in another order than the processes. A process plays the same
workers in any order of the ranks.
"""

import json
import sys

import numpy as np
from mpi4py import MPI
from tests_common import gradients, model_of, shuffled

import extensions

out, cases = sys.argv[1], json.loads(sys.argv[2])
world = MPI.COMM_WORLD


def average(each, dtype, seed, accumulate, scale):
    """What the rank counted, and its model."""
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
    return comm.cast_counts, model


for number, case in enumerate(cases):
    counts, model = average(*case)
    np.savez(
        f'{out}/{number}-{world.rank}.npz',
        cast_counts=counts,
        **{n: p.grad for n, p in model.namedparams() if p.grad is not None},
    )
