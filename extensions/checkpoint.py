"""Checkpoints: one file holds everything that a run needs to continue with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

import chainer
import numpy as np
from chainer import training
from chainer.backends import cuda
from mpi4py import MPI

from extensions.checkpoint_files import (
    BRANCH,
    PREFIX,
    SUFFIX,
    CheckpointError,
    as_json,
    checkpoints,
    iteration_of,
    newest,
    properties_of,
    read,
    write,
)

__all__ = [
    'CheckpointError',
    'Checkpointer',
    'Stopped',
    'checkpoints',
    'interval',
    'newest',
    'read',
    'resume',
    'write',
]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(Exception):
    """A signal ended the training after a checkpoint. All ranks raise this together.

    Attributes:
        signum (int): The signal's number.
        agreed (bool): All ranks raise together, so no rank waits for another.
    """

    agreed = True

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


class Checkpointer(training.Extension):
    """Saves the trainer, on rank 0, in FOLDER/checkpoint-ITERATION.npz, while the training goes on.

    All ranks wait while rank 0 copies the state. A thread of rank 0 then writes the copy: under a
    temporary name, flushed to the disk, read back, and renamed. So a file with its final name is
    complete. At most one checkpoint is under way. The copy takes as much memory as the file.

    A checksum covers every number in the file, and loading the file executes nothing from it. The
    file holds the state of all processes, so a run can continue on another number of processes. To
    collect this state, all ranks first call ``gather`` of every extension that has this method.
    Beside :class:`~extensions.VirtualWorkersUpdater` this is all that a run needs to continue.
    Beside Chainer's StandardUpdater it is not: all ranks would get the order of rank 0's iterator.
    Chainer saves neither the float32 copies of ``use_fp32_update()`` nor a dynamic loss scale.

    The last ``keep`` checkpoints remain. Only checkpoints that this run has written, before or
    after it was resumed, and that are older than the newest are removed.

    FOLDER/best.npz is the checkpoint with the highest ``validation/main/accuracy`` in the folder. A
    validation that exceeds it makes a checkpoint, whatever ``every`` says.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP, on any rank, end the training after the current iteration,
    with a checkpoint. All ranks then raise :class:`Stopped`. A second SIGINT ends the process at
    once. A second signal of another kind has no effect, since a scheduler may signal both mpiexec
    and the ranks. A SIGHUP that is ignored, as under nohup, stays so. Outside the main thread,
    where Python allows no handlers, signals do what they did before.

    If a checkpoint cannot be written, for instance on a full disk, a warning is printed and the
    training continues.

    Args:
        comm (~chainermn.CommunicatorBase): The processes. All ranks must have this extension.
        folder (str or Path): Folder of the checkpoints. Only rank 0 uses it.
        identity (dict): JSON values that must be the same for a run to continue.
        every (str): Interval: ``'1'`` is one epoch, ``'10m'`` is ten minutes.
        keep (int): Number of checkpoints to keep.

    Raises:
        ValueError: ``every`` is neither a number of epochs nor of minutes; ``keep`` is below 1;
            ``identity`` has a value that JSON has not.
    """

    trigger = (1, 'iteration')
    priority = -200  # after all reports, logs and prints of an iteration

    def __init__(self, comm, folder, identity, every='1', keep=2):
        if keep < 1:
            raise ValueError(f'the number of checkpoints to keep must be at least 1, not {keep}')
        self._comm = comm
        self._folder = Path(folder).absolute()
        self._identity = as_json(identity)
        self._epochs, self._seconds = interval(every)
        self._keep = keep
        self._signum = 0
        self._handlers = {}
        self._last = time.monotonic()
        self._epoch = 0
        self._copy = {}  # the state; its memory serves all checkpoints
        self._writer = None
        self._written = False  # whether the last one was
        self._best = -1.0  # top-1 accuracy of best.npz
        self._run = uuid.uuid4().hex  # goes on when the run is resumed
        self._at = 0  # the iteration of the last checkpoint
        self._own: list[int] = []  # iterations of the checkpoints that this run has written

    def initialize(self, trainer):
        if self._comm.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self._folder.glob(f'.{PREFIX}*'):
                unfinished.unlink()
            self._best = properties_of(self._folder / 'best.npz').get('top1', -1.0)
        self._epoch, self._at = trainer.updater.epoch, trainer.updater.iteration
        self._signum = 0
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in SIGNALS:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            self._handlers[signum] = signal.signal(signum, self._remember)

    def finalize(self):
        self._wait()
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers.clear()

    def _remember(self, signum, frame):
        if self._signum == signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self._signum = signum

    def __call__(self, trainer):
        wishes = np.array([self._signum, self._is_due(trainer)], np.int64)
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, wishes, MPI.MAX)
        signum, due = map(int, wishes)
        if not (signum or due):
            return
        self._last = time.monotonic()
        path = self.save(trainer, wait=bool(signum))
        if signum:
            raise Stopped(
                signum,
                f'stopped after iteration {trainer.updater.iteration:,}, '
                + (f'with checkpoint {path}' if path else 'but no checkpoint could be written'),
            )

    def _is_due(self, trainer) -> bool:
        epoch, before = trainer.updater.epoch, self._epoch
        self._epoch = epoch
        if self._epochs and epoch // self._epochs > before // self._epochs:
            return True
        if self._comm.rank > 0:
            return False
        if self._seconds and time.monotonic() - self._last >= self._seconds:
            return True
        top1 = _top1(trainer)
        if top1 is None:
            return False
        self._wait()  # the checkpoint under way may be the best
        return top1 > self._best

    def save(self, trainer, wait=True):
        """Saves a checkpoint. Collective: all ranks must call this method together.

        Args:
            trainer (~chainer.training.Trainer): The trainer to save.
            wait (bool): Whether to return only when the checkpoint is on the disk.

        Returns:
            str: The path of the checkpoint, on all ranks. With ``wait``, None if it was not
                written.
        """
        for entry in trainer._extensions.values():
            if hasattr(entry.extension, 'gather'):
                entry.extension.gather()
        path, error = None, None
        if self._comm.rank == 0:
            try:
                path = self._start(trainer)
                if wait:
                    self._wait()
                    path = path if self._written else None
            except Exception as raised:  # noqa: BLE001  (the other ranks must not wait)
                error = raised
        path, failed = self._comm.mpi_comm.bcast((path and str(path), error and repr(error)))
        if error:
            raise error
        if failed:
            raise RuntimeError(f'rank 0 could not save a checkpoint: {failed}')
        return path

    def _start(self, trainer) -> Path:
        """Copies the state, and starts the thread that writes it."""
        self._wait()
        iteration, top1 = trainer.updater.iteration, _top1(trainer)
        path, self._written = self._path(iteration), False
        is_own = iteration in self._own
        self._own = [*(i for i in self._own if i < iteration), iteration]
        try:
            self._copy = copy_of(trainer, self._copy)
        except MemoryError as error:
            _warn(f'checkpoint {path} was not written', error)
            return path
        self._writer = threading.Thread(target=self._write, args=(path, iteration, is_own, top1))
        self._writer.start()
        return path

    def _wait(self):
        if self._writer:
            self._writer.join()
            self._writer = None

    def _write(self, path, iteration, is_own, top1):
        properties = {'run': self._run, 'top1': top1}
        try:
            write(
                path, self._copy, self._identity, properties, lambda: self._set_apart(path, is_own)
            )
        except (OSError, MemoryError) as error:
            _warn(f'checkpoint {path} was not written', error)
            return
        self._written, self._at = True, iteration
        try:
            if (self._folder / BRANCH).exists():
                self._mark_branch(iteration)
            if top1 is not None and top1 > self._best:
                self._keep_as_best(path)
                self._best = top1
            self._remove_older(iteration)
        except OSError as error:
            _warn(f'{self._folder} was not put in order', error)

    def _set_apart(self, path, is_own):
        """Makes clear which checkpoints in the folder are of another run, before one is added."""
        abandoned = [
            other
            for other in checkpoints(self._folder)
            if iteration_of(other) > self._at and iteration_of(other) not in self._own
        ]
        if abandoned and not (self._folder / BRANCH).exists():
            self._mark_branch(self._at)
        if path.exists() and not is_own:
            names = (path.with_name(f'{path.stem}-before{n or ""}{SUFFIX}') for n in range(10**6))
            free = next(name for name in names if not name.exists())
            print(f'{path} is of another run: it is kept as {free.name}', flush=True)
            os.replace(path, free)

    def _mark_branch(self, iteration):
        unfinished = self._folder / f'.{PREFIX}{BRANCH}'
        unfinished.write_text(str(iteration))
        os.replace(unfinished, self._folder / BRANCH)

    def _keep_as_best(self, path):
        link = self._folder / f'.{PREFIX}best'
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, self._folder / 'best.npz')

    def _remove_older(self, iteration):
        paths = [self._path(i) for i in self._own if i < iteration]
        own = [path for path in paths if properties_of(path).get('run') == self._run]
        for path in own[: max(0, len(own) + 1 - self._keep)]:
            path.unlink()
        self._own = self._own[-self._keep :]

    def _path(self, iteration) -> Path:
        return self._folder / f'{PREFIX}{iteration:09d}{SUFFIX}'

    def serialize(self, serializer):
        own = json.dumps({'run': self._run, 'iterations': self._own[-self._keep :]})
        found = serializer('own', own)
        if found != own:
            self._run, self._own = (json.loads(found)[name] for name in ('run', 'iterations'))


def copy_of(state, earlier: dict) -> dict:
    """Copies all that a trainer, or another object with ``serialize``, saves.

    Args:
        state (~chainer.training.Trainer): What to copy.
        earlier (dict): A copy that is not needed any more. Its memory is used where it fits.

    Returns:
        dict: Arrays by name, on the CPU.
    """
    copy: dict = {}
    _Copier(copy, earlier).save(state)
    return copy


class _Copier(chainer.serializers.DictionarySerializer):
    """Copies what it saves, into the memory of an earlier copy where this fits."""

    def __init__(self, target, earlier, path=''):
        super().__init__(target, path)
        self._earlier = earlier

    def __getitem__(self, key):
        return _Copier(self.target, self._earlier, f'{self.path}{key.strip("/")}/')

    def __call__(self, key, value):
        name = self.path + key.lstrip('/')
        if not isinstance(value, (np.ndarray, cuda.ndarray)):
            return super().__call__(key, value)
        copy = self._earlier.get(name)
        if copy is None or (copy.shape, copy.dtype) != (value.shape, value.dtype):
            copy = np.empty(value.shape, value.dtype)
        if isinstance(value, np.ndarray):
            np.copyto(copy, value)
        else:
            cuda.cupy.ascontiguousarray(value).get(out=copy)
        self.target[name] = copy
        return value


def _top1(trainer):
    """The top-1 accuracy of a validation in this iteration; None if there was none, or NaN."""
    top1 = trainer.observation.get('validation/main/accuracy')
    return None if top1 is None or np.isnan(float(top1)) else float(top1)


def _warn(what, error):
    reason = getattr(error, 'strerror', None) or repr(error)
    print(f'warning: {what}: {reason}', file=sys.stderr, flush=True)


def interval(every: str) -> tuple[int, float]:
    """Returns epochs and seconds, one of them 0, for text such as ``'2'`` or ``'10m'``."""
    minutes = every.endswith('m')
    try:
        number = float(every[:-1]) if minutes else int(every)
    except ValueError:
        number = 0
    if not 0 < number < 10**9:
        raise ValueError(f'neither a number of epochs (1) nor a number of minutes (10m): {every!r}')
    return (0, 60 * number) if minutes else (int(number), 0)


def resume(trainer, entries: dict):
    """Restores the trainer's state. The trainer must have the same extensions.

    Raises:
        CheckpointError: The checkpoint lacks an entry that this trainer needs.
    """
    try:
        trainer.serialize(chainer.serializers.NpzDeserializer(entries))
    except KeyError as error:
        raise CheckpointError(
            f'the checkpoint has no entry {error}: it is of a program with other parts, or of '
            'another version; go on with the program that wrote it, or start anew'
        ) from error
