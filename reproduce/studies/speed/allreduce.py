"""How fast is the all-reduce of ResNet-50's gradients? ./run_mpi.sh benchmark allreduce"""

from __future__ import annotations

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import numpy as np
from mpi4py import MPI

from reproduce.resnet50 import ResNet50
from reproduce.studies.speed.side_by_side import slowest_rank


def run(repeat: int) -> dict | None:
    """Times our float16 all-reduce against MPI's, in float16 and in float32.

    MPI has no sum of float16, so its float16 sum is written in Python. Every candidate turns
    float32 gradients into their float32 mean. The casts are included.

    Args:
        repeat (int): Rounds that are timed.

    Returns:
        dict: The table, on rank 0; None on the other ranks.
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
