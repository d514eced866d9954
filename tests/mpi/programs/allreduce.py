"""Averages seeded gradients over the ranks and saves what each rank gets.

allreduce.py OUT CASES [LONGEST]: a JSON list of [workers of each process, dtype, seed, accumulate,
scale]. LONGEST takes the place of the length, 2**30, from which messages are cut.
With a seed above 0 the ranks are in another order than the processes. A process plays the same
workers in any order of the ranks.
"""

import json
import sys

import numpy as np
from mpi4py import MPI
from tests_common import gradients, model_of, shuffled

import extensions
from extensions import exact_mpi

out, cases = sys.argv[1], json.loads(sys.argv[2])
longest = int(sys.argv[3]) if len(sys.argv) > 3 else None
world = MPI.COMM_WORLD


class Counting:
    """The ranks, where a message may not count more than twice LONGEST, all ranks together."""

    def __init__(self, mpi_comm):
        self._mpi_comm = mpi_comm

    def __getattr__(self, name):
        method = getattr(self._mpi_comm, name)
        if name in ('Alltoall', 'Alltoallv', 'Allgather', 'Send', 'Recv', 'Bcast'):
            return lambda *arguments: self._counted(method, arguments)
        return method

    def _counted(self, method, arguments):
        for argument in arguments:
            if isinstance(argument, list):
                data, *_, kind = argument
                assert 0 < len(data) / kind.size <= 2 * longest, (method, len(data), kind.size)
        return method(*arguments)


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
    if longest:
        exact_mpi._LONGEST = longest
        comm.mpi_comm = Counting(comm.mpi_comm)
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
