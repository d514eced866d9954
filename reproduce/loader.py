"""Decodes images ahead of the training, in processes that MPI never notices, or in threads.

Nothing here, nor what it imports, may import MPI or Chainer: every loader process imports it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import faulthandler
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.util
import os
import re
import signal
import sys
import threading
import time
from multiprocessing import reduction

import numpy as np

from reproduce import images
from reproduce.listing import DataError


def start_forkserver(remove_after_end=lambda path: None):
    """Starts the server that forks loader processes; call it before anything imports
    ``mpi4py.MPI``.

    A process forked after MPI has opened InfiniBand can crash or hang. The signals that stop a
    training are the rank's to handle: mpiexec sends them to all processes of its group.

    Args:
        remove_after_end (callable): Is told the path of each file that a kill would leave behind.
    """
    # Semaphores with a name by which they can be found when all their processes were killed.
    prefix = f'/reproduce-{os.getpid()}'
    multiprocessing.current_process()._config['semprefix'] = prefix  # type: ignore[attr-defined]
    remove_after_end(f'/dev/shm/sem.{prefix[1:]}-*')
    remove_after_end(multiprocessing.util.get_temp_dir())
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


class _Serial(concurrent.futures.Executor):
    """Does the work when it is asked for."""

    def submit(self, function, *arguments):
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001  (the future raises it)
            future.set_exception(error)
        return future


def parse(how: str) -> tuple[str, int]:
    """Kind and number of those who decode: ``serial``, ``threads:N`` or ``processes:N``.

    Raises:
        ValueError: It is none of these.
    """
    match = re.fullmatch(r'(?:serial|(threads|processes):([1-9]\d*))', how)
    if not match:
        raise ValueError(f'{how!r}, and must be serial, threads:N or processes:N')
    return match[1] or 'serial', int(match[2] or 0)


class _Slots:
    """Room for minibatches that loader processes write to, used in turn.

    The memory has no name, so that nothing is left of it when its processes are gone, however they
    ended; and no limit, as /dev/shm has.

    Attributes:
        pixels (uint8 array): [slots, batch, side, side, 3].
        futures (list): Of what was last to be written into each.
    """

    def __init__(self, n, batch_size, side):
        self._shape = n, batch_size, side, side, 3
        self._fd = os.memfd_create('minibatches')
        os.ftruncate(self._fd, int(np.prod(self._shape)))
        self.pixels = _map(self._fd, self._shape)
        self.futures = [None] * n
        self._turns = 0

    def next(self) -> int:
        """A slot; what it held before is no longer valid."""
        slot = self._turns % len(self.futures)
        self._turns += 1
        return slot

    def close(self):
        os.close(self._fd)

    def share(self) -> tuple:
        """What another process maps, for its arguments when it is started."""
        return _File(self._fd), self._shape


class _File:
    """An open file that is handed over to a process that is being started."""

    def __init__(self, fd):
        self._fd = fd

    def __reduce__(self):
        return _received, (reduction.DupFd(self._fd),)


def _received(duplicate):
    return duplicate.detach()


def _map(fd, shape):
    return np.frombuffer(mmap.mmap(fd, int(np.prod(shape))), np.uint8).reshape(shape)


@dataclasses.dataclass
class _Batch:
    """A minibatch that is being decoded.

    Attributes:
        place: What it is: (iteration, worker), or the first image of validation.
        indices (array): Of its images.
        keys (list): Seed, epoch and image of each, for the augmentation; None in validation.
        pixels (uint8 array): Where they come to lie.
        future (~concurrent.futures.Future): What could not be decoded: position to message.
    """

    place: object
    indices: np.ndarray
    keys: list | None
    pixels: np.ndarray
    future: concurrent.futures.Future


class ImageLoader:
    """Minibatches of training and validation, decoded ahead.

    Which images a training minibatch has, and how they are augmented, depends on nothing but the
    seed, the iteration and the worker: not on who decodes them, nor on what was loaded before.

    Args:
        train, val (ImageFolder): The images.
        order (ImageOrder): Which images belong to a worker in an iteration.
        preprocessing (Preprocessing): What is done to each.
        seed (int): Of the augmentation.
        workers (range): The workers whose minibatches will be asked for, in this order in every
            iteration.
        how (str): Who decodes: ``'processes:N'``, ``'threads:N'``, or ``'serial'``, the calling
            process when it is asked.
        validation_batch_size (int): Images of a minibatch of validation.
        bad_images (str): What becomes of an image that cannot be decoded. ``'error'`` raises.
            ``'skip'``: in training the next one of the listing that can be decoded takes its
            place, with its own label and the crop that the other would have had; in validation
            its pixels are 0 and its label -1, which the evaluator does not count.
        prefetch (int): Minibatches that are decoded ahead; two per process or thread by default.

    Attributes:
        train, val (ImageFolder): As given.
        bad (dict): Path to message of the images that were skipped so far.

    Raises:
        DataError: An image cannot be decoded; when its minibatch is asked for.
        RuntimeError: A loader process died; when the next minibatch is asked for.
    """

    def __init__(
        self,
        train,
        val,
        order,
        preprocessing,
        seed,
        workers,
        how='serial',
        validation_batch_size=64,
        bad_images='error',
        prefetch=None,
    ):
        self.train, self.val, self._order = train, val, order
        self._preprocessing, self._seed = preprocessing, seed
        self._workers = workers
        self._validation_batch_size = validation_batch_size
        self._skips = bad_images == 'skip'
        self.bad: dict = {}
        kind, n = parse(how)
        self._prefetch = 2 * n if prefetch is None else prefetch * (n > 0)
        self._ahead: collections.deque = collections.deque()
        # One for each minibatch ahead, and one for that in the caller's hands.
        side, n_slots = preprocessing.image_size, self._prefetch + 1
        self._slots = (
            _Slots(n_slots, order.local_batch_size, side),
            _Slots(n_slots, validation_batch_size, side),
        )
        self._processes: dict = {}
        self._executor: concurrent.futures.Executor = _Serial()
        if kind == 'threads':
            self._executor = concurrent.futures.ThreadPoolExecutor(n)
        elif kind == 'processes':
            self._executor = concurrent.futures.ProcessPoolExecutor(
                n,
                _Context(),
                initializer=_initialize,
                initargs=(preprocessing, *(slots.share() for slots in self._slots)),
            )

    def train_batch(self, iteration: int, worker: int) -> tuple[np.ndarray, np.ndarray]:
        """A worker's minibatch: uint8 [b, H, W, 3], valid until the next one is asked for, and
        int32 labels [b]."""
        wanted = (iteration, worker)
        if not self._ahead or self._ahead[0].place != wanted:
            # Not cancelled: Python before 3.12 then stumbles over a process that dies.
            self._ahead.clear()
            self._ahead.append(self._start_train(wanted))
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._start_train(self._next(self._ahead[-1].place)))
        return self._finish(self._ahead.popleft(), self.train)

    def validation_batches(self, start: int, stop: int):
        """Iterates over validation images [start, stop): uint8 [b, H, W, 3], valid until the next
        minibatch, and int32 labels [b]; -1 for an image that was skipped."""
        size = self._validation_batch_size
        ranges = iter([range(i, min(i + size, stop)) for i in range(start, stop, size)])
        ahead: collections.deque = collections.deque()
        while True:
            while len(ahead) <= self._prefetch and (indices := next(ranges, None)):
                ahead.append(self._start(1, indices.start, np.array(indices), None))
            if not ahead:
                return
            yield self._finish(ahead.popleft(), self.val)

    def close(self, wait=True):
        """Ends the loader processes or threads; ``wait=False`` returns at once."""
        self._executor.shutdown(wait, cancel_futures=True)
        for slots in self._slots:
            slots.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        # An error must not wait for a process that hangs; an ending that all ranks agreed on can.
        self.close(wait=kind is None or getattr(kind, 'agreed', False))

    def _next(self, place):
        iteration, worker = place
        if worker == self._workers[-1]:
            return iteration + 1, self._workers[0]
        return iteration, worker + 1

    def _start_train(self, place):
        epochs, indices = self._order(*place)
        keys = [(self._seed, int(epoch), int(index)) for epoch, index in zip(epochs, indices)]
        return self._start(0, place, indices, keys)

    def _start(self, which, place, indices, keys):
        slots = self._slots[which]
        slot = slots.next()
        previous = slots.futures[slot]
        if previous is not None:
            self._wait(previous)  # of a minibatch that was given up: it may still be written
        paths = [(self.train, self.val)[which].path(index) for index in indices]
        pixels = slots.pixels[slot, : len(paths)]
        try:
            if isinstance(self._executor, concurrent.futures.ProcessPoolExecutor):
                if self._dead():  # from Python 3.12 on, submit() waits until the others have ended
                    raise self._died()
                future = self._executor.submit(_fill_shared, which, slot, paths, keys)
                self._processes.update(self._executor._processes or {})
            else:
                future = self._executor.submit(_fill, pixels, paths, keys, self._preprocessing)
        except concurrent.futures.BrokenExecutor as error:
            raise self._died() from error
        slots.futures[slot] = future
        return _Batch(place, indices, keys, pixels, future)

    def _finish(self, batch, folder):
        self._wait(batch.future)
        try:
            bad = batch.future.result()
        except concurrent.futures.BrokenExecutor as error:
            raise self._died() from error
        labels = folder.labels[batch.indices]
        for position, message in bad.items():
            if not self._skips:
                raise DataError(f'{message}; --bad-images skip does without')
            labels[position] = self._replace(batch, position, message, folder)
        return batch.pixels, labels

    def _replace(self, batch, position, message, folder) -> int:
        """Puts something in the place of a bad image; returns its label."""
        index = int(batch.indices[position])
        label, instead = -1, 'not counted'
        if batch.keys is None:
            batch.pixels[position] = 0
        else:
            for step in range(1, len(folder)):
                other = (index + step) % len(folder)
                one = slice(position, position + 1)
                if not _fill(
                    batch.pixels[one], [folder.path(other)], batch.keys[one], self._preprocessing
                ):
                    break
            else:
                raise DataError(f'no image of {folder.root} can be decoded; {message}')
            label, instead = folder.labels[other], f'{folder.name(other)} instead'
        path = folder.path(index)
        if path not in self.bad:
            print(f'note: {message}; {instead}', file=sys.stderr, flush=True)
        self.bad[path] = message
        return label

    def _wait(self, future):
        # The pool itself does not notice a process that died while it wrote a result.
        while not concurrent.futures.wait([future], timeout=1).done:
            if self._dead():
                raise self._died()

    def _dead(self) -> list:
        ready = multiprocessing.connection.wait([p.sentinel for p in self._processes.values()], 0)
        return [
            process
            for process in self._processes.values()
            if process.sentinel in ready or process._popen.returncode is not None
        ]

    def _died(self):
        dead = self._dead()
        # The others may wait for ever for a lock that the dead one held, and the pool for them.
        for process in self._processes.values():
            process.kill()
        # The pool's own thread asks for the exit codes; only one can get them.
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and any(p._popen.returncode is None for p in dead):
            time.sleep(0.01)
        # It ends the others by SIGTERM.
        ended = sorted(dead, key=lambda process: process.exitcode == -signal.SIGTERM)
        pid, code = (ended[0].pid, ended[0].exitcode) if ended else ('?', None)
        how = f'by {signal.Signals(-code).name}' if code and code < 0 else f'with status {code}'
        return RuntimeError(
            f'process {pid} that loads images ended {how} (killed, or out of memory?); '
            '--loader serial does without processes'
        )


def _fill(pixels, paths, keys, preprocessing) -> dict:
    """Decodes images into ``pixels``, for training where there are keys of the augmentation.

    Returns:
        dict: Position to message of those that cannot be decoded.
    """
    bad = {}
    rng = np.random.RandomState(0)
    for position, path in enumerate(paths):
        try:
            if keys is None:
                images.validation_image(path, preprocessing, pixels[position])
            else:
                seed, epoch, index = keys[position]
                images.augmentation_rng(seed, epoch, index, rng)
                images.train_image(path, rng, preprocessing, pixels[position])
        except DataError as error:
            bad[position] = str(error)
    return bad


_shared: list = []  # in a loader process: the preprocessing, and the two arrays of slots


def _initialize(preprocessing, *shared):
    _shared[:] = [preprocessing]
    for fd, shape in shared:
        _shared.append(_map(fd, shape))
        os.close(fd)
    faulthandler.enable()  # a crash of a decoder shows where
    os.setpgrp()  # out of the reach of signals to the rank's group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the pool ends its processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner():
    multiprocessing.parent_process().join()
    os._exit(1)


def _fill_shared(which, slot, paths, keys):
    preprocessing, *slots = _shared
    return _fill(slots[which][slot, : len(paths)], paths, keys, preprocessing)
