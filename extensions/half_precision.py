"""Half-precision all-reduce: gradients are float16 on the wire and float32 everywhere else.

On CPUs, ``pack`` in ``extensions/kernels/kernels.c`` does the cast; ``extensions/exact_mpi.py``
calls it. On GPUs, ChainerMN's pack kernel does the cast;
``extensions/nccl.py:HalfPrecisionNcclCommunicator`` calls it.
"""

from __future__ import annotations

import sys

import chainermn
import numpy as np
from chainer.backends import cuda
from chainermn import global_except_hook
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
        name (str): ``'pure_nccl'`` is the paper's communicator: ChainerMN with NCCL's float16 sum.
            ``'mpi'`` is :class:`HalfPrecisionMpiCommunicator`, for CPUs. ``'auto'`` chooses
            ``'pure_nccl'`` if every rank has a GPU and NCCL, and ``'mpi'`` if no host has a GPU or
            CuPy, or CUDA_VISIBLE_DEVICES hides all GPUs.
            ``'naive'`` is ChainerMN's float32 communicator for CPUs.
        allreduce_grad_dtype (str or dtype): Dtype on the wire: ``'float16'``, ``'float32'`` or
            ``'float64'``.
        mpi_comm (mpi4py.MPI.Comm): By default, ``MPI.COMM_WORLD``.
        accumulate (str): For ``'mpi'`` only. ``'exact'`` sums exactly; ``'ring'`` rounds after
            every addition.
        gradient_scale (float): A power of two. Gradients are multiplied by it in float32 before the
            cast, and their mean is divided by it. The paper has no scale. An optimizer's own loss
            scale (``optimizer.set_loss_scale``) multiplies the gradients earlier, and the optimizer
            divides them by it after the all-reduce.
        stop_on_nonfinite (bool): For ``'mpi'`` and ``'pure_nccl'``. Whether an infinite or NaN mean
            raises an error, on every rank and before the update. False is for Chainer's dynamic
            loss scaling, which skips such an update itself, on every rank.

    With several ranks, an uncaught exception on one rank then ends all ranks, by ChainerMN's
    ``global_except_hook``. A program that has set ``sys.excepthook`` keeps its own.

    Returns:
        ~chainermn.CommunicatorBase: Its attribute ``reason`` says why it was chosen. On GPUs, the
            rank's GPU becomes the current device.

    Raises:
        CommunicatorError: On every rank, in one of these cases:
            An option is unknown, or differs between ranks, or the communicator does not support it.
            Some ranks have a GPU and some have none. The message names host and rank.
            ``name`` is ``'auto'``, and a rank has a GPU or CuPy that it cannot use. The message
            has CuPy's reason.
            Two ranks share a GPU. The message names host and rank.
            NCCL is too old. The message names host and rank.
    """
    mpi_comm = MPI.COMM_WORLD if mpi_comm is None else mpi_comm
    if mpi_comm == MPI.COMM_NULL:
        raise CommunicatorError('mpi_comm is MPI.COMM_NULL: this process does not belong to it')
    if mpi_comm.size > 1 and sys.excepthook is sys.__excepthook__:
        global_except_hook.add_hook()
    given = (name, allreduce_grad_dtype, accumulate, gradient_scale, stop_on_nonfinite)
    name, accumulate, options = _agreed(mpi_comm, lambda: _checked(*given))
    reason = 'asked for'
    if name in ('auto', 'pure_nccl'):
        everyone = mpi_comm.allgather(nccl.inspect(mpi_comm.rank))
        name, reason = nccl.choose(name, everyone)
    if name != 'mpi' and accumulate == 'ring':
        raise CommunicatorError(f'accumulate ring is only for the communicator mpi, not for {name}')
    if name == 'naive':
        return _naive(mpi_comm, options, reason)
    if name == 'pure_nccl':
        number = nccl.own_gpus(everyone)[mpi_comm.rank]
        _agreed(mpi_comm, lambda: _use_gpu(number))
        return HalfPrecisionNcclCommunicator(mpi_comm, **options, reason=reason)
    return HalfPrecisionMpiCommunicator(mpi_comm, **options, accumulate=accumulate, reason=reason)


def _checked(name, allreduce_grad_dtype, accumulate, gradient_scale, stop_on_nonfinite):
    if name not in NAMES:
        raise CommunicatorError(f'communicator must be one of {", ".join(NAMES)}, not {name!r}')
    options = {
        'allreduce_grad_dtype': wire_dtype(allreduce_grad_dtype),
        'gradient_scale': power_of_two(gradient_scale),
        'stop_on_nonfinite': bool(stop_on_nonfinite),
    }
    return name, checked_accumulate(accumulate), options


def _use_gpu(number):
    try:
        cuda.get_device_from_id(number).use()
    except Exception as error:
        raise CommunicatorError(f'GPU {number} cannot be used: {error}') from error


def _agreed(mpi_comm, function):
    """Returns what the function returns, alike on every rank. Raises its error on every rank."""
    result, error = None, None
    try:
        result = function()
    except CommunicatorError as its_error:
        error = its_error
    everyone = mpi_comm.allgather((str(error or ''), result))
    if error:
        raise error
    for rank, (said, its_result) in enumerate(everyone):
        if said:
            raise CommunicatorError(f'rank {rank}: {said}')
        if its_result != everyone[0][1]:
            raise CommunicatorError(
                f'ranks 0 and {rank} ask for different communicators: {everyone[0][1]} and '
                f'{its_result}'
            )
    return result


def _naive(mpi_comm, options, reason):
    if options['allreduce_grad_dtype'] != np.float32 or options['gradient_scale'] != 1:
        raise CommunicatorError(
            'the communicator naive all-reduces in float32 only, without a gradient_scale: choose '
            'mpi (CPU) or pure_nccl (GPU), or allreduce_grad_dtype float32'
        )
    comm = chainermn.create_communicator('naive', mpi_comm=mpi_comm)
    comm.reason = reason
    return comm
