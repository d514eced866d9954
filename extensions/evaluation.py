"""An evaluation that counts every image exactly once, on any number of processes."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import functions as F
from chainer import reporter, training
from chainer.backends import cuda
from chainer.training import extension
from mpi4py import MPI

from extensions.timing import untimed


def shard(rank, size, n_images, batch_size=1) -> tuple[int, int]:
    """The images [start, stop) of a process, whole minibatches; all processes together have each
    image once."""
    n_batches = -(-n_images // batch_size)
    start, stop = (r * n_batches // size * batch_size for r in (rank, rank + 1))
    return min(start, n_images), min(stop, n_images)


class ExactEvaluator(training.Extension):
    """Evaluates on shards without duplicates, and adds up counts instead of averaging averages.

    ChainerMN's own way pads the shards with duplicates (176 of 50,000 at 1,024 workers) and
    averages the workers' means; both bias top-1. Here the correct images and the images themselves
    are summed as integers over all processes; a process may have no image. The minibatches are the
    same on any number of processes, and their losses are added up in their order, in float64: so
    the loss, too, does not depend on it (a matrix product's last bits depend on its size).

    Reports, prefixed with the extension's name: ``main/loss`` (softmax cross-entropy per image),
    ``main/accuracy`` (top-1, a fraction), ``main/top5_accuracy`` and ``images`` (the number
    counted). It runs after the batch statistics and before the log.

    Args:
        batches (callable): ``batches(start, stop)`` iterates over minibatches of the validation
            images [start, stop). An image whose label is -1 is not counted.
        predictor (~chainer.Link): Takes images, returns logits [N, classes].
        comm (~chainermn.CommunicatorBase): The processes.
        n_images (int): Images of the validation set.
        batch_size (int): Images of a minibatch; a process has whole ones.
        converter (callable): Turns a minibatch into the arrays (images, labels) on the predictor's
            device.

    Attributes:
        minibatches_left (int): Of this process in the evaluation under way, 0 while it waits for
            the others; None outside.
        timer (~extensions.timing.Timer): Its part ``'validation'`` is this one.
        after_minibatch (callable): Called without arguments before the first and after each
            minibatch, for progress.

    Raises:
        RuntimeError: ``batches`` gave another number of images than there are, or none to count.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER
    default_name = 'validation'

    def __init__(
        self, batches, predictor, comm, n_images, batch_size=1, converter=lambda batch: batch
    ):
        self._batches = batches
        self._predictor = predictor
        self._comm = comm
        self._n_images = n_images
        self._batch_size = batch_size
        self._converter = converter
        self.minibatches_left = None
        self.timer = untimed
        self.after_minibatch = lambda: None

    def __call__(self, trainer=None):
        """Evaluates and reports.

        Returns:
            dict: What was reported.
        """
        name = getattr(self, 'name', None) or self.default_name
        with self.timer('validation'):
            observation = {f'{name}/{key}': value for key, value in self.evaluate().items()}
        reporter.report(observation)
        return observation

    def evaluate(self) -> dict:
        """Evaluates on all processes together; all of them return the same."""
        counts = np.zeros(3, np.int64)  # images, top-1 correct, top-5 correct
        losses = np.zeros(-(-self._n_images // self._batch_size))  # of all minibatches
        start, stop = shard(self._comm.rank, self._comm.size, self._n_images, self._batch_size)
        self.minibatches_left = -(-(stop - start) // self._batch_size)
        self.after_minibatch()
        seen = 0
        if start < stop:
            with chainer.using_config('train', False), chainer.no_backprop_mode():
                for batch in self._batches(start, stop):
                    number = (start + seen) // self._batch_size
                    seen += len(batch[1])
                    batch_counts, loss = self._count(*self._converter(batch))
                    counts += batch_counts
                    losses[min(number, len(losses) - 1)] += loss
                    self.minibatches_left -= 1
                    self.after_minibatch()
        if seen != stop - start:
            raise RuntimeError(
                f'rank {self._comm.rank} evaluated {seen} images of its {stop - start}'
            )
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, counts, MPI.SUM)
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, losses, MPI.SUM)  # with zeros: exact
        self.minibatches_left = None
        images, top1, top5 = (int(count) for count in counts)
        if images == 0:
            raise RuntimeError('no validation image can be counted')
        return {
            'main/loss': float(losses.sum()) / images,
            'main/accuracy': top1 / images,
            'main/top5_accuracy': top5 / images,
            'images': images,
        }

    def _count(self, x, t):
        logits = self._predictor(x).array
        loss = F.softmax_cross_entropy(logits, t, reduce='no').array
        xp = chainer.backend.get_array_module(logits)
        # How many classes come before the true one: of equal logits the first class does, as in
        # argmax, and with a NaN all of them do.
        classes = xp.arange(logits.shape[1])
        true = logits[xp.arange(len(t)), t][:, None]
        before = ~(logits <= true) | ((logits == true) & (classes < t[:, None]))
        rank = before.sum(axis=1)
        counted = t >= 0
        sums = xp.stack([counted.sum(), (counted & (rank < 1)).sum(), (counted & (rank < 5)).sum()])
        return cuda.to_cpu(sums), float(cuda.to_cpu(loss.sum(dtype=np.float64)))
