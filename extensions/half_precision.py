"""Half-precision all-reduce: gradients are float16 on the wire and float32 everywhere else.

The cast is, for CPUs, ``pack`` in ``extensions/kernels/kernels.c`` (called in
``extensions/exact_mpi.py``), and for NCCL, ChainerMN's own pack kernel (called in
``extensions/nccl.py:HalfPrecisionNcclCommunicator``).
"""

from __future__ import annotations

import chainermn
import numpy as np
from chainer.backends import cuda
from mpi4py import MPI

from extensions import nccl
from extensions.communicator_base import (
    CommunicatorError,
    checked_accumulate,
    power_of_two,
    wire_dtype,
)
from extensions.exact_mpi import HalfPrecisionMpiCommunicator
from extensions.nccl import HalfPrecisionNcclCommunicator

NAMES = ('auto', 'mpi', 'pure_nccl', 'naive')


def create_communicator(
    name='auto',
    allreduce_grad_dtype='float16',
    mpi_comm=None,
    *,
    accumulate='exact',
    gradient_scale=1.0,
    stop_on_nonfinite=True,
):
    """Creates the communicator that averages gradients (S)::

        [H]  g = float32(1/n sum_w float16(g_w))

    Args:
        name (str): ``'pure_nccl'`` is the paper's way: ChainerMN's communicator, NCCL's sum of
            float16. ``'mpi'`` is :class:`HalfPrecisionMpiCommunicator`, for CPUs. ``'auto'`` is the
            first where every rank has a GPU and NCCL, else the second. ``'naive'`` is ChainerMN's
            float32 communicator for CPUs.
        allreduce_grad_dtype (str or dtype): ``'float16'``, ``'float32'`` or ``'float64'`` on the
            wire.
        mpi_comm (mpi4py.MPI.Comm): ``MPI.COMM_WORLD`` by default.
        accumulate (str): Of ``'mpi'``: the ``'exact'`` sum, or ``'ring'``, rounded after every
            addition.
        gradient_scale (float): A power of two: gradients are multiplied with it in float32 before
            they are rounded, and their mean is divided by it. The paper has none.
        stop_on_nonfinite (bool): Of ``'mpi'`` and ``'pure_nccl'``: an infinite or NaN mean is an
            error, raised on every rank before the update.

    Returns:
        ~chainermn.CommunicatorBase: Its attribute ``reason`` tells in words why this one. On GPUs,
            the rank's GPU is the current device.

    Raises:
        CommunicatorError: On every rank alike: an option that is unknown, or that the communicator
            does not have; ranks with and without a GPU; two ranks on one GPU; NCCL too old. Host
            and rank are named.
    """
    mpi_comm = MPI.COMM_WORLD if mpi_comm is None else mpi_comm
    if mpi_comm == MPI.COMM_NULL:
        raise CommunicatorError('this process is not in mpi_comm: it is MPI.COMM_NULL')
    if name not in NAMES:
        raise CommunicatorError(f'communicator must be one of {", ".join(NAMES)}, not {name!r}')
    options = {
        'allreduce_grad_dtype': wire_dtype(allreduce_grad_dtype),
        'gradient_scale': power_of_two(gradient_scale),
        'stop_on_nonfinite': stop_on_nonfinite,
    }
    accumulate = checked_accumulate(accumulate)
    reason = 'asked for'
    if name in ('auto', 'pure_nccl'):
        everyone = mpi_comm.allgather(nccl.inspect(mpi_comm.rank))
        name, reason = nccl.choose(name, everyone)
    if name != 'mpi' and accumulate == 'ring':
        raise CommunicatorError(f'accumulate ring is for the communicator mpi, not for {name}')
    if name == 'naive':
        return _naive(mpi_comm, options, reason)
    if name == 'pure_nccl':
        number = nccl.own_gpus(everyone)[mpi_comm.rank]
        cuda.get_device_from_id(number).use()
        return HalfPrecisionNcclCommunicator(mpi_comm, **options, reason=reason)
    return HalfPrecisionMpiCommunicator(mpi_comm, **options, accumulate=accumulate, reason=reason)


def _naive(mpi_comm, options, reason):
    if options['allreduce_grad_dtype'] != np.float32 or options['gradient_scale'] != 1:
        raise CommunicatorError(
            'the communicator naive all-reduces in float32 only, without a gradient_scale: choose '
            'mpi (CPU) or pure_nccl (GPU), or allreduce_grad_dtype float32'
        )
    comm = chainermn.create_communicator('naive', mpi_comm=mpi_comm)
    comm.reason = reason
    return comm
