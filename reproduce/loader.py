"""Decodes images ahead of the training, in processes that MPI does not know of, or in threads.

Every loader process imports this module. It must import neither MPI nor Chainer, nor anything that
does.
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
import shutil
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import reduction
from pathlib import Path

import numpy as np

from reproduce import images
from reproduce.listing import BadImage, DataError

# A socket's path has 107 bytes at most. The server's is TMPDIR/pymp-XXXXXXXX/listener-XXXXXXXX.
_LONGEST_TMPDIR = 107 - len('/pymp-XXXXXXXX/listener-XXXXXXXX')


def start_forkserver(remove_after_end=lambda path: None):
    """Starts the server that forks loader processes.

    Call this function before anything imports ``mpi4py.MPI``: a process that is forked after MPI
    has opened InfiniBand can crash or hang. The server ignores the signals that stop a training.
    mpiexec and batch systems send them to all processes of a rank, but only the rank handles them.

    Args:
        remove_after_end (callable): Takes the path of each file that a kill would leave behind.
    """
    # Semaphores get names by which they can be found after a kill of all their processes.
    prefix = f'/reproduce-{os.getpid()}'
    multiprocessing.current_process()._config['semprefix'] = prefix  # type: ignore[attr-defined]
    remove_after_end(f'/dev/shm/sem.{prefix[1:]}-*')
    remove_after_end(_folder_for_sockets())
    multiprocessing.set_forkserver_preload(['reproduce.loader'])  # instead of the main script
    # Ignored by processes from their birth on: signals may come before _initialize does.
    ignored = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in ignored}
    # The server looks for modules in its folder first; there another "reproduce" may be.
    here = os.open('.', os.O_PATH)
    os.chdir(Path(__file__).resolve().parents[1])
    multiprocessing.forkserver.ensure_running()  # a new program inherits ignored signals
    os.fchdir(here)
    os.close(here)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def _folder_for_sockets() -> str:
    """Returns multiprocessing's temporary folder: in TMPDIR unless that is too long for sockets."""
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TMPDIR and 'tempdir' not in config:
        for parent in ('/tmp', '/var/tmp', '/dev/shm'):
            if os.access(parent, os.W_OK | os.X_OK):
                config['tempdir'] = tempfile.mkdtemp(prefix='pymp-', dir=parent)
                remove = (shutil.rmtree, (config['tempdir'], True))
                multiprocessing.util.Finalize(None, *remove, exitpriority=-100)
                break
    return multiprocessing.util.get_temp_dir()


# Ends a loader process. A batch system that ends a job sends SIGTERM to each of its processes, but
# the rank still needs images for the iteration that is under way.
_END = signal.SIGUSR2


class _LoaderProcess(multiprocessing.context.ForkServerProcess):
    """A process that does not import the main script, which would start MPI."""

    def terminate(self):
        """Ends the process, for the pool."""
        self._popen._send_signal(_END)

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
    """Runs each task at once, in the thread that submits the task."""

    def submit(self, function, *arguments):
        future: concurrent.futures.Future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001  (the future raises it)
            future.set_exception(error)
        return future


def parse(how: str) -> tuple[str, int]:
    """Reads ``serial``, ``threads:N`` or ``processes:N``.

    Args:
        how (str): One of the three forms.

    Returns:
        tuple: The kind (``'serial'``, ``'threads'`` or ``'processes'``), and N; 0 for ``serial``.

    Raises:
        ValueError: ``how`` has none of the three forms.
    """
    match = re.fullmatch(r'(?:serial|(threads|processes):([1-9]\d*))', how)
    if not match:
        raise ValueError(f'{how!r}, but must be serial, threads:N or processes:N')
    return match[1] or 'serial', int(match[2] or 0)


