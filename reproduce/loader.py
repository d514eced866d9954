"""Processes that decode images ahead of the training, started so that MPI never notices.

Nothing here, nor what it imports, may import MPI or Chainer: every loader process imports it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import sys
import threading

import numpy as np

from reproduce import images, leftovers


def start_forkserver():
    """Starts the server that forks loader processes; call it before anything imports
    ``mpi4py.MPI``.

    A process forked after MPI has opened InfiniBand can crash or hang. The signals that stop a
    training are the rank's to handle: mpiexec sends them to all processes of its group.
    """
    # Semaphores with a name by which they can be found when all their processes were killed.
    prefix = f'/reproduce-{os.getpid()}'
    multiprocessing.current_process()._config['semprefix'] = prefix  # type: ignore[attr-defined]
    leftovers.remove_after_end(f'/dev/shm/sem.{prefix[1:]}-*')
    leftovers.remove_after_end(multiprocessing.util.get_temp_dir())
    multiprocessing.set_forkserver_preload(['reproduce.loader'])  # instead of the main script
    handlers = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGUSR1)}
    multiprocessing.forkserver.ensure_running()  # what is ignored stays so in a new program
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


class _LoaderProcess(multiprocessing.context.ForkServerProcess):
    """A process that does not import the main script: that would start MPI in each of them."""

    def start(self):
        main = sys.modules['__main__']
        hidden = {
            name: main.__dict__.pop(name)
            for name in ('__file__', '__spec__')
            if name in main.__dict__
        }
        main.__spec__ = None
        try:
            super().start()
        finally:
            main.__dict__.update(hidden)


class _Context(multiprocessing.context.ForkServerContext):
    Process = _LoaderProcess


class ImageLoader:
    """Minibatches of training and validation, decoded ahead by processes of its own.

    Which images a training minibatch has, and how they are augmented, depends on nothing but the
    seed, the iteration and the worker: not on the number of processes, nor on what was loaded
    before.

    Args:
        train, val (ImageFolder): The images.
        order (ImageOrder): Which images belong to a worker in an iteration.
        preprocessing (Preprocessing): What is done to each.
        seed (int): Of the augmentation.
        workers (range): The workers whose minibatches will be asked for, in this order in every
            iteration.
        n_processes (int): 0: the calling process decodes, when it is asked.
        prefetch (int): Minibatches that are decoded ahead; two per process by default.

    Raises:
        DataError: An image cannot be decoded; when its minibatch is asked for.
        RuntimeError: A loader process died; when the next minibatch is asked for.
    """

    def __init__(
        self, train, val, order, preprocessing, seed, workers, n_processes=0, prefetch=None
    ):
        self._train, self._val, self._order = train, val, order
        self._arguments = (train, val, preprocessing, seed)
        self._workers = workers
        self._prefetch = prefetch or 2 * n_processes
        self._ahead = collections.deque()  # of ((iteration, worker), future)
        self._executor = None
        if n_processes:
            self._executor = concurrent.futures.ProcessPoolExecutor(
                n_processes, _Context(), initializer=_initialize, initargs=self._arguments
            )

    def train_batch(self, iteration: int, worker: int) -> tuple[np.ndarray, np.ndarray]:
        """A worker's minibatch: uint8 [b, H, W, 3], int32 labels [b]."""
        wanted = (iteration, worker)
        if self._executor is None:
            return self._labelled(self._load_train(wanted)(*self._arguments), wanted)
        if not self._ahead or self._ahead[0][0] != wanted:
            self._forget()
            self._ahead.append((wanted, self._submit(self._load_train(wanted))))
        while len(self._ahead) <= self._prefetch:
            following = self._next(self._ahead[-1][0])
            self._ahead.append((following, self._submit(self._load_train(following))))
        _, future = self._ahead.popleft()
        return self._labelled(self._result(future), wanted)

    def validation_batches(self, start: int, stop: int, batch_size: int):
        """Iterates over validation images [start, stop): uint8 [b, H, W, 3], int32 labels [b]."""
        ranges = [range(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]
        pending: collections.deque = collections.deque()
        for position, indices in enumerate(ranges):
            if self._executor is None:
                pixels = _LoadValidation(indices)(*self._arguments)
            else:
                last = min(position + self._prefetch + 1, len(ranges))
                for ahead in ranges[position + len(pending) : last]:
                    pending.append(self._submit(_LoadValidation(ahead)))
                pixels = self._result(pending.popleft())
            yield pixels, self._val.labels[indices.start : indices.stop]

    def close(self, wait=True):
        """Ends the loader processes; ``wait=False`` returns at once."""
        self._forget()
        if self._executor is not None:
            self._executor.shutdown(wait)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        # An error must not wait for a process that hangs; an ending that all ranks agreed on can.
        self.close(wait=kind is None or getattr(kind, 'agreed', False))

    def _load_train(self, wanted):
        return _LoadTrain(*self._order(*wanted))

    def _labelled(self, pixels, wanted):
        _, indices = self._order(*wanted)
        return pixels, self._train.labels[indices]

    def _next(self, place):
        iteration, worker = place
        if worker == self._workers[-1]:
            return iteration + 1, self._workers[0]
        return iteration, worker + 1

    def _submit(self, task):
        try:
            return self._executor.submit(_run, task)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise self._died() from error

    def _result(self, future):
        # The pool itself does not notice a process that died while it wrote a result.
        while not concurrent.futures.wait([future], timeout=1).done:
            processes = self._executor._processes or {}
            if any(process.exitcode is not None for process in list(processes.values())):
                raise self._died()
        try:
            return future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise self._died() from error

    def _died(self):
        return RuntimeError(
            'a process that loads images died (killed, or out of memory?); '
            '--loader-processes 0 does without'
        )

    def _forget(self):
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()


class _LoadTrain:
    """A task: the pixels of one training minibatch."""

    def __init__(self, epochs, indices):
        self._epochs, self._indices = epochs, indices

    def __call__(self, train, val, preprocessing, seed):
        return np.stack(
            [
                images.train_image(
                    train.path(index), images.augmentation_rng(seed, epoch, index), preprocessing
                )
                for epoch, index in zip(self._epochs, self._indices)
            ]
        )


class _LoadValidation:
    """A task: the pixels of one validation minibatch."""

    def __init__(self, indices):
        self._indices = indices

    def __call__(self, train, val, preprocessing, seed):
        return np.stack(
            [images.validation_image(val.path(index), preprocessing) for index in self._indices]
        )


_arguments: tuple = ()  # of every task, sent once to each loader process


def _initialize(*arguments):
    global _arguments
    _arguments = arguments
    os.setpgrp()  # out of the reach of signals to the rank's group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the pool ends its processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner():
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(task):
    return task(*_arguments)
