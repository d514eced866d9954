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
    """Returns the images [start, stop) of a process, in whole minibatches.

    Each image belongs to exactly one process.
    """
    n_batches = -(-n_images // batch_size)
    start, stop = (r * n_batches // size * batch_size for r in (rank, rank + 1))
    return min(start, n_images), min(stop, n_images)


class ExactEvaluator(training.Extension):
    """Evaluates on shards without duplicates.

    It sums counts, and does not average the ranks' averages. ChainerMN's evaluator pads the shards
    with duplicates (176 of 50,000 at 1,024 workers) and averages the workers' means. Both bias
    top-1. This extension sums integers over all processes: the number of correct images and the
    number of images. A process may have no image.

    The loss does not depend on the number of processes either. The minibatches are the same on any
    number, because the last bits of a matrix product depend on its size. Their losses are added in
    float64, in the order of the minibatches.

    Reports, prefixed with the extension's name: ``main/loss`` (softmax cross-entropy per image),
    ``main/accuracy`` (top-1, a fraction), ``main/top5_accuracy`` (a fraction) and ``images`` (the
    number of counted images). It runs after the batch statistics and before the log.

    Args:
        batches (callable): ``batches(start, stop)`` iterates over minibatches of the validation
            images [start, stop). An image with the label -1 is not counted.
        predictor (~chainer.Link): Takes images and returns logits [N, classes].
        comm (~chainermn.CommunicatorBase): The processes.
        n_images (int): Images in the validation set.
        batch_size (int): Images per minibatch. A process evaluates whole minibatches.
        converter (callable): Turns a minibatch into the arrays (images, labels) on the predictor's
            device.

    Attributes:
        minibatches_left (int): Minibatches that this process has yet to evaluate. It is 0 while the
            process waits for the others, and None outside an evaluation.
        timer (~extensions.timing.Timer): Times the evaluation as the part ``'validation'``.
        after_minibatch (callable): Called without arguments before the first minibatch and after
            each minibatch, for progress.

    Raises:
        RuntimeError: ``batches`` yielded a wrong number of images, or no image can be counted.
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
            dict: The reported values.
        """
        name = getattr(self, 'name', None) or self.default_name
        with self.timer('validation'):
            observation = {f'{name}/{key}': value for key, value in self.evaluate().items()}
        reporter.report(observation)
        return observation

    def evaluate(self) -> dict:
        """Evaluates on all processes together. All processes return the same dict."""
        counts = np.zeros(3, np.int64)  # images, top-1 correct, top-5 correct
        losses = np.zeros(-(-self._n_images // self._batch_size))  # one per minibatch
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
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, losses, MPI.SUM)  # adds only zeros: exact
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
        # Count the classes that come before the true class. Among equal logits, the first class
        # comes first, as in argmax. A NaN logit comes before the true class; if the true class's
        # logit is NaN, all classes do.
        classes = xp.arange(logits.shape[1])
        true = logits[xp.arange(len(t)), t][:, None]
        before = ~(logits <= true) | ((logits == true) & (classes < t[:, None]))
        rank = before.sum(axis=1)
        counted = t >= 0
        sums = xp.stack([counted.sum(), (counted & (rank < 1)).sum(), (counted & (rank < 5)).sum()])
        return cuda.to_cpu(sums), float(cuda.to_cpu(loss.sum(dtype=np.float64)))
