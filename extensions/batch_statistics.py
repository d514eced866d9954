"""Batch normalization without moving averages: the last minibatch's, averaged."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import links, training
from chainer.backends import cuda
from chainer.training import extension
from mpi4py import MPI


class _CountPerChannel(chainer.LinkHook):
    """Notes how many values per channel a BatchNormalization saw in its last forward pass."""

    def forward_postprocess(self, args):
        x = args.args[0]
        args.link.last_count = x.size // args.link.avg_mean.size


class AllreduceBatchStatistics(training.Extension):
    """Averages the last minibatch's BN statistics over all workers (S)::

        [B]  mean = 1/n sum_w mean_w        var = 1/n sum_w var_w

    with mean_w and var_w those of worker w's last minibatch: ``avg_mean`` and ``avg_var`` of a
    BatchNormalization with ``decay=0``. The average of the variances leaves out the spread of the
    means; that is what the paper does. ``pooled_variance=True`` gives that of the union of all the
    minibatches instead, as ``np.var`` defines it.

    All links travel in one all-reduce of float64, through host memory, so that no CUDA-aware MPI is
    needed. All ranks hold the same bits afterwards. It runs before the evaluator and before any
    snapshot, whatever order they were added in.

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

    Raises:
        ValueError: A BatchNormalization has a ``decay`` other than 0, or has no statistics yet; it
            is named.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER + 100

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
                link.add_hook(_CountPerChannel(), 'CountPerChannel')
        self.clear()

    def clear(self):
        """Forgets the workers added so far."""
        self._n_workers = 0
        self._sum = None

    def add_worker(self):
        """Adds the statistics of the minibatch that the model has just seen."""
        if not self._links:
            return
        xp = chainer.backend.get_array_module(self._arrays()[0])
        flat = xp.concatenate(self._arrays()).astype(np.float64)
        if self._pooled_variance:
            mean, var = xp.split(flat, 2)
            biased = xp.asarray(self._biased_fraction())
            flat = xp.concatenate([mean, var * biased + mean**2])
        self._sum = flat if self._sum is None else self._sum + flat
        self._n_workers += 1

    def __call__(self, trainer=None):
        if not self._links:
            return
        if self._n_workers == 0:
            self.add_worker()
        total = np.ascontiguousarray(cuda.to_cpu(self._sum))
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)  # [B]
        total /= self._n_workers * self._comm.size
        self.clear()
        if self._pooled_variance:
            mean, square = np.split(total, 2)
            total = np.concatenate([mean, square - mean**2])
        self._write(total)

    def _arrays(self):
        for name, link in self._links:
            if link.avg_mean is None:
                raise ValueError(f'{name} has no statistics yet: no minibatch went through it')
        return [link.avg_mean for _, link in self._links] + [
            link.avg_var for _, link in self._links
        ]

    def _write(self, flat):
        arrays = self._arrays()
        flat = chainer.backend.get_array_module(arrays[0]).asarray(flat)
        start = 0
        for array in arrays:
            array[...] = flat[start : start + array.size].reshape(array.shape)
            start += array.size

    def _biased_fraction(self):
        """(m - 1) / m of each channel: from Chainer's unbiased variance to the biased."""
        count = np.concatenate(
            [np.full(link.avg_mean.size, link.last_count, np.float64) for _, link in self._links]
        )
        return np.maximum(count - 1, 1) / count
