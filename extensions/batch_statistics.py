"""Batch normalization without moving averages: the last minibatch's statistics are averaged."""

from __future__ import annotations

import itertools

import chainer
import numpy as np
from chainer import links, training
from chainer.backends import cuda
from chainer.training import extension
from mpi4py import MPI


class _NoteCount(chainer.LinkHook):
    """Records the number of values per channel in a BatchNormalization's last minibatch."""

    def forward_postprocess(self, args):
        if chainer.config.train:
            x = args.args[0] if args.args else args.kwargs['x']
            args.link.last_count = x.size // args.link.avg_mean.size


class AllreduceBatchStatistics(training.Extension):
    """Averages the last minibatch's BN statistics over all workers (S)::

        [N]  mean = 1/n sum_w mean_w        var = 1/n sum_w var_w

    mean_w and var_w are the statistics of worker w's last minibatch: ``avg_mean`` and ``avg_var``
    of a BatchNormalization with ``decay=0``. The average of the variances leaves out the spread of
    the means, as in the paper. ``pooled_variance=True`` includes this spread: the result is the
    variance of the union of all minibatches, as ``np.var`` defines it.

    One all-reduce of float64 carries all links. It goes through host memory and needs no CUDA-aware
    MPI. Afterwards all ranks hold the same bits, and a second call does not change them. The sums
    of float32 statistics are exact, unless one worker's value is 2**26 times smaller than
    another's. An exact sum does not depend on how the workers are spread over processes.

    The extension runs before the evaluator and before any snapshot of the same iteration, even if
    it was added later. Its ``trigger`` must fire whenever the evaluator's or a snapshot's trigger
    fires.

    A process that plays several workers calls :meth:`clear` before the first worker of an
    iteration, and :meth:`add_worker` after each worker's forward pass.
    :class:`~extensions.virtual_workers.VirtualWorkersUpdater` makes these calls. Without them, the
    links' current statistics count as the process's one worker.

    Deviation: Chainer's ``avg_var`` is the unbiased variance: m / (m - 1) times the variance that
        normalized the m values of a channel.

    Args:
        model (~chainer.Link): Contains the BatchNormalization links.
        comm (~chainermn.CommunicatorBase): The processes. Each must play the same number of
            workers.
        pooled_variance (bool): Whether the variance includes the spread of the means.

    Attributes:
        wants_every_worker (bool): Whether a process that plays one worker must also call
            :meth:`clear` and :meth:`add_worker` in every iteration.

    Raises:
        ValueError: A BatchNormalization has a ``decay`` other than 0, or has no size yet because no
            minibatch has passed through it. The message names the link.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER + 100
    wants_every_worker = False

    def __init__(self, model, comm, pooled_variance=False):
        self._links = [
            (name, link)
            for name, link in sorted(model.namedlinks())
            if isinstance(link, links.BatchNormalization)
        ]
        moving = [f'{name} (decay={link.decay})' for name, link in self._links if link.decay != 0]
        if moving:
            raise ValueError(
                'without moving averages, every BatchNormalization needs decay=0. Found: '
                + ', '.join(moving)
            )
        self._comm = comm
        self._pooled_variance = pooled_variance
        if pooled_variance:
            for _, link in self._links:
                link.last_count = None
                link.add_hook(_NoteCount(), 'AllreduceBatchStatistics')
        self._buffers = []
        self._n_workers = 0

    def clear(self):
        """Discards the workers added so far."""
        self._n_workers = 0

    def add_worker(self):
        """Adds the statistics of the minibatch that the model has just processed."""
        if not self._links:
            return
        self._gather()
        for channels, buffer in self._buffers:
            statistics = self._pooled(buffer, channels) if self._pooled_variance else buffer
            if self._n_workers == 0:
                self._sum[:, channels] = statistics
            else:
                self._sum[:, channels] += statistics
        self._n_workers += 1

    def __call__(self, trainer=None):
        if not self._links:
            return
        if self._n_workers == 0:
            self.add_worker()
        total = cuda.to_cpu(self._sum)
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)  # [N]
        total *= 1 / (self._n_workers * self._comm.size)
        self._n_workers = 0
        if self._pooled_variance:
            mean, square = total
            square -= mean**2
            for _, link in self._links:
                link.last_count = None
        self._write(total)

    def _write(self, total):
        xp = chainer.backend.get_array_module(self._sum)
        for channels, buffer in self._buffers:
            buffer[...] = xp.asarray(total[:, channels])

    def _gather(self):
        """Moves the links' statistics into one buffer [2, channels] per dtype.

        The links keep views of the buffers, and write into them from then on. If a link gets new
        arrays, for instance on another device, the statistics are moved again.
        """
        for name, link in self._links:
            if link.avg_mean is None:
                raise ValueError(f'{name} has no statistics yet: no minibatch passed through it')
        bases = {id(base) for _, link in self._links for base in _bases(link)}
        if bases == {id(buffer) for _, buffer in self._buffers}:
            return
        self._links.sort(key=lambda item: item[1].avg_mean.dtype.name)
        self._buffers, stop = [], 0
        for _, group in itertools.groupby(self._links, lambda item: item[1].avg_mean.dtype):
            buffer = _move([link for _, link in group])
            start, stop = stop, stop + buffer.shape[1]
            self._buffers.append((slice(start, stop), buffer))
        with chainer.using_device(chainer.backend.get_device_from_array(buffer)):
            self._sum = chainer.backend.get_array_module(buffer).empty((2, stop), np.float64)

    def _pooled(self, buffer, channels):
        """Returns means and mean squares.

        Chainer's unbiased variance is m / (m - 1) times the biased variance, which is needed here.
        Statistics from :meth:`__call__` or from a loaded snapshot are biased already.
        """
        counts = [np.full(link.avg_mean.size, link.last_count or 1) for _, link in self._links]
        count = np.concatenate(counts)[channels]
        biased = np.maximum(count - 1, 1) / count
        xp = chainer.backend.get_array_module(buffer)
        mean, var = buffer.astype(np.float64)
        return xp.stack([mean, var * xp.asarray(biased) + mean**2])


class MovingBatchStatistics(AllreduceBatchStatistics):
    """Moving averages over the iterations, averaged over all workers. The paper omits them::

        mean <- decay mean + (1 - decay) 1/n sum_w mean_w        starts at 0
        var  <- decay var  + (1 - decay) 1/n sum_w var_w         starts at 1

    The result equals the average over n workers that each use Chainer's
    ``BatchNormalization(decay)``. The links keep ``decay=0``, so the moving averages do not depend
    on which worker comes last in a process. They do not depend on the number of processes either,
    except for the rounding of float64.

    Args:
        model, comm: As in :class:`AllreduceBatchStatistics`.
        decay (float): Decay of the moving averages, between 0 and 1; Chainer's default is 0.9.

    Raises:
        ValueError: ``decay`` is not between 0 and 1.
        ValueError: As in :class:`AllreduceBatchStatistics`.
    """

    wants_every_worker = True

    def __init__(self, model, comm, decay=0.9):
        if not 0 < decay < 1:
            raise ValueError(f'decay must be above 0 and below 1, not {decay}')
        super().__init__(model, comm)
        self._decay = decay
        self._moving = None  # float64 [2, channels], for this process's workers

    def clear(self):
        """Adds the previous iteration's workers to the moving averages."""
        if self._n_workers:
            xp = chainer.backend.get_array_module(self._sum)
            before = [[0.0], [1.0]] if self._moving is None else self._moving
            share = (1 - self._decay) / self._n_workers
            self._moving = self._decay * xp.asarray(before) + share * self._sum
        super().clear()

    def __call__(self, trainer=None):
        self.gather()
        if self._moving is not None:
            self._gather()
            self._write(self._moving)

    def gather(self):
        """Gives every process the average over all processes. Collective; call it before saving."""
        self.clear()
        if self._moving is not None:
            self._moving = cuda.to_cpu(self._moving)
            self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, self._moving, MPI.SUM)
            self._moving /= self._comm.size

    def serialize(self, serializer):
        self._moving = serializer('moving', self._moving)


def _bases(link):
    return link.avg_mean.base, link.avg_var.base


def _move(links_):
    device = chainer.backend.get_device_from_array(links_[0].avg_mean)
    channels = sum(link.avg_mean.size for link in links_)
    with chainer.using_device(device):
        buffer = device.xp.empty((2, channels), links_[0].avg_mean.dtype)
    start = 0
    for link in links_:
        stop = start + link.avg_mean.size
        for name, row in zip(('avg_mean', 'avg_var'), buffer):
            view = row[start:stop].reshape(link.avg_mean.shape)
            view[...] = getattr(link, name)
            setattr(link, name, view)
        start = stop
    return buffer
