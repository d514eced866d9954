"""The float16 all-reduce for CPUs over MPI: the mean is exact, for any order of the workers."""

from __future__ import annotations

import functools
from typing import ClassVar

import numpy as np
from chainermn.communicators import mpi_communicator_base
from mpi4py import MPI

from extensions import kernels
from extensions.communicator_base import (
    AVERAGES,
    BROADCASTS,
    CommunicatorOptions,
    checked_accumulate,
    first_few,
    params_with_grad,
    sorted_params,
)
from extensions.gradients import own_gradients
from extensions.timing import untimed

# MPI counts what a message holds in an int of 32 bits. Longer messages are cut, or counted in
# larger items. Half of what fits leaves room for padding.
_LONGEST = 2**30


class HalfPrecisionMpiCommunicator(CommunicatorOptions, mpi_communicator_base.MpiCommunicatorBase):
    """ChainerMN communicator for CPUs that computes the exact mean of float16 gradients.

    Each worker's gradient is rounded to ``allreduce_grad_dtype`` once, as on the wire. A float16
    value is a multiple of 2**-24 and below 2**16 in magnitude. So a float64 holds the sum of up to
    8,192 such values exactly. The mean does not depend on the order of the ranks, or on how the
    workers are spread over processes. The sum is divided in float64 and rounded to float16 once.

    The wire carries float16. An all-to-all acts as the reduce-scatter, and an all-gather follows.
    Each rank sends 2 (P - 1) / P float16 values per element and holds two float16 buffers. A
    process that plays several workers calls :meth:`add_grad` for each worker, then
    :meth:`mean_grad`. Its partial sums are float64, in memory and on the wire of the
    reduce-scatter.

    Deviation: NCCL rounds the sum to float16 after every addition, and divides in float16.
    ``accumulate='ring'`` reproduces this, in the order of the workers, from rank to rank. It is for
    study only: the ranks wait for each other. Every rank except rank 0 keeps the gradients of each
    of its workers.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        allreduce_grad_dtype (str or dtype): ``'float16'``, ``'float32'`` or ``'float64'``. With the
            last two, the sum of ``'exact'`` depends on the grouping of workers, in the last bits of
            a float64.
        accumulate (str): ``'exact'`` or ``'ring'``.
        gradient_scale, stop_on_nonfinite: See :func:`create_communicator`.

    Attributes:
        cast_counts (array): int64 [4], counted while this process's gradients are rounded: nonzero
            elements before the cast, then nonzero, infinite and NaN elements after the cast. The
            counts grow until the array is set to zero.
    """

    checks: ClassVar[dict] = {**CommunicatorOptions.checks, 'accumulate': checked_accumulate}
    timer = staticmethod(untimed)

    def __init__(self, mpi_comm, allreduce_grad_dtype='float16', *, accumulate='exact', **options):
        super().__init__(mpi_comm, allreduce_grad_dtype, **options)
        self.set_config('accumulate', accumulate)
        self.cast_counts = np.zeros(4, np.int64)
        self._wire = self._sum = self._received = None
        self._kept = []
        self._error = None  # of a call of add_grad
        self._layout = []
        self._counts = None  # [parameters, 4], for this iteration
        self._culprits = {}  # parameter to this process's workers with a non-finite gradient
        self._n_added = 0

    def multi_node_mean_grad(self, model, zero_fill=False):
        """Replaces the model's gradients by their mean over the ranks. Each rank is one worker.

        Args:
            model (~chainer.Link): All ranks must have the same parameters.
            zero_fill (bool): Whether a missing gradient counts as zeros. If not, its parameter is
                skipped; the gradient must then be missing on all ranks.

        Raises:
            ValueError: On every rank: two ranks have gradients of different parameters or shapes,
                or have added different numbers of workers.
            NonFiniteGradients: On every rank: the mean is infinite or NaN.
        """
        self._n_added = 0
        self.add_grad(model, zero_fill)
        self.mean_grad(model)

    def bcast_data(self, model):
        """Gives every rank the parameters of rank 0, in arrays of any memory layout.

        Args:
            model (~chainer.Link): Parameters without a size are left out.

        Raises:
            ValueError: On every rank: the ranks have parameters of different names, shapes or
                dtypes, one is on a GPU, or a rank other than 0 has a read-only one.
        """
        params = sorted_params(model)
        layout = [(name, param.shape, param.dtype.str) for name, param in params]
        self.agree(BROADCASTS, layout, error=self._obstacle(params))
        for _, param in params:
            array = param.array
            in_order = array if array.flags.c_contiguous else np.array(array, order='C')
            for piece in _pieces(in_order):
                self.mpi_comm.Bcast(piece)
            if in_order is not array and self.rank > 0:
                array[...] = in_order

    def _obstacle(self, params):
        """Returns what keeps this rank from a broadcast; None if nothing does."""
        for name, param in params:
            if not isinstance(param.array, np.ndarray):
                return ValueError(
                    f'the parameter {name} is not on the CPU: call model.to_cpu(), or choose the '
                    'communicator pure_nccl'
                )
            if self.rank > 0 and not param.array.flags.writeable:
                return ValueError(
                    f'the parameter {name} is read-only, as memory-mapped files and buffers are. '
                    'Set a copy: array.copy()'
                )
        return None

    def add_grad(self, model, zero_fill=False):
        """Adds one worker's gradients, rounded to the wire's dtype, to this process's sum.

        :meth:`mean_grad` raises the errors, on every rank, so that no rank waits for another.
        """
        # A call that is interrupted leaves nothing: the next call begins a new sum.
        n_added, self._n_added = self._n_added, 0
        if n_added == 0:
            self._error = None
        if self._error is None:
            try:
                self._add_grad(params_with_grad(model, zero_fill), n_added)
            except Exception as error:  # noqa: BLE001  (mean_grad raises it on every rank)
                self._error = error
        self._n_added = n_added + 1

    def mean_grad(self, model):
        """Replaces the model's gradients by the mean over all added workers.

        Every rank must have added the same number of workers. Whatever is raised, the next call of
        :meth:`add_grad` begins a new sum.

        Raises:
            RuntimeError: On every rank: no worker was added.
            ValueError: On every rank: as in :meth:`multi_node_mean_grad`, or the workers of one
                process have gradients of different parameters or shapes.
            NonFiniteGradients: As in :meth:`multi_node_mean_grad`.
        """
        n_added, self._n_added = self._n_added, 0
        layout, error = (self._layout, self._error) if n_added else ([], None)
        self.agree(AVERAGES, layout, n_added, error)
        if n_added == 0:
            raise RuntimeError('mean_grad needs a call of add_grad before it for each worker')
        mean = self._ring_mean(n_added) if self.accumulate == 'ring' else self._exact_mean(n_added)
        self.cast_counts += self._counts.sum(axis=0)
        with self.timer('pack'):
            names = self._unpack(mean, dict(model.namedparams()))
        if names and self.stop_on_nonfinite:
            first = self.rank * n_added
            self.raise_nonfinite(names, self._what_was_sent(first if n_added > 1 else None))

    def _add_grad(self, params, n_added):
        layout = [(name, param.shape) for name, param in params]
        if n_added == 0:
            self._layout = layout
            self._counts = np.zeros((len(layout), 4), np.int64)
            self._culprits.clear()
            self._kept.clear()
        elif layout != self._layout:
            differing = sorted({name for name, _ in set(layout) ^ set(self._layout)})
            raise ValueError(
                f'worker {n_added} of rank {self.rank} and the previous worker have '
                f'gradients of different parameters: {", ".join(differing)}'
            )
        if self.accumulate == 'ring':
            self._pack(params, n_added)
            self._add_to_ring()
        else:
            self._add_exactly(params, n_added)

    def discard(self):
        """Forgets the gradients that were added since the last mean: their iteration has failed."""
        self._n_added, self._error = 0, None
        self._kept.clear()

    def _pack(self, params, worker):
        size = sum(param.data.size for _, param in params)
        not_finite = self._counts[:, 2:].sum(axis=1)
        # Each rank sums one chunk; the padding is not read. All messages are whole items, also
        # those of the float64 sums.
        item = _item(8 * size)
        chunk = -(-size // (self.size * item)) * item
        self._wire = _buffer(self._wire, chunk * self.size, self.allreduce_grad_dtype)
        grads = [np.zeros_like(p.data) if p.grad is None else p.grad for _, p in params]
        kernels.pack(grads, self.gradient_scale, self._wire[:size], self._counts)
        for i in np.flatnonzero(self._counts[:, 2:].sum(axis=1) > not_finite):
            self._culprits.setdefault(i, []).append(worker)

    def _unpack(self, mean, params):
        """Returns the names of the parameters whose mean is not finite."""
        names = [name for name, _ in self._layout]
        for name in names:
            if params[name].grad is None:
                params[name].grad = np.empty_like(params[name].data)
        own_gradients([params[name] for name in names])
        grads = [params[name].grad for name in names]
        size = sum(grad.size for grad in grads)
        not_finite = kernels.unpack(mean[:size], self.gradient_scale, grads)
        return [names[i] for i in np.flatnonzero(not_finite)]

    def _what_was_sent(self, first_worker):
        """Returns, for each parameter, the number of its non-finite values and their workers."""
        sent = {}
        for i, workers in self._culprits.items():
            sent[self._layout[i][0]] = f'{self._counts[i, 2]} inf and {self._counts[i, 3]} NaN'
            if first_worker is not None:
                numbers = first_few([str(first_worker + worker) for worker in workers])
                sent[self._layout[i][0]] += f' of worker {numbers}'
        return sent

    def _add_exactly(self, params, n_added):
        if n_added == 1:
            self._sum = _buffer(self._sum, self._wire.size, np.float64)
            kernels.widen(self._wire, self._sum)
        self._pack(params, n_added)
        if n_added > 0:
            kernels.add(self._wire, self._sum)

    def _exact_mean(self, n_added):
        n_workers = n_added * self.size
        if n_workers == 1:
            return self._wire
        wire = self._wire.reshape(self.size, -1)
        mean = wire[self.rank]
        if n_added == 1:
            kernels.mean(self._received_from_others(), n_workers, mean, mean, self.rank)  # [H]
        else:  # in place, without a second buffer of this size
            sums = self._sum.reshape(self.size, -1)
            if self.size > 1:
                self.mpi_comm.Alltoall(MPI.IN_PLACE, _items(sums))
            kernels.mean(sums, n_workers, mean)
        if self.size > 1:
            self.mpi_comm.Allgather(MPI.IN_PLACE, _items(self._wire))
        return self._wire

    def _received_from_others(self):
        """Returns the other ranks' values of this rank's chunk. Its own values stay in place."""
        chunk = self._wire.size // self.size
        self._received = _buffer(self._received, self._wire.size - chunk, self._wire.dtype)
        sent, kind = _items(self._wire)
        counts = np.full(self.size, sent.nbytes // kind.size // self.size)
        counts[self.rank] = 0
        places = np.cumsum(counts) - counts
        self.mpi_comm.Alltoallv(
            [sent, (counts, counts.max() * np.arange(self.size)), kind],
            [self._received.view(np.uint8), (counts, places), kind],
        )
        return self._received.reshape(self.size - 1, chunk)

    def _add_to_ring(self):
        if self._kept and self.rank == 0:
            _add_rounded(self._wire, self._kept[0])
        else:  # rank 0's first worker, or one that waits for the sum of the ranks before
            self._kept.append(self._wire)
            self._wire = None

    def _ring_mean(self, n_added):
        if self.rank == 0:
            total = self._kept.pop()
        else:
            total = np.empty_like(self._kept[0])
            for piece in _pieces(total):
                self.mpi_comm.Recv(piece, self.rank - 1)
        for wire in self._kept:
            _add_rounded(wire, total)
        self._kept.clear()
        if self.rank + 1 < self.size:
            for piece in _pieces(total):
                self.mpi_comm.Send(piece, self.rank + 1)
        else:
            n_workers = n_added * self.size
            # A float32 quotient, rounded to float16, equals the float16 quotient.
            wider = np.promote_types(total.dtype, np.float32)
            total[...] = np.divide(total, n_workers, dtype=wider)
        for piece in _pieces(total):
            self.mpi_comm.Bcast(piece, self.size - 1)
        return total


def _buffer(buffer, size, dtype):
    """Returns ``buffer`` if its size and dtype fit, or else a new one."""
    if buffer is not None and buffer.size == size and buffer.dtype == dtype:
        return buffer
    return np.empty(size, dtype)


def _bytes(array):
    """Returns a contiguous array as bytes: MPI has no float16."""
    return array.reshape(-1).view(np.uint8)


def _pieces(array):
    """Yields the bytes of a contiguous array, in messages that are not too long."""
    whole = _bytes(array)
    for start in range(0, len(whole), _LONGEST):
        yield [whole[start : start + _LONGEST], MPI.BYTE]


def _item(n_bytes) -> int:
    """Returns the bytes, a power of two, of the items in which MPI counts so many bytes."""
    return 1 << max(0, (-(-n_bytes // _LONGEST) - 1).bit_length())


def _items(array):
    """Returns the bytes of a contiguous array, and the items in which MPI counts them."""
    return [_bytes(array), _kind(_item(array.nbytes))]


@functools.cache
def _kind(item):
    return MPI.BYTE if item == 1 else MPI.BYTE.Create_contiguous(item).Commit()


def _add_rounded(source, target):
    with np.errstate(over='ignore', invalid='ignore'):
        target += source
