"""An evaluation that counts every image exactly once, on any number of processes."""

from __future__ import annotations

import chainer
import numpy as np
from chainer import functions as F
from chainer import reporter, training
from chainer.backends import cuda
from chainer.training import extension
from mpi4py import MPI

from extensions.communicator_base import raise_together
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
        ValueError: ``batch_size`` is not above 0, or ``n_images`` is below 0.
        ValueError: A label is neither a class of the predictor nor -1.
        TypeError: The labels are not signed integers.
        RuntimeError: The evaluation failed on another rank, for one of these reasons or within an
            argument. The message names the rank and its error. So all ranks raise together.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER
    default_name = 'validation'

    def __init__(
        self, batches, predictor, comm, n_images, batch_size=1, converter=lambda batch: batch
    ):
        if batch_size < 1 or n_images < 0:
            raise ValueError(
                f'batch_size must be 1 or more, and n_images 0 or more, not {batch_size} and '
                f'{n_images}'
            )
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
        error = None
        try:
            try:
                self._evaluate_shard(counts, losses)
            except Exception as raised:  # noqa: BLE001  (the other ranks must not wait)
                error = raised
            self.minibatches_left = 0
            raise_together(self._comm.mpi_comm, error)
            self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, counts, MPI.SUM)
            self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, losses, MPI.SUM)  # adds only zeros: exact
        finally:
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

    def _evaluate_shard(self, counts, losses):
        start, stop = shard(self._comm.rank, self._comm.size, self._n_images, self._batch_size)
        self.minibatches_left = -(-(stop - start) // self._batch_size)
        self.after_minibatch()
        seen = 0
        if start < stop:
            with chainer.using_config('train', False), chainer.no_backprop_mode():
                for batch in self._batches(start, stop):
                    x, t = self._converter(batch)
                    number = (start + seen) // self._batch_size
                    seen += len(t)
                    batch_counts, loss = self._count(x, t)
                    counts += batch_counts
                    losses[min(number, len(losses) - 1)] += loss
                    self.minibatches_left -= 1
                    self.after_minibatch()
        if seen != stop - start:
            raise RuntimeError(
                f'rank {self._comm.rank} evaluated {seen} images of its {stop - start}'
            )

    def _count(self, x, t):
        logits = chainer.as_array(self._predictor(x))
        xp = chainer.backend.get_array_module(logits)
        if t.dtype.kind != 'i':
            raise TypeError(f'labels must be signed integers, not {t.dtype}')
        impossible = t[(t < -1) | (t >= logits.shape[1])]
        if impossible.size:
            raise ValueError(
                f'label {int(impossible[0])}: the predictor has the classes 0 to '
                f'{logits.shape[1] - 1}, and -1 is for an image that is not counted'
            )
        loss = F.softmax_cross_entropy(logits, t, reduce='no').array
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