class _Slots:
    """A ring of buffers. Each task writes one minibatch into a buffer.

    Args:
        n, batch_size, side (int): Number of buffers, images in each, and pixels of a side.
        shared (bool): Whether loader processes are to map the memory.

    Attributes:
        pixels (uint8 array): The buffers, [slots, batch, side, side, 3].
        futures (list): For each slot, the future of the last minibatch to be written into it.
    """

    def __init__(self, n, batch_size, side, shared=False):
        self._shape = n, batch_size, side, side, 3
        self._fd = _nameless_memory(int(np.prod(self._shape))) if shared else None
        self.pixels = _map(self._fd, self._shape) if shared else np.empty(self._shape, np.uint8)
        self.futures = [None] * n
        self._turns = 0

    def next(self) -> int:
        """Returns the next slot. Its old contents become invalid."""
        slot = self._turns % len(self.futures)
        self._turns += 1
        return slot

    def close(self):
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None  # another file may get the number

    def share(self) -> tuple:
        """Returns the arguments with which a new process can map the memory."""
        return _File(self._fd), self._shape


def _nameless_memory(size) -> int:
    """Returns a file of ``size`` bytes without a name: it goes when its processes end, in any way.

    It is memory, to which the limit of /dev/shm does not apply. Old kernels and Pythons that were
    built for them have no such files. Then it is a removed file in /dev/shm or TMPDIR.
    """
    try:
        fd = os.memfd_create('minibatches')
        os.ftruncate(fd, size)
        return fd
    except (AttributeError, OSError) as error:
        reason: Exception = error
    for folder in ('/dev/shm', tempfile.gettempdir()):
        try:
            fd, path = tempfile.mkstemp(dir=folder)
            os.unlink(path)
            os.posix_fallocate(fd, 0, size)  # else a full disk would end the process by SIGBUS
            return fd
        except OSError as error:
            reason = error
    raise DataError(
        f'no shared memory for --loader processes: {reason}; free space in /dev/shm or TMPDIR, or '
        'give --loader serial'
    )


