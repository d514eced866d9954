"""The all-reduce of ResNet-50's gradients, on 4 ranks."""

from __future__ import annotations

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import numpy as np
from mpi4py import MPI

from reproduce.resnet50 import ResNet50
from reproduce.studies.speed.side_by_side import slowest_rank


def run(repeat: int) -> dict | None:
    """Our float16 all-reduce against MPI's, whose sum of float16 has to be written in Python.

    From float32 gradients to their float32 mean: the casts are included on all sides.
    """
    comm = extensions.create_communicator('mpi', 'float16')
    model = ResNet50(seed=0)
    params = [param for _, param in sorted(model.namedparams())]
    rng = np.random.RandomState(comm.rank)
    for param in params:
        param.grad = rng.standard_normal(param.shape).astype(np.float32) * 1e-3
    n = sum(param.size for param in params)
    buffers = {dtype: np.empty(n, dtype) for dtype in (np.float16, np.float32)}

    def add_float16(source, target, _):
        total = np.frombuffer(target, np.float16)
        total += np.frombuffer(source, np.float16)

    sum_of_float16 = MPI.Op.Create(add_float16, commute=True)

    def plain(dtype, datatype, op):
        flat, start = buffers[dtype], 0
        for param in params:
            flat[start : start + param.size] = param.grad.ravel()
            start += param.size
        comm.mpi_comm.Allreduce(MPI.IN_PLACE, [flat, datatype], op)
        flat /= comm.size
        start = 0
        for param in params:
            param.grad[...] = flat[start : start + param.size].reshape(param.shape)
            start += param.size

    ours = 'HalfPrecisionMpiCommunicator, float16'
    candidates = {
        ours: lambda: comm.multi_node_mean_grad(model),
        'MPI.Allreduce float16, operator in NumPy': lambda: plain(
            np.float16, MPI.INT16_T, sum_of_float16
        ),
        'MPI.Allreduce float32': lambda: plain(np.float32, MPI.FLOAT, MPI.SUM),
    }
    title = f'mean of {n:,} gradients'
    return slowest_rank(title, candidates, repeat, comm, ours)
