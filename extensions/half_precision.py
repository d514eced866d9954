"""Half-precision all-reduce: gradients are float16 on the wire and float32 everywhere else."""

from __future__ import annotations

import math
import zlib
from typing import ClassVar

import chainer
import chainermn
import numpy as np
from chainer import reporter, training
from chainer.backends import cuda
from chainer.training import extension
from chainermn.communicators import mpi_communicator_base, pure_nccl_communicator
from mpi4py import MPI

from extensions import gpus, kernels
from extensions.gpus import CommunicatorError
from extensions.timing import TimedSteps, untimed

_DTYPES = ('float16', 'float32', 'float64')
NAMES = ('auto', 'mpi', 'pure_nccl', 'naive')
SUMS = ('exact', 'ring')


class NonFiniteGradients(ArithmeticError):
    """The mean gradient is infinite or NaN somewhere; the message names parameters and ranks.

    Attributes:
        agreed (bool): It is raised on all ranks together: none waits for another.
    """

    agreed = True


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
        'allreduce_grad_dtype': _wire_dtype(allreduce_grad_dtype),
        'gradient_scale': _power_of_two(gradient_scale),
        'stop_on_nonfinite': stop_on_nonfinite,
    }
    accumulate = _sum(accumulate)
    reason = 'asked for'
    if name in ('auto', 'pure_nccl'):
        sights = mpi_comm.allgather(gpus.look(mpi_comm.rank))
        name, reason = gpus.choose(name, sights)
    if name != 'mpi' and accumulate == 'ring':
        raise CommunicatorError(f'accumulate ring is for the communicator mpi, not for {name}')
    if name == 'naive':
        return _naive(mpi_comm, options, reason)
    if name == 'pure_nccl':
        number = gpus.own_gpus(sights)[mpi_comm.rank]
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


def _sum(accumulate) -> str:
    if accumulate not in SUMS:
        raise CommunicatorError(f'accumulate must be one of {", ".join(SUMS)}, not {accumulate!r}')
    return accumulate


def _power_of_two(scale) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise CommunicatorError(f'gradient_scale must be a number, not {scale!r}')
    if math.frexp(scale)[0] != 0.5 or not 2.0**-40 <= scale <= 2.0**40:
        raise CommunicatorError(
            f'gradient_scale must be a power of two, at most 2**40 and at least 2**-40, not {scale}'
        )
    return float(scale)


class _Options:
    """Options that are checked when they are set, belong to one communicator, and outlive split."""

    _checks: ClassVar[dict] = {
        'allreduce_grad_dtype': _wire_dtype,
        'gradient_scale': _power_of_two,
        'stop_on_nonfinite': bool,
    }

    def __init__(
        self,
        mpi_comm,
        allreduce_grad_dtype='float16',
        *,
        gradient_scale=1.0,
        stop_on_nonfinite=True,
        reason='asked for',
    ):
        super().__init__(mpi_comm)
        self.set_config('allreduce_grad_dtype', allreduce_grad_dtype)
        self.set_config('gradient_scale', gradient_scale)
        self.set_config('stop_on_nonfinite', stop_on_nonfinite)
        self.reason = reason

    def set_config(self, name, value=True, **kwargs):
        if name in self._checks:
            setattr(self, name, self._checks[name](value))
        else:
            super().set_config(name, value, **kwargs)

    def get_config(self, name=None):
        return getattr(self, name) if name in self._checks else super().get_config(name)

    def split(self, color, key):
        options = {name: getattr(self, name) for name in self._checks}
        return type(self)(self.mpi_comm.Split(color, key), **options, reason=self.reason)

    def _raise_nonfinite(self, names, sent):
        """Collective: all ranks have the same mean, so that all come here.

        Args:
            names (list of str): Parameters whose mean is not finite.
            sent (dict): What this rank sent of them that was not: parameter to words.
        """
        origins = {name: [] for name in names}
        where = f'rank {self.rank} on {MPI.Get_processor_name()}'
        for origin, what in self.mpi_comm.allgather((where, sent)):
            for name, words in what.items():
                origins[name].append(f'{words} from {origin}')
        overflow = f'finite on every rank, but the sum overflows {self.allreduce_grad_dtype}'
        culprits = [f'{name} ({_some(origins[name], ", ") or overflow})' for name in names]
        raise NonFiniteGradients(
            f'the mean gradient is infinite or NaN, and nothing was updated: '
            f'{_some(culprits, "; ")}. What overflows {self.allreduce_grad_dtype} fits with a '
            f'gradient_scale below {self.gradient_scale:g}; otherwise look at the learning rate '
            'and the images'
        )


