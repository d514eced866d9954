"""Half-precision all-reduce as communication hooks of PyTorch's DistributedDataParallel.

A hook averages one bucket of gradients while the backward pass goes on. ``register_comm_hook(dtype,
hook)`` says to what it rounds each process's gradients first. The hooks differ in where they round
again, and whether they divide before the sum.
"""

from __future__ import annotations

import torch.distributed as dist

from reproduce.twin.virtual_workers import rounded_once


def exact_sum(dtype, bucket):
    """Cast, exact sum, divide, round once: the mean of extensions/exact_mpi.py, bit by bit.

    The wire carries float64, which holds the sum of 8,192 float16 values: for CPUs (gloo).
    """
    n = dist.get_world_size()
    wire = bucket.buffer().to(dtype).double()
    return _all_reduced(bucket, wire, lambda total: rounded_once(total / n, dtype))


def cast_sum_divide(dtype, bucket):
    """Cast, sum in ``dtype``, divide in ``dtype``: ChainerMN with NCCL, and so the paper (S)."""
    n = dist.get_world_size()
    return _all_reduced(bucket, bucket.buffer().to(dtype), lambda total: total.div_(n))


def divide_first(dtype, bucket):
    """Cast, divide, sum: as PyTorch's own ``fp16_compress_hook``. Below 2**-25 n it sends zero."""
    n = dist.get_world_size()
    return _all_reduced(bucket, bucket.buffer().to(dtype).div_(n), lambda total: total)


def _all_reduced(bucket, wire, mean_of):
    future = dist.all_reduce(wire, async_op=True).get_future()
    return future.then(lambda _: bucket.buffer().copy_(mean_of(wire)))
