"""Batch normalization without moving averages: the last minibatch's statistics are averaged."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import links, training
from chainer.backends import cuda
from chainer.training import extension
from mpi4py import MPI

from extensions.communicator_base import raise_together


class _NoteCount(chainer.LinkHook):
    """Notes how many values per channel a BatchNormalization's last minibatch had.

    Copies of the link share the hook as they share the statistics.

    Attributes:
        count (int): None if the variance is the one of ``np.var``, without Chainer's correction.
    """

    name = 'AllreduceBatchStatistics'

    def __init__(self):
        self.count = None

    @classmethod
    def of(cls, link):
        """Returns the link's hook. All extensions on a link share it."""
        if cls.name not in link.local_link_hooks:
            link.add_hook(cls())
        return link.local_link_hooks[cls.name]

    def forward_postprocess(self, args):
        if chainer.config.train:
            x = args.args[0] if args.args else args.kwargs['x']
            self.count = x.size // args.link.avg_mean.size


class AllreduceBatchStatistics(training.Extension):
    """Averages the last minibatch's BN statistics over all workers (S)::

        [N]  mean = 1/n sum_w mean_w        var = 1/n sum_w var_w

    mean_w and var_w are the statistics of worker w's last minibatch: ``avg_mean`` and ``avg_var``
    of a BatchNormalization with ``decay=0``. The average of the variances leaves out the spread of
    the means, as in the paper. ``pooled_variance=True`` includes this spread: the result is the
    variance of the union of all minibatches, as ``np.var`` defines it. If a forward pass uses a
    link several times, the statistics are those of the last use.

    One all-reduce of float64 carries all links. It goes through host memory and needs no CUDA-aware
    MPI. Afterwards all ranks hold the same bits. The sums of float32 statistics are exact, unless
    one worker's value is 2**26 times smaller than another's. An exact sum does not depend on how
    the workers are spread over processes. A second call changes no float32 or float16 statistics;
    it rounds float64 statistics and pooled variances once more.

    The arrays of the links are written in place, so copies of the model (``model.copy()``) see the
    averages.

    The extension runs before the evaluator and before any snapshot of the same iteration, even if
    it was added later. Its ``trigger`` must fire whenever the evaluator's or a snapshot's trigger
    fires.

    A process that plays several workers calls :meth:`clear` before the first worker of an
    iteration, and :meth:`add_worker` after each worker's forward pass.
    :class:`~extensions.virtual_workers.VirtualWorkersUpdater` makes these calls, if it has this
    extension as ``batch_statistics``. Without them, as beside Chainer's StandardUpdater, the links'
    current statistics count as the process's one worker.

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
        ValueError: A BatchNormalization has a ``decay`` other than 0. The message names the link.
        TypeError: A link of another kind keeps statistics of its own. The message names the link.
        ValueError: When the training starts: the extension needs every worker's statistics, and
            the updater does not have it as ``batch_statistics``.
        ValueError: When called: a link has no size yet because no minibatch has passed through it.
            The message names the link. If that is so on some ranks only, RuntimeError on the
            others.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER + 100
    wants_every_worker = False

    def __init__(self, model, comm, pooled_variance=False):
        self._links = _links_of(model)
        self._comm = comm
        self._counts = [_NoteCount.of(link) for _, link in self._links] if pooled_variance else None
        self._sum = None  # float64 [2, channels], of the workers added
        self._n_workers = 0

    def initialize(self, trainer):
        several = len(getattr(trainer.updater, 'workers', ())) > 1
        told = getattr(trainer.updater, 'batch_statistics', None) is self
        if self._links and (several or self.wants_every_worker) and not told:
            raise ValueError(
                f'{type(self).__name__} needs the statistics of every worker in every iteration, '
                f'but this {type(trainer.updater).__name__} does not pass them on: give the '
                'extension to VirtualWorkersUpdater, too, as batch_statistics'
            )
        self._repair()

    def clear(self):
        """Discards the workers added so far."""
        self._n_workers = 0

    def discard(self):
        """Discards the workers of an iteration that has failed, and what is not finite."""
        self._n_workers = 0
        self._repair()

    def add_worker(self):
        """Adds the statistics of the minibatch that the model has just processed."""
        if not self._links:
            return
        statistics = self._pooled() if self._counts else self._statistics()
        if self._n_workers == 0:
            self._sum = statistics
        else:
            self._sum += statistics
        self._n_workers += 1

    def __call__(self, trainer=None):
        if not self._links:
            return
        error = None
        try:
            if self._n_workers == 0:
                self.add_worker()
        except ValueError as raised:
            error = raised
        raise_together(self._comm.mpi_comm, error)
        total = cuda.to_cpu(self._sum)
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)  # [N]
        total *= 1 / (self._n_workers * self._comm.size)
        self._n_workers = 0
        if self._counts:
            mean, square = total
            square -= mean**2
            np.maximum(square, 0, out=square)  # rounding can make a small variance negative
            for hook in self._counts:
                hook.count = None
        self._write(total)

    def serialize(self, serializer):
        """Saves nothing: the model has the statistics. After loading, these are the ones."""
        if isinstance(serializer, chainer.Deserializer):
            self._n_workers = 0
            for hook in self._counts or ():
                hook.count = None

    def _statistics(self):
        """Returns the links' means and variances, float64 [2, channels]."""
        for name, link in self._links:
            if link.avg_mean is None:
                raise ValueError(f'{name} has no statistics yet: no minibatch passed through it')
        arrays = [link.avg_mean for _, link in self._links]
        arrays += [link.avg_var for _, link in self._links]
        with chainer.using_device(chainer.backend.get_device_from_array(*arrays)):
            xp = chainer.backend.get_array_module(*arrays)
            statistics = xp.concatenate([array.ravel() for array in arrays])
            return statistics.astype(np.float64).reshape(2, -1)

    def _pooled(self):
        """Returns means and mean squares, float64 [2, channels].

        Chainer's unbiased variance is m / (m - 1) times the biased variance, which is needed here.
        Without a count, no minibatch has passed since :meth:`__call__` wrote the biased one.
        """
        mean, var = self._statistics()
        sizes = [link.avg_mean.size for _, link in self._links]
        count = np.repeat([hook.count or 1 for hook in self._counts], sizes)
        biased = np.maximum(count - 1, 1) / count
        xp = chainer.backend.get_array_module(mean)
        return xp.stack([mean, var * xp.asarray(biased) + mean**2])

    def _write(self, total):
        device = chainer.backend.get_device_from_array(self._links[0][1].avg_mean)
        with chainer.using_device(device):
            mean, var = device.xp.asarray(total)
            start = 0
            for _, link in self._links:
                stop = start + link.avg_mean.size
                link.avg_mean[...] = mean[start:stop].reshape(link.avg_mean.shape)
                link.avg_var[...] = var[start:stop].reshape(link.avg_var.shape)
                start = stop

    def _repair(self):
        """Makes infinite and NaN statistics those of a new link.

        Chainer multiplies the old statistics by ``decay``, and 0 * NaN is NaN: one such minibatch
        would count in all later ones.
        """
        for _, link in self._links:
            for array, initial in ((link.avg_mean, 0), (link.avg_var, 1)):
                if array is not None:
                    xp = chainer.backend.get_array_module(array)
                    array[~xp.isfinite(array)] = initial


