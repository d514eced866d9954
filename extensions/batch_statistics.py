"""Batch normalization without moving averages: the last minibatch's, averaged."""

from __future__ import annotations

import itertools

import chainer
import numpy as np
from chainer import links, training
from chainer.backends import cuda
from chainer.training import extension
from mpi4py import MPI


class _NoteCount(chainer.LinkHook):
    """Notes how many values per channel normalized a BatchNormalization's last minibatch."""

    def forward_postprocess(self, args):
        if chainer.config.train:
            x = args.args[0] if args.args else args.kwargs['x']
            args.link.last_count = x.size // args.link.avg_mean.size


class AllreduceBatchStatistics(training.Extension):
    """Averages the last minibatch's BN statistics over all workers (S)::

        [N]  mean = 1/n sum_w mean_w        var = 1/n sum_w var_w

    with mean_w and var_w those of worker w's last minibatch: ``avg_mean`` and ``avg_var`` of a
    BatchNormalization with ``decay=0``. The average of the variances leaves out the spread of the
    means; that is what the paper does. ``pooled_variance=True`` gives that of the union of all the
    minibatches instead, as ``np.var`` defines it.

    All links travel in one all-reduce of float64, through host memory, so that no CUDA-aware MPI is
    needed. All ranks hold the same bits afterwards, and a second call changes none. The sums of
    float32 statistics are exact unless a worker's is 2**26 times smaller than another's, hence
    independent of how the workers are spread over processes.

    It runs before the evaluator and before any snapshot that is triggered by the same iteration,
    whatever order they were added in: give it a ``trigger`` that fires whenever one of theirs does.

    A process that plays several workers calls :meth:`add_worker` after the forward pass of each
    one, and :meth:`clear` before the first of an iteration, as
    :class:`~extensions.virtual_workers.VirtualWorkersUpdater` does. Without that, the links'
    present statistics count as the process's one worker.

    Deviation: Chainer's ``avg_var`` is the unbiased variance, m / (m - 1) times the one that
        normalized.

    Args:
        model (~chainer.Link): Its BatchNormalization links are averaged.
        comm (~chainermn.CommunicatorBase): All ranks must have as many workers each.
        pooled_variance (bool): See above.

    Attributes:
        wants_every_worker (bool): Whether a process that plays one worker calls :meth:`clear` and
            :meth:`add_worker` in every iteration, too.

    Raises:
        ValueError: A BatchNormalization has a ``decay`` other than 0, or no size yet, because no
            minibatch went through it; it is named.
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
                'without moving averages, every BatchNormalization needs decay=0; not so: '
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
        """Forgets the workers added so far."""
        self._n_workers = 0

    def add_worker(self):
        """Adds the statistics of the minibatch that the model has just seen."""
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
        """Moves the links' statistics into a buffer [2, channels] for each dtype, and leaves views.

        From then on the links write there themselves. Arrays that the links have got since, on
        another device for instance, are moved again.
        """
        for name, link in self._links:
            if link.avg_mean is None:
                raise ValueError(f'{name} has no statistics yet: no minibatch went through it')
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
        """Means and mean squares: from Chainer's unbiased variance, m / (m - 1) of the biased.

        What :meth:`__call__` wrote, or a snapshot that was loaded, is biased already.
        """
        counts = [np.full(link.avg_mean.size, link.last_count or 1) for _, link in self._links]
        count = np.concatenate(counts)[channels]
        biased = np.maximum(count - 1, 1) / count
        xp = chainer.backend.get_array_module(buffer)
        mean, var = buffer.astype(np.float64)
        return xp.stack([mean, var * xp.asarray(biased) + mean**2])


class MovingBatchStatistics(AllreduceBatchStatistics):
    """What the paper does without: moving averages over the iterations, averaged over all workers::

        mean <- decay mean + (1 - decay) 1/n sum_w mean_w    from 0; var alike, from 1

    These are the average of what n workers have of whom each keeps the moving averages of Chainer's
    own ``BatchNormalization(decay)``. The links keep ``decay=0``, so that the moving averages do
    not depend on which worker comes last in a process; nor on the processes, but for the rounding
    of float64.

    Args:
        model, comm: As in :class:`AllreduceBatchStatistics`.
        decay (float): 0.9 is Chainer's default.

    Raises:
        ValueError: ``decay`` is not in (0, 1), or as :class:`AllreduceBatchStatistics`.
    """

    wants_every_worker = True

    def __init__(self, model, comm, decay=0.9):
        if not 0 < decay < 1:
            raise ValueError(f'decay must be above 0 and below 1, not {decay}')
        super().__init__(model, comm)
        self._decay = decay
        self._moving = None  # float64 [2, channels], of this process's workers

    def clear(self):
        """Takes the workers of the iteration before into the moving averages."""
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
        """Gives every process the average of all. Collective; to be called before it is saved."""
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
