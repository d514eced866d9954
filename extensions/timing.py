"""Where the time of an iteration goes, part by part."""

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
    """Adds up the seconds of the parts of an iteration: ``with timer('data'): ...``.

    One clock runs through, and each moment belongs to one part: the innermost ``with`` that is
    open, or ``'extensions'`` where none is. So the parts sum to the whole. Each ``'update'`` that
    ends is an iteration.

    On a CPU the clock is ``time.perf_counter``. On a GPU it is that of the current stream: where a
    part begins and ends, a CUDA event is recorded, and read when the device has passed it; the host
    never waits. What the host does while the device still has work costs nothing and is in no part;
    once the device is idle, it waits, and that time is of the part that the host is in: images that
    are not ready, MPI, the extensions.

    Args:
        on_gpu (bool): Which clock.
        skip (int): Iterations, from the first on, that are left out: caches and memory pools fill
            up in them, and libraries choose their algorithms.

    Attributes:
        seconds (dict): Part to seconds since the last :meth:`take`.
        iterations (int): Likewise.
    """

    def __init__(self, on_gpu=False, skip=3):
        self._clock = _StreamClock() if on_gpu else _HostClock()
        self._skip = skip
        self._open = ['extensions']
        self._ended = collections.deque()  # not read yet: the part, when, and if it is complete
        self._last = self._clock.now()
        self._clear()

    def _clear(self):
        self.seconds = dict.fromkeys(_ALL, 0.0)
        self.iterations = 0

    @contextlib.contextmanager
    def __call__(self, part):
        self._end(False)
        self._open.append(part)
        try:
            yield
        finally:
            self._end(True)
            self._open.pop()

    def _end(self, complete):
        self._ended.append((self._open[-1], self._clock.now(), complete))
        self.read()

    def read(self):
        """Adds what the clock has passed."""
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
        """What was added since the last call: seconds by part, and iterations. Without a complete
        iteration it is nothing, and kept for the next call."""
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
        self._events = []  # to be used again

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
    """The steps of ChainerMN's ``pure_nccl``, each in its part; a base before its own class.

    The all-reduce and the division by the number of ranks after it are one step there.
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
    """Reports where the time went since the last call, in seconds.

    Means over the iterations, without the first of the run, and of each the largest of all ranks:
    ``time/data`` (waiting for the images, and bringing them to the device),
    ``time/forward_backward``, ``time/pack`` (casts to the wire's dtype and back),
    ``time/allreduce`` (with waiting for ranks that are late), ``time/update``,
    ``time/extensions`` (everything else, checkpoints included) and ``time/iteration``, their sum.
    Of ranks that differ, the maxima sum to more than the iteration: those that are early wait in
    the all-reduce. ``time/validation`` is in none of them, and not per iteration: it is the seconds
    since the last call.

    A process that plays several workers has the sums over them. ChainerMN's ``naive`` does not
    pack: its gradients' whole way is in ``time/allreduce``.

    It gives the updater, the communicator and the evaluator their ``timer``. One message per call.
    What was not reported yet can be saved after :meth:`gather`.

    Args:
        comm (~chainermn.CommunicatorBase): The processes.
        evaluator (~extensions.evaluation.ExactEvaluator): Runs before this extension.
        skip (int): See :class:`Timer`.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER - 1

    def __init__(self, comm, evaluator, skip=3):
        self._comm = comm
        self._evaluator = evaluator
        self._skip = skip
        self._timer = None
        # Seconds of the parts, the iteration and the validation; iterations and reports.
        self._since_report = np.zeros(len(_ALL) + 3)
        self._of_run = np.zeros(len(_ALL) + 3)

    def initialize(self, trainer):
        device = trainer.updater.get_optimizer('main').target.device
        self._timer = Timer(device.xp is not np, self._skip)
        for timed in (trainer.updater, self._comm, self._evaluator):
            timed.timer = self._timer

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
        """Gives every process the times of all. Collective; to be called before it is saved."""
        seconds, n = self._timer.take()
        *parts, validation = seconds.values()
        means = np.array([*parts, sum(parts)]) / max(n, 1)
        own = np.array([*means, validation, n, 0])
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, own, MPI.MAX)
        own[: len(means)] *= own[-2]
        self._since_report += own

    def summary(self) -> dict:
        """Means over the reports of the whole run, by the same names without ``time/``, and the
        number of ``iterations``; the validation's are per report."""
        return _means(self._of_run)

    def serialize(self, serializer):
        self._since_report = serializer('since_report', self._since_report)
        self._of_run = serializer('of_run', self._of_run)


def _means(sums) -> dict:
    *parts, validation, n_iterations, n_reports = map(float, sums)
    means = {name: s / max(n_iterations, 1) for name, s in zip((*PARTS, 'iteration'), parts)}
    return {
        **means,
        'validation': validation / max(n_reports, 1),
        'iterations': int(n_iterations),
    }
