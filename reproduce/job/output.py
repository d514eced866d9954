"""The output folder: protects earlier runs in it, and finds the checkpoint to go on from."""

from __future__ import annotations

import fcntl
import shutil
import sys
from pathlib import Path

from extensions import checkpoint
from reproduce.settings import InputError

_OF_A_RUN = ('log', 'settings.json', 'summary.json', 'model.npz', 'curves.png', 'checkpoints')
_locks = []  # stay open until the process ends, however it ends


def checkpoints_of(out) -> Path:
    """Returns the folder of checkpoints in the output folder ``out``."""
    return Path(out) / 'checkpoints'


def prepare(settings):
    """Makes the output folder, and locks the folder against other runs.

    Removes files only with --overwrite.

    Args:
        settings (Settings): Settings of the run.

    Raises:
        InputError: The folder cannot be written, is in use, or holds another run.
        SystemExit: The folder holds a finished run, and --resume is auto.
    """
    out = Path(settings.out)
    if settings.overwrite and settings.resume:
        raise InputError('--overwrite and --resume contradict each other: give only one')
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / '.lock', 'w')  # noqa: SIM115  (the lock ends when it is closed)
    except OSError as error:
        raise InputError(
            f'--out {out} cannot be written: {error.strerror}; choose another folder'
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f'--out {out} is in use by another run; choose another folder') from error
    except OSError:
        pass  # a file system without locks
    _locks.append(lock)
    if settings.overwrite:
        for name in _OF_A_RUN:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return
    if (out / 'summary.json').exists() and settings.resume == 'auto':
        print(f'the run in {out} is finished', flush=True)
        sys.exit()
    refuse_other_run(settings)


def refuse_other_run(settings):
    """Raises InputError if --out holds a run that is to be neither resumed nor overwritten."""
    out = Path(settings.out)
    finished = (out / 'summary.json').exists()
    if settings.overwrite:
        return
    if finished or (checkpoint.checkpoints(checkpoints_of(out)) and settings.resume is None):
        what = (
            'a finished run'
            if finished
            else 'checkpoints of a run, which --resume auto goes on from'
        )
        raise InputError(f'--out {out} holds {what}: choose another folder, or give --overwrite')


def find_checkpoint(settings, identity):
    """Reads the checkpoint that --resume names.

    Args:
        settings (Settings): Settings of the run.
        identity (dict): Settings and digests of images that the checkpoint must share.

    Returns:
        dict: The entries of the checkpoint; None to start from the beginning.

    Raises:
        InputError: There is no checkpoint, and --resume is not auto.
        ~extensions.CheckpointError: No checkpoint can be read, or the newest has another identity.
    """
    if settings.resume is None:
        return None
    auto = settings.resume == 'auto'
    found = checkpoint.newest(checkpoints_of(settings.out) if auto else settings.resume, identity)
    if found is None and not auto:
        raise InputError(f'--resume {settings.resume}: there is no checkpoint; give another path')
    if found is None:
        print('no checkpoint yet: the run starts from the beginning', flush=True)
        return None
    path, entries = found
    print(f'goes on from {path}', flush=True)
    return entries
