"""Measures the time of an iteration, part by part."""

from __future__ import annotations

import collections
import contextlib
import time

import numpy as np
from chainer import reporter, training
from chainer.backends import cuda
from chainer.training import extension
from mpi4py import MPI

PARTS = ('data', 'forward_backward', 'pack', 'allreduce', 'update', 'extensions')
_ALL = (*PARTS, 'validation')


def untimed(part):
    """A timer that does nothing."""
    return contextlib.nullcontext()


class Timer:
    """Sums the seconds of the parts of an iteration: ``with timer('data'): ...``.

    One clock runs all the time. Each moment belongs to one part: the part of the innermost open
    ``with``, or ``'extensions'`` if none is open. So the parts sum to the whole. The end of each
    ``'update'`` without an exception completes an iteration.

    On a CPU the clock is ``time.perf_counter``. On a GPU it is the clock of the current stream. A
    CUDA event is recorded at the beginning and end of each part, and is read after the device has
    passed it. The host never waits. Host work takes no time on this clock while the device is busy.
    While the device is idle, the time belongs to the part that the host is in: images that are not
    ready, MPI, or the extensions.

    Args:
        on_gpu (bool): Whether the clock is the GPU's.
        skip (int): Number of iterations to leave out at the beginning. In these, caches and memory
            pools fill up, and libraries choose their algorithms.

    Attributes:
        seconds (dict): Maps each part to its seconds since the last :meth:`take`.
        iterations (int): Number of iterations since the last :meth:`take`.
    """

    def __init__(self, on_gpu=False, skip=3):
        self._clock = _StreamClock() if on_gpu else _HostClock()
        self._skip = skip
        self._open = ['extensions']
        self._ended = collections.deque()  # not read yet: part, moment, whether it is complete
        self._last = self._clock.now()
        self._clear()

    def _clear(self):
        self.seconds = dict.fromkeys(_ALL, 0.0)
        self.iterations = 0

    @contextlib.contextmanager
    def __call__(self, part):
        self._end(False)
        self._open.append(part)
        complete = False
        try:
            yield
            complete = True
        finally:
            self._end(complete)
            self._open.pop()

    def _end(self, complete):
        self._ended.append((self._open[-1], self._clock.now(), complete))
        self.read()

    def read(self):
        """Adds the parts whose end the clock has passed."""
        while self._ended and self._clock.has_passed(self._ended[0][1]):
            part, now, complete = self._ended.popleft()
            self.seconds[part] += self._clock.seconds(self._last, now)
            self._last = now
            if part == 'update' and complete:
                self.iterations += 1
                if self._skip:
                    self._skip -= 1
                    self._clear()

    def take(self) -> tuple[dict, int]:
        """Returns the seconds by part and the number of iterations since the last call.

        Without a complete iteration, all are 0, and the seconds are kept for the next call.
        """
        self._end(False)
        if not self.iterations:
            return dict.fromkeys(_ALL, 0.0), 0
        taken = self.seconds, self.iterations
        self._clear()
        return taken


class _HostClock:
    now = staticmethod(time.perf_counter)

    def has_passed(self, moment):
        return True

    def seconds(self, start, end):
        return end - start


class _StreamClock:
    def __init__(self):
        self._events = []  # for reuse

    def now(self):
        event = self._events.pop() if self._events else cuda.Event()
        event.record()
        return event

    def has_passed(self, event):
        return event.done

    def seconds(self, start, end):
        self._events.append(start)
        return cuda.cupy.cuda.get_elapsed_time(start, end) / 1000


class TimedSteps:
    """Times the steps of ChainerMN's ``pure_nccl``. A subclass lists this base before ChainerMN's.

    ChainerMN's all-reduce step includes the division by the number of ranks.
    """

    timer = staticmethod(untimed)

    def _pack_params_to_buffer(self, *args, **kwargs):
        with self.timer('pack'):
            super()._pack_params_to_buffer(*args, **kwargs)

    def _multi_node_mean_nccl(self, *args, **kwargs):
        with self.timer('allreduce'):
            super()._multi_node_mean_nccl(*args, **kwargs)

    def _unpack_params_from_buffer(self, *args, **kwargs):
        with self.timer('pack'):
            super()._unpack_params_from_buffer(*args, **kwargs)


