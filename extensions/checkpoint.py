"""Checkpoints: one file with all that a run needs to go on with the same bits."""

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
_MANIFEST = 'manifest'  # the names of all other entries, those that are None, and the identity
_BLOCK = 1 << 20  # bytes that are compared at a time
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class CheckpointError(Exception):
    """There is no checkpoint to go on from; the message says which were refused, and why."""


class Stopped(Exception):
    """A signal has ended the training after a checkpoint; raised on all ranks together.

    Attributes:
        signum (int): The signal.
        agreed (bool): No rank waits for another.
    """

    agreed = True

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


class Checkpointer(training.Extension):
    """Saves the trainer, on rank 0, in FOLDER/checkpoint-ITERATION.npz.

    The last ones are kept, and as FOLDER/best.npz the one with the highest top-1.

    A checkpoint is written under another name, flushed to the disk, read again, and renamed: under
    its own name a file is complete. Every number in it is covered by a checksum, and nothing in it
    is executed when it is loaded. What all processes know together goes in, so that a run can go on
    with another number of them: extensions that have a method ``gather`` are asked for it first, on
    all ranks.

    SIGTERM, SIGINT and SIGUSR1, on any rank, end the training after the iteration under way, with a
    checkpoint: :class:`Stopped` is raised on all ranks. Repeated, SIGINT ends the process at once;
    the others come twice where a scheduler signals mpiexec and the ranks.

    A checkpoint that cannot be written (no space left, say) is reported, and the training goes on.

    Args:
        comm (~chainermn.CommunicatorBase): All ranks have this extension.
        folder (str or Path): Only rank 0 uses it.
        identity (dict): What must be the same for a run to go on; JSON.
        every (str): ``'1'``: epochs; ``'10m'``: minutes.
        keep (int): How many of the last are kept.

    Raises:
        ValueError: ``every`` is neither.
    """

    trigger = (1, 'iteration')
    priority = -200  # after all that an iteration reports, logs and prints

    def __init__(self, comm, folder, identity, every='1', keep=2):
        self._comm = comm
        self._folder = Path(folder)
        self._identity = identity
        self._epochs, self._seconds = interval(every)
        self._keep = keep
        self._signum = 0
        self._handlers = {}
        self._last = time.monotonic()
        self._best = -1.0  # top-1 of best.npz

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
                + (f'goes on from {path}' if path else 'no checkpoint could be written'),
            )

    def save(self, trainer):
        """Collective; every rank gets the path, or None if it could not be written."""
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
        except OSError:  # a file system without links
            shutil.copyfile(path, link)
        os.replace(link, self._folder / 'best.npz')

    def serialize(self, serializer):
        self._best = serializer('best', self._best)


def interval(every: str) -> tuple[int, float]:
    """Epochs and seconds, of which one is 0: of ``'2'`` and of ``'10m'``."""
    minutes = every.endswith('m')
    try:
        number = float(every[:-1]) if minutes else int(every)
    except ValueError:
        number = 0
    if not 0 < number < 10**9:
        raise ValueError(f'neither a number of epochs, as 1, nor of minutes, as 10m: {every!r}')
    return (0, 60 * number) if minutes else (int(number), 0)


def checkpoints(folder) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(Path(folder).glob(f'{_PREFIX}*{_SUFFIX}'), reverse=True)


def write(path: Path, entries: dict, identity: dict):
    """Writes a checkpoint: under its own name it is complete or not there.

    Args:
        path (Path): Of the file.
        entries (dict): Name to array, as Chainer's DictionarySerializer makes them.
        identity (dict): JSON.

    Raises:
        OSError: It could not be written, or reads otherwise than it was written.
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
            raise OSError(f'{path} reads otherwise than it was written')
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename, too, survives a power cut
    finally:
        os.close(folder)


def _savez(file, arrays):
    """As np.savez, which leaves its archive open when the disk is full."""
    with zipfile.ZipFile(file, 'w') as archive:
        for name, array in arrays.items():
            with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def _reads_as(path, arrays) -> bool:
    """Whether a file that _savez wrote holds these arrays: byte by byte, quicker than the
    checksums."""
    buffer = np.empty(_BLOCK, np.uint8)
    with open(path, 'rb', buffering=0) as file, zipfile.ZipFile(path) as archive:
        members = {info.filename[: -len('.npy')]: info for info in archive.infolist()}
        if set(members) != {_MANIFEST, *arrays}:
            return False
        for name, array in arrays.items():
            # Zip's local header ends with a name and an extra field, whose lengths stand in it.
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
        CheckpointError: It is damaged, or no checkpoint.
    """
    try:
        with open(path, 'rb') as opened, np.load(opened, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise TypeError('no archive')
            arrays = {name: file[name] for name in file.files}
        manifest = json.loads(str(arrays.pop(_MANIFEST)))
        if manifest['names'] != sorted(arrays):
            raise ValueError('entries are missing')
    except Exception as error:  # what a damaged archive raises is anybody's guess
        raise CheckpointError(f'{path} is damaged or no checkpoint ({error})') from error
    return {**arrays, **dict.fromkeys(manifest['none'], np.array(None))}, manifest['identity']


def newest(path, identity: dict) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read.

    Args:
        path (str or Path): A checkpoint, or a folder of them.
        identity (dict): What it must have been made with.

    Returns:
        tuple: Its path and its entries; None if there is no checkpoint at all.

    Raises:
        CheckpointError: None of them can be read, or the newest that can was made with another
            identity; the differing items are named.
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
            f'{name} {found.get(name)} and now {identity.get(name)}'
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
    """Puts the trainer, with the same extensions, where it was."""
    trainer.serialize(chainer.serializers.NpzDeserializer(entries))