class MovingBatchStatistics(AllreduceBatchStatistics):
    """Moving averages over the iterations, averaged over all workers. The paper omits them::

        mean <- decay mean + (1 - decay) 1/n sum_w mean_w        starts at 0
        var  <- decay var  + (1 - decay) 1/n sum_w var_w         starts at 1

    The result equals the average over n workers that each use Chainer's
    ``BatchNormalization(decay)``. The links keep ``decay=0``, so the moving averages do not depend
    on which worker comes last in a process. They do not depend on the number of processes either,
    except for the rounding of float64. If a forward pass uses a link several times, only the last
    use counts.

    The extension works only as ``batch_statistics`` of a
    :class:`~extensions.virtual_workers.VirtualWorkersUpdater`, or of an updater of yours that calls
    :meth:`clear` and :meth:`add_worker` and has this attribute.

    Args:
        model, comm: As in :class:`AllreduceBatchStatistics`.
        decay (float): Decay of the moving averages, between 0 and 1; Chainer's default is 0.9.

    Raises:
        ValueError: ``decay`` is not between 0 and 1.
        ValueError, TypeError: As in :class:`AllreduceBatchStatistics`.
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
            moving = self._decay * xp.asarray(before) + share * self._sum
            self._moving, self._n_workers = moving, 0  # both or, on Ctrl-C, none

    def __call__(self, trainer=None):
        self.gather()
        if self._moving is not None:
            self._write(self._moving)

    def gather(self):
        """Gives every process the average over all processes. Collective; call it before saving."""
        self.clear()
        if self._moving is not None:
            own = cuda.to_cpu(self._moving)
            total = np.empty_like(own)
            self._comm.mpi_comm.Allreduce(own, total, MPI.SUM)
            self._moving = total / self._comm.size

    def serialize(self, serializer):
        super().serialize(serializer)
        self._moving = serializer('moving', self._moving)


def _links_of(model):
    """Returns the BatchNormalization links, each once, with their names."""
    found, moving, others = {}, [], []
    for name, link in sorted(model.namedlinks()):
        # Batch renormalization uses the averages in the forward pass of the training.
        if isinstance(link, links.BatchNormalization) and not isinstance(
            link, links.BatchRenormalization
        ):
            found.setdefault(id(link), (name, link))
            if link.decay != 0:
                moving.append(f'{name} (decay={link.decay})')
        elif hasattr(link, 'avg_mean'):
            others.append(f'{name} ({type(link).__name__})')
    if moving:
        raise ValueError(
            'without moving averages, every BatchNormalization needs decay=0. Found: '
            + ', '.join(moving)
        )
    if others:
        raise TypeError(
            'only the statistics of BatchNormalization can be averaged. Replace these links, or '
            f'pass the part of the model without them: {", ".join(others)}'
        )
    return list(found.values())
