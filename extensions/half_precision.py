"""Half-precision all-reduce: gradients are float16 on the wire and float32 everywhere else."""

from __future__ import annotations

import zlib

import chainer
import chainermn
import numpy as np
from chainer.backends import cuda
from chainermn.communicators import mpi_communicator_base
from mpi4py import MPI

from extensions import kernels

_DTYPES = ('float16', 'float32', 'float64')
NAMES = ('auto', 'mpi', 'pure_nccl', 'naive')

# Elements that are summed at a time: a block of float64 partial sums stays in a core's second-level
# cache.
_BLOCK = 1 << 15


class CommunicatorError(Exception):
    """The communicator asked for cannot work here; the message says why, and what would."""


def create_communicator(name='auto', allreduce_grad_dtype='float16', mpi_comm=None):
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

    Returns:
        ~chainermn.CommunicatorBase: On GPUs, the rank's GPU is the current device.

    Raises:
        CommunicatorError: On every rank alike: an unknown name or dtype, a GPU communicator without
            a GPU (host and rank are named), a dtype that the communicator does not have.
    """
    mpi_comm = MPI.COMM_WORLD if mpi_comm is None else mpi_comm
    if mpi_comm == MPI.COMM_NULL:
        raise CommunicatorError('this process is not in mpi_comm: it is MPI.COMM_NULL')
    dtype = _wire_dtype(allreduce_grad_dtype).name
    if name not in NAMES:
        raise CommunicatorError(f'communicator must be one of {", ".join(NAMES)}, not {name!r}')
    if name in ('auto', 'pure_nccl'):
        obstacles = [obstacle for obstacle in mpi_comm.allgather(_nccl_obstacle()) if obstacle]
        if name == 'auto':
            if obstacles and len(obstacles) < mpi_comm.size:
                raise CommunicatorError(
                    f'some ranks can use NCCL and some cannot: {obstacles[0]}. '
                    'Give every rank a GPU, or choose the communicator mpi'
                )
            name = 'mpi' if obstacles else 'pure_nccl'
        elif obstacles:
            raise CommunicatorError(
                f'the communicator pure_nccl needs a GPU and NCCL on every rank: {obstacles[0]}. '
                'On CPUs choose the communicator mpi'
            )
    if name == 'mpi':
        return HalfPrecisionMpiCommunicator(mpi_comm, dtype)
    if name == 'pure_nccl':
        comm = chainermn.create_communicator(
            name, mpi_comm=mpi_comm, allreduce_grad_dtype=np.dtype(dtype)
        )
        _use_own_gpu(comm)
        return comm
    if dtype != 'float32':
        raise CommunicatorError(
            f'the communicator {name} all-reduces in float32 only, not in {dtype}: choose the '
            'communicator mpi (CPU) or pure_nccl (GPU), or allreduce_grad_dtype float32'
        )
    return chainermn.create_communicator(name, mpi_comm=mpi_comm)


def _wire_dtype(dtype) -> np.dtype:
    # numpy.dtype(None) is float64.
    try:
        name = None if dtype is None else np.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in _DTYPES:
        raise CommunicatorError(
            f'allreduce_grad_dtype must be one of {", ".join(_DTYPES)}, not {name}'
        )
    return np.dtype(name)


def _nccl_obstacle() -> str | None:
    """Why this rank cannot use pure_nccl, or None."""
    where = f'rank {MPI.COMM_WORLD.rank} on {MPI.Get_processor_name()}'
    if not cuda.available:
        return f'{where} has no usable GPU or no CuPy'
    try:
        if cuda.cupy.cuda.runtime.getDeviceCount() == 0:
            return f'{where} sees no GPU'
    except cuda.cupy.cuda.runtime.CUDARuntimeError as error:
        return f'{where} sees no GPU ({error})'
    if not chainermn.nccl._available:
        return f'{where} has no NCCL for CuPy'
    return None


def _use_own_gpu(comm):
    """Makes GPU number ``intra_rank`` the rank's own; two ranks never share one."""
    count = cuda.cupy.cuda.runtime.getDeviceCount()
    lacking = [
        f'rank {rank} on {host} is number {intra_rank} there, but sees {count} GPU(s)'
        for rank, host, intra_rank, count in comm.mpi_comm.allgather(
            (comm.rank, MPI.Get_processor_name(), comm.intra_rank, count)
        )
        if intra_rank >= count
    ]
    if lacking:
        raise CommunicatorError(
            f'{lacking[0]}: start as many ranks per host as it has GPUs (slots in the hostfile)'
        )
    cuda.get_device_from_id(comm.intra_rank).use()


