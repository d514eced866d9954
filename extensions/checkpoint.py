"""Checkpoints: one file holds everything that a run needs to continue with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import chainer
import numpy as np
from chainer import training
from mpi4py import MPI

_PREFIX, _SUFFIX = 'checkpoint-', '.npz'
_MANIFEST = 'manifest'  # names of all other entries, names of the None entries, and identity
_BLOCK = 1 << 20  # bytes compared at a time
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class CheckpointError(Exception):
    """No checkpoint can be used. The message names the refused files and the reasons."""


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
    """Saves the trainer, on rank 0, in FOLDER/checkpoint-ITERATION.npz.

    The last ``keep`` checkpoints remain. FOLDER/best.npz is the checkpoint with the highest top-1.

    A checkpoint is written under a temporary name, flushed to the disk, read back, and renamed. So
    a file with its final name is complete. A checksum covers every number in the file, and loading
    the file executes nothing from it. The file holds the state of all processes, so a run can
    continue on another number of processes. To collect this state, all ranks first call ``gather``
    of every extension that has this method.

    SIGTERM, SIGINT and SIGUSR1, on any rank, end the training after the current iteration, with a
    checkpoint. All ranks then raise :class:`Stopped`. A second SIGINT ends the process at once. A
    second SIGTERM or SIGUSR1 has no effect, since a scheduler may signal both mpiexec and the
    ranks.

    If a checkpoint cannot be written, for instance on a full disk, a warning is printed and the
    training continues.

    Args:
        comm (~chainermn.CommunicatorBase): The processes. All ranks must have this extension.
        folder (str or Path): Folder of the checkpoints. Only rank 0 uses it.
        identity (dict): JSON values that must be the same for a run to continue.
        every (str): Interval: ``'1'`` is one epoch, ``'10m'`` is ten minutes.
        keep (int): Number of checkpoints to keep.

    Raises:
        ValueError: ``every`` is neither a number of epochs nor of minutes.
    """

    trigger = (1, 'iteration')
    priority = -200  # after all reports, logs and prints of an iteration

    def __init__(self, comm, folder, identity, every='1', keep=2):
        self._comm = comm
        self._folder = Path(folder)
        self._identity = identity
        self._epochs, self._seconds = interval(every)
        self._keep = keep
        self._signum = 0
        self._handlers = {}
        self._last = time.monotonic()
        self._best = -1.0  # top-1 accuracy of best.npz

    def initialize(self, trainer):
        if self._comm.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self._folder.glob(f'.{_PREFIX}*'):
                unfinished.unlink()
        for signum in SIGNALS:
            self._handlers[signum] = signal.signal(signum, self._remember)

    def finalize(self):
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers.clear()

    def _remember(self, signum, frame):
        if self._signum == signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self._signum = signum

    def __call__(self, trainer):
        due = (
            trainer.updater.is_new_epoch
            and self._epochs
            and not (trainer.updater.epoch % self._epochs)
        )
        if self._seconds and self._comm.rank == 0:
            due = time.monotonic() - self._last >= self._seconds
        wishes = np.array([self._signum, bool(due)], np.int64)
        self._comm.mpi_comm.Allreduce(MPI.IN_PLACE, wishes, MPI.MAX)
        signum, due = wishes
        if not (signum or due):
            return
        self._last = time.monotonic()
        path = self.save(trainer)
        if signum:
            raise Stopped(
                int(signum),
                f'stopped by {signal.Signals(signum).name} after iteration '
                f'{trainer.updater.iteration:,}; '
                + (f'checkpoint: {path}' if path else 'no checkpoint could be written'),
            )

    def save(self, trainer):
        """Saves a checkpoint. Collective: all ranks get its path, or None if it was not written."""
        for entry in trainer._extensions.values():
            if hasattr(entry.extension, 'gather'):
                entry.extension.gather()
        path = None
        if self._comm.rank == 0:
            path = self._folder / f'{_PREFIX}{trainer.updater.iteration:09d}{_SUFFIX}'
            top1 = trainer.observation.get('validation/main/accuracy', -1.0)
            is_best, self._best = top1 > self._best, max(top1, self._best)
            serializer = chainer.serializers.DictionarySerializer()
            serializer.save(trainer)
            try:
                write(path, serializer.target, self._identity)
                if is_best:
                    self._keep_as_best(path)
                for old in checkpoints(self._folder)[self._keep :]:
                    old.unlink()
            except OSError as error:
                print(
                    f'warning: checkpoint {path} was not written: {error.strerror or error}',
                    file=sys.stderr,
                    flush=True,
                )
                path = None
        return self._comm.mpi_comm.bcast(path and str(path))

    def _keep_as_best(self, path):
        link = self._folder / f'.{_PREFIX}best'
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)
        os.replace(link, self._folder / 'best.npz')

    def serialize(self, serializer):
        self._best = serializer('best', self._best)


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


def checkpoints(folder) -> list[Path]:
    """Returns the checkpoints in a folder, the newest first."""
    return sorted(Path(folder).glob(f'{_PREFIX}*{_SUFFIX}'), reverse=True)


def write(path: Path, entries: dict, identity: dict):
    """Writes a checkpoint. The file at ``path`` is either complete or absent.

    Args:
        path (Path): Path of the file.
        entries (dict): Maps names to arrays, as Chainer's DictionarySerializer does.
        identity (dict): JSON values.

    Raises:
        OSError: The file could not be written, or reads back differently.
    """
    none = [name for name, array in entries.items() if array.dtype == object]
    arrays = {name: array for name, array in entries.items() if name not in none}
    manifest = json.dumps({'names': sorted(arrays), 'none': none, 'identity': identity})
    unfinished = path.with_name('.' + path.name)
    try:
        with open(unfinished, 'wb') as file:
            _savez(file, {_MANIFEST: np.array(manifest), **arrays})
            file.flush()
            os.fsync(file.fileno())
        if not _reads_as(unfinished, arrays):
            raise OSError(f'{path} does not read back as it was written')
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename, too, must survive a power failure
    finally:
        os.close(folder)


def _savez(file, arrays):
    """Does the same as np.savez, but closes the archive when the disk is full."""
    with zipfile.ZipFile(file, 'w') as archive:
        for name, array in arrays.items():
            with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def _reads_as(path, arrays) -> bool:
    """Whether a file from :func:`_savez` holds these arrays.

    Bytes are compared, since this is faster than checksums.
    """
    buffer = np.empty(_BLOCK, np.uint8)
    with open(path, 'rb', buffering=0) as file, zipfile.ZipFile(path) as archive:
        members = {info.filename[: -len('.npy')]: info for info in archive.infolist()}
        if set(members) != {_MANIFEST, *arrays}:
            return False
        for name, array in arrays.items():
            # Zip's local header ends with a name and an extra field. It contains their lengths.
            file.seek(members[name].header_offset + 26)
            lengths = np.frombuffer(file.read(4), '<u2')
            member = members[name].header_offset + 30 + int(lengths.sum())
            file.seek(member + members[name].file_size - array.nbytes)
            expected = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for start in range(0, array.nbytes, _BLOCK):
                part = expected[start : start + _BLOCK]
                n_read = file.readinto(buffer.data[: part.size])
                if n_read != part.size or not np.array_equal(buffer[:n_read], part):
                    return False
    return True


def read(path) -> tuple[dict, dict]:
    """Reads a checkpoint and checks every byte that matters.

    Returns:
        tuple: The entries, for Chainer's NpzDeserializer, and the identity.

    Raises:
        CheckpointError: The file is damaged or not a checkpoint.
    """
    try:
        with open(path, 'rb') as opened, np.load(opened, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise TypeError('not an archive')
            arrays = {name: file[name] for name in file.files}
        manifest = json.loads(str(arrays.pop(_MANIFEST)))
        if manifest['names'] != sorted(arrays):
            raise ValueError('entries are missing')
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(f'{path} is damaged or not a checkpoint ({error})') from error
    return {**arrays, **dict.fromkeys(manifest['none'], np.array(None))}, manifest['identity']


def newest(path, identity: dict) -> tuple[Path, dict] | None:
    """Reads the newest checkpoint that can be read.

    Args:
        path (str or Path): A checkpoint, or a folder of checkpoints.
        identity (dict): The checkpoint must have this identity.

    Returns:
        tuple: The checkpoint's path and entries; None if there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, but none can be read.
        CheckpointError: The newest readable one has another identity. The message names the
            differing items.
    """
    if not os.path.exists(path):
        return None
    refused = []
    candidates = checkpoints(path) if os.path.isdir(path) else [Path(path)]
    for candidate in candidates:
        try:
            entries, found = read(candidate)
        except CheckpointError as error:
            refused.append(str(error))
            print(f'warning: {error}; trying an older one', file=sys.stderr, flush=True)
            continue
        differing = [
            f'{name} {found.get(name)} (now {identity.get(name)})'
            for name in sorted({*found, *identity})
            if found.get(name) != identity.get(name)
        ]
        if differing:
            raise CheckpointError(f'{candidate} was made with {", ".join(differing)}')
        return candidate, entries
    if refused:
        raise CheckpointError('; '.join(refused))
    return None


def resume(trainer, entries: dict):
    """Restores the trainer's state. The trainer must have the same extensions."""
    trainer.serialize(chainer.serializers.NpzDeserializer(entries))