def _some(items, separator, n=3):
    more = [f'and {len(items) - n} more'] if len(items) > n else []
    return separator.join([*items[:n], *more])


class HalfPrecisionNcclCommunicator(
    _Options, TimedSteps, pure_nccl_communicator.PureNcclCommunicator
):
    """ChainerMN's ``pure_nccl`` (S), with a scale for the gradients and a check of their mean.

    ChainerMN packs the gradients into one buffer of the wire's dtype, NCCL adds the buffers up,
    ChainerMN divides the sum, in the wire's dtype, and unpacks it, all on the null stream. The
    check reads one number back from the device in every iteration. What the rounding loses is not
    counted here.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks; the current device of each is its GPU.
        allreduce_grad_dtype, gradient_scale, stop_on_nonfinite: See :func:`create_communicator`.
    """

    def __init__(self, mpi_comm, allreduce_grad_dtype='float16', **options):
        super().__init__(mpi_comm, allreduce_grad_dtype, **options)
        # One kernel packs all parameters; ChainerMN's create_communicator chooses so too.
        self.set_config('batched_copy', True)

    def multi_node_mean_grad(self, model, zero_fill=False):
        """Replaces the model's gradients by their mean over the ranks.

        Raises:
            NonFiniteGradients: On every rank.
        """
        params = _params_with_grad(model, zero_fill)
        if self.gradient_scale != 1:
            for _, param in params:
                if param.grad is not None:
                    param.grad *= self.gradient_scale
        super().multi_node_mean_grad(model, zero_fill)
        if self.gradient_scale != 1:
            for _, param in params:
                param.grad *= 1 / self.gradient_scale
        if self.stop_on_nonfinite:
            self._check_mean(params)

    def _check_mean(self, params):
        sent, mean = (
            buffer.array(sum(param.size for _, param in params), dtype=self.allreduce_grad_dtype)
            for buffer in (self.gpu_buffer_a, self.gpu_buffer_b)
        )
        xp = chainer.backend.get_array_module(mean)
        if xp.isfinite(mean).all():
            return
        names, own, start = [], {}, 0
        for name, param in params:
            part = slice(start, start + param.size)
            start = part.stop
            if not xp.isfinite(mean[part]).all():
                names.append(name)
                n_inf, n_nan = int(xp.isinf(sent[part]).sum()), int(xp.isnan(sent[part]).sum())
                if n_inf or n_nan:
                    own[name] = f'{n_inf} inf and {n_nan} NaN'
        self._raise_nonfinite(names, own)


def device_of(comm):
    """The rank's device: with ``pure_nccl`` the current GPU, else the CPU.

    Returns:
        ~chainer.backend.Device: Of the communicator's gradients.
    """
    if not hasattr(comm, 'nccl_comm'):
        return chainer.get_device('@numpy')
    return chainer.get_device(f'@cupy:{cuda.cupy.cuda.runtime.getDevice()}')