def device_of(comm):
    """The rank's device: its own GPU with ``pure_nccl``, else the CPU.

    Returns:
        ~chainer.backend.Device: Of the communicator's gradients.
    """
    on_gpu = hasattr(comm, 'nccl_comm')
    return chainer.get_device(f'@cupy:{comm.intra_rank}' if on_gpu else '@numpy')


class HalfPrecisionMpiCommunicator(mpi_communicator_base.MpiCommunicatorBase):
    """ChainerMN communicator for CPUs whose mean of float16 gradients is exact.

    Each worker's gradient is rounded to ``allreduce_grad_dtype`` once, as on the wire. Float16
    values are multiples of 2**-24 below 2**16, so that a float64 holds the sum of up to 8,192 of
    them exactly: the mean does not depend on the order of the ranks, nor on how workers are spread
    over processes. It is divided in float64 and rounded to float16 once.

    The wire carries float16: a reduce-scatter by all-to-all, then an all-gather, so that
    each rank sends 2 (P - 1) / P float16 values for each element. A process that plays several
    workers calls :meth:`add_grad` for each and then :meth:`mean_grad`; its partial sums need
    float64 on the wire of the reduce-scatter.

    Deviation: NCCL's sum is rounded to float16 after every addition, and divided in float16.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        allreduce_grad_dtype (str or dtype): ``'float16'``, ``'float32'`` or ``'float64'``. The sums
            of the last two depend on the grouping of workers, in the last bits of a float64.
    """

    def __init__(self, mpi_comm, allreduce_grad_dtype='float16'):
        super().__init__(mpi_comm)
        self.allreduce_grad_dtype = _wire_dtype(allreduce_grad_dtype)
        self._wire = self._sum = self._received = None
        self._layout = []
        self._n_added = 0

    def set_config(self, name, value=True, **kwargs):
        if name == 'allreduce_grad_dtype':
            self.allreduce_grad_dtype = _wire_dtype(value)
        else:
            super().set_config(name, value, **kwargs)

    def get_config(self, name=None):
        if name == 'allreduce_grad_dtype':
            return self.allreduce_grad_dtype
        return super().get_config(name)

    def split(self, color, key):
        return type(self)(self.mpi_comm.Split(color, key), self.allreduce_grad_dtype)

    def multi_node_mean_grad(self, model, zero_fill=False):
        """Replaces the model's gradients by their mean over the ranks, one worker each.

        Args:
            model (~chainer.Link): All ranks must have the same parameters.
            zero_fill (bool): Count a missing gradient as zeros; otherwise that parameter is passed
                over, and must be so on all ranks.

        Raises:
            ValueError: On every rank: the gradients of two ranks are of different parameters or
                shapes, or two ranks have added different numbers of workers.
        """
        self._n_added = 0
        self.add_grad(model, zero_fill)
        self.mean_grad(model)

    def add_grad(self, model, zero_fill=False):
        """Adds one worker's gradients, rounded to the wire's dtype, to this process's sum.

        Raises:
            ValueError: They are of other parameters than the worker's before.
        """
        params = _params_with_grad(model, zero_fill)
        layout = [(name, param.shape) for name, param in params]
        if self._n_added == 0:
            self._layout = layout
        elif layout != self._layout:
            differing = sorted({name for name, _ in set(layout) ^ set(self._layout)})
            raise ValueError(
                f'worker {self._n_added} of rank {self.rank} and the one before it differ in '
                f'which gradients they have: {", ".join(differing)}'
            )
        if self._n_added == 1:
            self._sum = _buffer(self._sum, self._wire.size, np.float64)
            kernels.cast(self._wire, self._sum)
        self._pack([param for _, param in params])
        if self._n_added > 0:
            kernels.add(self._wire, self._sum)
        self._n_added += 1

    def mean_grad(self, model):
        """Replaces the gradients by the mean over all added workers, as many on each rank.

        Raises:
            RuntimeError: No worker was added.
            ValueError: As in :meth:`multi_node_mean_grad`.
        """
        if self._n_added == 0:
            raise RuntimeError('mean_grad needs an add_grad before it, for each worker')
        self._check_that_ranks_agree()
        mean = self._allreduce_mean()
        self._n_added = 0
        params = dict(model.namedparams())
        start = 0
        for name, shape in self._layout:
            param = params[name]
            if param.grad is None:
                param.grad = np.empty_like(param.data)
            stop = start + param.data.size
            kernels.cast(mean[start:stop].reshape(shape), param.grad)
            start = stop

    def _check_that_ranks_agree(self):
        """Ranks that would send each other chunks of different sizes would hang or mix them up."""
        digest = zlib.crc32(repr((self._layout, self._n_added)).encode())
        extremes = np.array([digest, -digest], np.int64)
        self.mpi_comm.Allreduce(MPI.IN_PLACE, extremes, MPI.MAX)
        if extremes[0] == -extremes[1]:
            return
        (first_layout, first_n), *others = self.mpi_comm.allgather((self._layout, self._n_added))
        for rank, (layout, n_added) in enumerate(others, start=1):
            differing = sorted({name for name, _ in set(layout) ^ set(first_layout)})
            if differing or n_added != first_n:
                raise ValueError(
                    f'ranks 0 and {rank} differ in which gradients they have: '
                    f'{", ".join(differing) or "none"}; and have {first_n} and {n_added} workers'
                )

    def _pack(self, params):
        size = sum(param.data.size for param in params)
        chunk = -(-size // self.size)  # each rank sums one chunk; nobody reads the padding
        self._wire = _buffer(self._wire, chunk * self.size, self.allreduce_grad_dtype)
        start = 0
        for param in params:
            stop = start + param.data.size
            if param.grad is None:
                self._wire[start:stop] = 0
            else:
                kernels.cast(param.grad, self._wire[start:stop])
            start = stop

    def _allreduce_mean(self):
        partial = self._wire if self._n_added == 1 else self._sum
        chunks = partial.reshape(self.size, -1)
        self._received = _buffer(self._received, chunks.size, chunks.dtype)
        received = self._received.reshape(chunks.shape)
        self.mpi_comm.Alltoall(_bytes(chunks), _bytes(received))
        mean = np.empty(chunks.shape[1], self._wire.dtype)
        n_workers = self._n_added * self.size
        total = np.empty(min(_BLOCK, mean.size), np.float64)
        for start in range(0, mean.size, _BLOCK):
            block = slice(start, min(start + _BLOCK, mean.size))
            t = total[: block.stop - start]
            kernels.cast(received[0, block], t)
            for row in received[1:, block]:
                kernels.add(row, t)
            kernels.mean(t, n_workers, mean[block])  # [H]
        self.mpi_comm.Allgather(_bytes(mean), _bytes(self._wire))
        return self._wire


def _params_with_grad(model, zero_fill):
    return [
        (name, param)
        for name, param in sorted(model.namedparams())
        if param.data is not None and (zero_fill or param.grad is not None)
    ]


def _buffer(buffer, size, dtype):
    """``buffer`` if it fits, else a new one."""
    if buffer is not None and buffer.size == size and buffer.dtype == dtype:
        return buffer
    return np.empty(size, dtype)


def _bytes(array):
    """The array as MPI sees it: MPI has no float16."""
    return [array.view(np.uint8), MPI.BYTE]