class TimeReport(training.Extension):
    """Reports the time of each part since the last call, in seconds.

    Each value is the mean over the iterations, without the first ones after ``trainer.run()``, and
    the largest mean of all ranks:

    - ``time/data``: waiting for the images, and copying them to the device
    - ``time/forward_backward``
    - ``time/pack``: casts to the wire's dtype and back
    - ``time/allreduce``: includes waiting for late ranks
    - ``time/update``
    - ``time/extensions``: everything else, including checkpoints
    - ``time/iteration``: the sum of the above on one rank

    If the ranks differ, the maxima sum to more than the iteration, because early ranks wait in the
    all-reduce. ``time/validation`` is separate and not per iteration: it is the seconds of
    validation since the last call.

    If a process plays several workers, its times are sums over these workers. ChainerMN's ``naive``
    does not pack, so ``time/allreduce`` includes everything it does with gradients.

    During the training, the extension sets the ``timer`` of the updater, the communicator and the
    evaluator. Each call sends one message. Times that were not reported yet can be saved after
    :meth:`gather`. An exception that ends ``trainer.run()`` loses them.

    Args:
        comm (~chainermn.CommunicatorBase): The processes.
        evaluator (~extensions.evaluation.ExactEvaluator): Runs before this extension. None if there
            is no validation.
        skip (int): See :class:`Timer`.

    Raises:
        TypeError: ``evaluator`` times nothing, as Chainer's Evaluator.
        TypeError: When the training starts: the updater times nothing, as Chainer's
            StandardUpdater. :class:`~extensions.virtual_workers.VirtualWorkersUpdater` does.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER - 1

    def __init__(self, comm, evaluator, skip=3):
        if evaluator is not None:
            _check_that_it_times(evaluator, 'ExactEvaluator, or None without a validation')
        self._comm = comm
        self._evaluator = evaluator
        self._skip = skip
        self._timer = None
        self._timed = []
        # Seconds of the parts, the iteration and the validation; numbers of iterations and reports.
        self._since_report = np.zeros(len(_ALL) + 3)
        self._of_run = np.zeros(len(_ALL) + 3)

    def initialize(self, trainer):
        _check_that_it_times(trainer.updater, 'VirtualWorkersUpdater')
        device = trainer.updater.get_optimizer('main').target.device
        self._timer = Timer(device.xp is not np, self._skip)
        self._timed = [trainer.updater, self._comm]
        if self._evaluator is not None:
            self._timed.append(self._evaluator)
        for timed in self._timed:
            timed.timer = self._timer

    def finalize(self):
        for timed in self._timed:
            if timed.timer is self._timer:  # not that of a later TimeReport
                timed.timer = untimed

    def __call__(self, trainer=None):
        self.gather()
        self._since_report[-1] = 1
        means = _means(self._since_report)
        if means['iterations']:
            self._of_run += self._since_report
            self._since_report[...] = 0
            del means['iterations']
            reporter.report({f'time/{name}': seconds for name, seconds in means.items()})

    def gather(self):
        """Gives every process the times of the slowest. Collective; call it before saving."""
        seconds, n = self._timer.take()
        *parts, validation = seconds.values()
        means = np.array([*parts, sum(parts)]) / max(n, 1)
        own = np.array([*means, validation, n, 0])
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, own, MPI.MAX)
        own[: len(means)] *= own[-2]
        self._since_report += own

    def summary(self) -> dict:
        """Returns the means over all reported iterations of the run, and their number.

        Returns:
            dict: The reported names without ``time/``, and ``iterations``. The validation's seconds
                are per report.
        """
        return _means(self._of_run)

    def serialize(self, serializer):
        self._since_report = serializer('since_report', self._since_report)
        self._of_run = serializer('of_run', self._of_run)


def _check_that_it_times(timed, remedy):
    if not hasattr(timed, 'timer'):
        raise TypeError(
            f'TimeReport needs {remedy}: {type(timed).__name__} does not time its parts'
        )


def _means(sums) -> dict:
    *parts, validation, n_iterations, n_reports = map(float, sums)
    means = {name: s / max(n_iterations, 1) for name, s in zip((*PARTS, 'iteration'), parts)}
    return {
        **means,
        'validation': validation / max(n_reports, 1),
        'iterations': int(n_iterations),
    }