class HalfPrecisionMpiCommunicator(_Options, mpi_communicator_base.MpiCommunicatorBase):
    """ChainerMN communicator for CPUs whose mean of float16 gradients is exact.

    Each worker's gradient is rounded to ``allreduce_grad_dtype`` once, as on the wire. Float16
    values are multiples of 2**-24 below 2**16, so that a float64 holds the sum of up to 8,192 of
    them exactly: the mean does not depend on the order of the ranks, nor on how workers are spread
    over processes. It is divided in float64 and rounded to float16 once.

    The wire carries float16: a reduce-scatter by all-to-all, then an all-gather, so that
    each rank sends 2 (P - 1) / P float16 values for each element, and holds two buffers of that
    type. A process that plays several workers calls :meth:`add_grad` for each and then
    :meth:`mean_grad`; its partial sums are float64, in memory and on the wire of the
    reduce-scatter.

    Deviation: NCCL's sum is rounded to float16 after every addition, and divided in float16.
    ``accumulate='ring'`` does so too, in the order of the workers, from rank to rank; it is for
    study: the ranks wait for each other, and all but rank 0 keep the gradients of each of their
    workers.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        allreduce_grad_dtype (str or dtype): ``'float16'``, ``'float32'`` or ``'float64'``. The
            exact sums of the last two depend on the grouping of workers, in the last bits of a
            float64.
        accumulate (str): ``'exact'`` or ``'ring'``.
        gradient_scale, stop_on_nonfinite: See :func:`create_communicator`.

    Attributes:
        cast_counts (array): int64 [4], what was counted since it was last set to zero in the pass
            that rounds this process's gradients: elements that were not zero, that are not zero
            afterwards, that are infinite, that are NaN.
    """

    _checks: ClassVar[dict] = {**_Options._checks, 'accumulate': _sum}
    timer = staticmethod(untimed)

    def __init__(self, mpi_comm, allreduce_grad_dtype='float16', *, accumulate='exact', **options):
        super().__init__(mpi_comm, allreduce_grad_dtype, **options)
        self.set_config('accumulate', accumulate)
        self.cast_counts = np.zeros(4, np.int64)
        self._wire = self._sum = self._received = None
        self._kept = []
        self._layout = []
        self._counts = None  # [parameters, 4], of this iteration
        self._culprits = {}  # parameter to the process's workers whose gradient was not finite
        self._n_added = 0

    def multi_node_mean_grad(self, model, zero_fill=False):
        """Replaces the model's gradients by their mean over the ranks, one worker each.

        Args:
            model (~chainer.Link): All ranks must have the same parameters.
            zero_fill (bool): Count a missing gradient as zeros; otherwise that parameter is passed
                over, and must be so on all ranks.

        Raises:
            ValueError: On every rank: the gradients of two ranks are of different parameters or
                shapes, or two ranks have added different numbers of workers.
            NonFiniteGradients: On every rank.
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
            self._counts = np.zeros((len(layout), 4), np.int64)
            self._culprits.clear()
            self._kept.clear()
        elif layout != self._layout:
            differing = sorted({name for name, _ in set(layout) ^ set(self._layout)})
            raise ValueError(
                f'worker {self._n_added} of rank {self.rank} and the one before it differ in '
                f'which gradients they have: {", ".join(differing)}'
            )
        if self.accumulate == 'ring':
            self._add_to_ring(params)
        else:
            self._add_exactly(params)
        self._n_added += 1

    def mean_grad(self, model):
        """Replaces the gradients by the mean over all added workers, as many on each rank.

        Raises:
            RuntimeError: No worker was added.
            ValueError, NonFiniteGradients: As in :meth:`multi_node_mean_grad`.
        """
        if self._n_added == 0:
            raise RuntimeError('mean_grad needs an add_grad before it, for each worker')
        self._check_that_ranks_agree()
        mean = self._ring_mean() if self.accumulate == 'ring' else self._exact_mean()
        n_workers, self._n_added = self._n_added, 0
        self.cast_counts += self._counts.sum(axis=0)
        with self.timer('pack'):
            names = self._unpack(mean, dict(model.namedparams()))
        if names and self.stop_on_nonfinite:
            first = self.rank * n_workers
            self._raise_nonfinite(names, self._what_was_sent(first if n_workers > 1 else None))

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
        size = sum(param.data.size for _, param in params)
        not_finite = self._counts[:, 2:].sum(axis=1)
        chunk = -(-size // self.size)  # each rank sums one chunk; nobody reads the padding
        self._wire = _buffer(self._wire, chunk * self.size, self.allreduce_grad_dtype)
        grads = [np.zeros_like(p.data) if p.grad is None else p.grad for _, p in params]
        kernels.pack(grads, self.gradient_scale, self._wire[:size], self._counts)
        for i in np.flatnonzero(self._counts[:, 2:].sum(axis=1) > not_finite):
            self._culprits.setdefault(i, []).append(self._n_added)

    def _unpack(self, mean, params):
        """Returns the names of the parameters whose mean is not finite."""
        names = [name for name, _ in self._layout]
        for name in names:
            if params[name].grad is None:
                params[name].grad = np.empty_like(params[name].data)
        grads = [params[name].grad for name in names]
        size = sum(grad.size for grad in grads)
        not_finite = kernels.unpack(mean[:size], self.gradient_scale, grads)
        return [names[i] for i in np.flatnonzero(not_finite)]

    def _what_was_sent(self, first_worker):
        """Of each parameter with values that are not finite: how many, and of which workers."""
        sent = {}
        for i, workers in self._culprits.items():
            sent[self._layout[i][0]] = f'{self._counts[i, 2]} inf and {self._counts[i, 3]} NaN'
            if first_worker is not None:
                numbers = _some([str(first_worker + worker) for worker in workers], ', ')
                sent[self._layout[i][0]] += f' of worker {numbers}'
        return sent

    def _add_exactly(self, params):
        if self._n_added == 1:
            self._sum = _buffer(self._sum, self._wire.size, np.float64)
            kernels.widen(self._wire, self._sum)
        self._pack(params)
        if self._n_added > 0:
            kernels.add(self._wire, self._sum)

    def _exact_mean(self):
        n_workers = self._n_added * self.size
        if n_workers == 1:
            return self._wire
        wire = self._wire.reshape(self.size, -1)
        mean = wire[self.rank]
        if self._n_added > 1:  # in place: there is no second buffer of this size
            sums = self._sum.reshape(self.size, -1)
            self.mpi_comm.Alltoall(MPI.IN_PLACE, _bytes(sums))
            kernels.mean(sums, n_workers, mean)
        else:
            kernels.mean(self._received_from_others(), n_workers, mean, mean, self.rank)  # [H]
        self.mpi_comm.Allgather(MPI.IN_PLACE, _bytes(self._wire))
        return self._wire

    def _received_from_others(self):
        """Their values of the chunk that this rank sums; its own stay where they are."""
        chunk = self._wire.size // self.size
        self._received = _buffer(self._received, self._wire.size - chunk, self._wire.dtype)
        counts = np.full(self.size, chunk * self._wire.itemsize)
        counts[self.rank] = 0
        places = np.cumsum(counts) - counts
        self.mpi_comm.Alltoallv(
            [self._wire.view(np.uint8), (counts, counts.max() * np.arange(self.size)), MPI.BYTE],
            [self._received.view(np.uint8), (counts, places), MPI.BYTE],
        )
        return self._received.reshape(self.size - 1, chunk)

    def _add_to_ring(self, params):
        self._pack(params)
        if self._kept and self.rank == 0:
            _add_rounded(self._wire, self._kept[0])
        else:  # rank 0's first, or what has to wait for the sum of the ranks before
            self._kept.append(self._wire)
            self._wire = None

    def _ring_mean(self):
        if self.rank == 0:
            total = self._kept.pop()
        else:
            total = np.empty_like(self._kept[0])
            self.mpi_comm.Recv(_bytes(total), self.rank - 1)
        for wire in self._kept:
            _add_rounded(wire, total)
        self._kept.clear()
        if self.rank + 1 < self.size:
            self.mpi_comm.Send(_bytes(total), self.rank + 1)
        else:
            n_workers = self._n_added * self.size
            # A float16 quotient is the same by way of float32.
            wider = np.promote_types(total.dtype, np.float32)
            total[...] = np.divide(total, n_workers, dtype=wider)
        self.mpi_comm.Bcast(_bytes(total), self.size - 1)
        return total


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


def _add_rounded(source, target):
    with np.errstate(over='ignore', invalid='ignore'):
        target += source


class CastReport(training.Extension):
    """Reports what the cast to the wire's dtype did to the gradients of all workers since the last
    call: ``cast/inf`` and ``cast/nan``, the numbers of elements that are infinite and NaN
    afterwards, and ``cast/flushed``, the share of the non-zero ones that became zero.

    One message per call. What was not reported yet can be saved after :meth:`gather`.

    Args:
        comm (HalfPrecisionMpiCommunicator): Its ``cast_counts`` are set to zero.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER

    def __init__(self, comm):
        self._comm = comm
        self._counts = np.zeros(4, np.int64)  # of all processes

    def __call__(self, trainer=None):
        self.gather()
        before, after, n_inf, n_nan = map(int, self._counts)
        self._counts[...] = 0
        share = (before - after) / max(before, 1)
        reporter.report({'cast/flushed': share, 'cast/inf': n_inf, 'cast/nan': n_nan})

    def gather(self):
        """Gives every process the counts of all. Collective; to be called before it is saved."""
        counts = np.empty_like(self._counts)
        self._comm.mpi_comm.Allreduce(self._comm.cast_counts, counts, MPI.SUM)
        self._comm.cast_counts[...] = 0
        self._counts += counts

    def serialize(self, serializer):
        self._counts = serializer('counts', self._counts)