class _File:
    """An open file, to hand over to a process at its start."""

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
        place: (iteration, worker) in training, index of the first image in validation.
        indices (array): Indices of the images.
        keys (list): (seed, epoch, image) of each image, for the augmentation; None in validation.
        pixels (uint8 array): The decoded images, as soon as they are complete.
        future (~concurrent.futures.Future): Returns {position: message} of the images that could
            not be decoded.
    """

    place: object
    indices: np.ndarray
    keys: list | None
    pixels: np.ndarray
    future: concurrent.futures.Future


class ImageLoader:
    """Loads minibatches for training and validation, and decodes the next ones ahead.

    Seed, iteration and worker determine the images of a training minibatch and their augmentation.
    Neither the decoding process nor earlier minibatches change the result.

    Args:
        train, val (ImageFolder): Training and validation images.
        order (ImageOrder): Assigns images to each worker in each iteration.
        preprocessing (Preprocessing): How to crop, resize and flip images.
        seed (int): Seed of the augmentation.
        workers (range): The workers whose minibatches the caller requests, in this order in every
            iteration.
        how (str): ``'processes:N'`` or ``'threads:N'`` decode ahead. ``'serial'`` decodes in the
            calling process, on request.
        validation_batch_size (int): Images per minibatch in validation.
        bad_images (str): ``'error'`` raises DataError if an image cannot be decoded. ``'skip'``
            replaces the image in training with the next decodable one of the listing. The new image
            has its own label, and the crop that was drawn for the bad image. In validation,
            ``'skip'`` sets the pixels to 0 and the label to -1, which the evaluator does not count.
        prefetch (int): Number of minibatches to decode ahead. By default, two per process or
            thread.

    Attributes:
        train, val (ImageFolder): As given.
        bad (dict): The images skipped so far, as {path: message}.

    Raises:
        DataError: An image cannot be read, or cannot be decoded and is not skipped. Raised by the
            request for the image's minibatch.
        RuntimeError: A loader process died. Raised by the next request for a minibatch.
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
        # One slot for each minibatch ahead, and one for the minibatch that the caller uses.
        side, n_slots = preprocessing.image_size, self._prefetch + 1
        shared = kind == 'processes'
        self._slots = (
            _Slots(n_slots, order.local_batch_size, side, shared),
            _Slots(n_slots, validation_batch_size, side, shared),
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
        """Returns a worker's minibatch.

        Args:
            iteration (int): Iteration, from 0.
            worker (int): Worker, one of ``workers``.

        Returns:
            tuple: Images, uint8 [b, H, W, 3], valid until the next request; labels, int32 [b].
        """
        wanted = (iteration, worker)
        if not self._ahead or self._ahead[0].place != wanted:
            # Dropped, not cancelled: after a cancel, Python before 3.12 fails if a process dies.
            self._ahead.clear()
            self._ahead.append(self._start_train(wanted))
        while len(self._ahead) <= self._prefetch:
            self._ahead.append(self._start_train(self._next(self._ahead[-1].place)))
        return self._finish(self._ahead.popleft(), self.train)

    def validation_batches(self, start: int, stop: int):
        """Iterates over minibatches of the validation images [start, stop).

        Args:
            start, stop (int): Range of images.

        Yields:
            tuple: Images, uint8 [b, H, W, 3], valid until the next minibatch; labels, int32 [b], -1
                for a skipped image.
        """
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
        # After an error, do not wait: a process may hang. After an ending of all ranks, wait.
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
            self._wait(previous)  # a process may still write an earlier, dropped minibatch
        paths = [(self.train, self.val)[which].path(index) for index in indices]
        pixels = slots.pixels[slot, : len(paths)]
        try:
            if isinstance(self._executor, concurrent.futures.ProcessPoolExecutor):
                if self._dead():  # since Python 3.12, submit() waits until the other processes end
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
                raise DataError(f'{message}, or skip the image: --bad-images skip')
            labels[position] = self._replace(batch, position, message, folder)
        return batch.pixels, labels

    def _replace(self, batch, position, message, folder) -> int:
        """Replaces a bad image, or blanks it in validation. Returns the new label."""
        index = int(batch.indices[position])
        label, instead = -1, 'validation does not count it'
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
            label, instead = folder.labels[other], f'the run uses {folder.name(other)} instead'
        path = folder.path(index)
        if path not in self.bad:
            print(f'note: {message}; {instead}', file=sys.stderr, flush=True)
        self.bad[path] = message
        return label

    def _wait(self, future):
        # The pool does not notice if a process dies while it writes a result.
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
        # The others may wait for ever for a lock of the dead process, and the pool for the others.
        for process in self._processes.values():
            process.kill()
        # An exit code can be read only once, and the pool's own thread reads it. Wait for that.
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and any(p._popen.returncode is None for p in dead):
            time.sleep(0.01)
        # The pool ends processes by _END, so a process with another ending died first.
        ended = sorted(dead, key=lambda process: process.exitcode == -_END)
        pid, code = (ended[0].pid, ended[0].exitcode) if ended else ('?', None)
        how = f'by {signal.Signals(-code).name}' if code and code < 0 else f'with status {code}'
        return RuntimeError(
            f'process {pid} that loads images ended {how}. It may have been killed or run out of '
            'memory. Use --loader serial to avoid loader processes'
        )


def _fill(pixels, paths, keys, preprocessing) -> dict:
    """Decodes images into ``pixels``: for training if there are ``keys``, else for validation.

    Returns:
        dict: The images that cannot be decoded, as {position: message}.
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
        except BadImage as error:
            bad[position] = str(error)
    return bad


_shared: list = []  # in a loader process: the preprocessing, and both arrays of slots


def _initialize(preprocessing, *shared):
    _shared[:] = [preprocessing]
    for fd, shape in shared:
        _shared.append(_map(fd, shape))
        os.close(fd)
    faulthandler.enable()  # shows where a decoder crashed
    os.setpgrp()  # signals to the rank's group do not arrive here
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner():
    multiprocessing.parent_process().join()
    os._exit(1)


def _fill_shared(which, slot, paths, keys):
    preprocessing, *slots = _shared
    return _fill(slots[which][slot, : len(paths)], paths, keys, preprocessing)
