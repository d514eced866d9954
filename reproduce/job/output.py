"""The output folder: protects earlier runs in it, and finds the checkpoint to go on from."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import sys
from pathlib import Path

from extensions import checkpoint
from extensions.checkpoint_files import as_json, difference, properties_of
from reproduce.settings import InputError

_OF_A_RUN = ('log', 'settings.json', 'summary.json', 'model.npz', 'curves.png')
_LONGER = (
    'a run cannot be made longer, since --epochs sets the learning rates from its start; start anew'
)
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
    if _is_locked(lock):
        raise InputError(f'--out {out} is in use by another run; choose another folder')
    _locks.append(lock)
    if settings.overwrite:
        _delete_run(out)
        return
    if (out / 'summary.json').exists() and settings.resume == 'auto':
        _refuse_other_settings(out, settings)
        print(f'the run in {out} is finished', flush=True)
        sys.exit()
    refuse_other_run(settings)


def _is_locked(file) -> bool:
    """Locks a file for this process, unless another has done so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # a file system without locks
    return False


def _delete_run(out):
    """Deletes what a run wrote, and says what that is; leaves all else in the folder."""
    checkpoints = checkpoints_of(out)
    paths = [out / name for name in _OF_A_RUN]
    paths += [
        checkpoints / 'best.npz',
        checkpoints / 'branch',
        *checkpoint.checkpoints(checkpoints),
    ]
    paths = [path for path in paths if path.exists()]
    if paths:
        names = ', '.join(str(path.relative_to(out)) for path in paths)
        print(f'--overwrite deletes the earlier run in {out}: {names}', flush=True)
    for path in paths:
        path.unlink()


def _refuse_other_settings(out, settings):
    """Raises InputError if a finished run had other settings than those given now."""
    try:
        found = json.loads((out / 'settings.json').read_text())
    except (OSError, ValueError):
        return
    now = as_json(settings.identity)
    differing = difference({name: found.get(name) for name in now}, now)
    if differing:
        raise InputError(
            f'the finished run in {out} was made with {", ".join(differing.values())}: '
            + (_LONGER if 'epochs' in differing else 'choose another folder, or give --overwrite')
        )


def for_smoke(settings, folder) -> tuple[str, list[str]]:
    """Finds the place of a smoke run: nothing is deleted, and what was stopped goes on.

    Args:
        settings (Settings): Settings of the run. Its ``out`` is the first folder to be tried.
        folder (str): The folder to which ``out`` is relative.

    Returns:
        tuple: The output folder: one with an unfinished run of the same settings, or the first that
            holds no run. And the options that the run needs to use it.
    """
    numbers = itertools.count(2)
    out = settings.out
    while True:
        path = Path(folder, out)
        found = checkpoint.checkpoints(checkpoints_of(path))
        if not (path / 'summary.json').exists() and not _is_in_use(path):
            if not found:
                return out, ['--out', out]
            theirs, ours = _identity_of(found), as_json(settings.identity)
            if settings.functions == 'auto':  # and a run goes on by what it has begun with
                ours['functions'] = theirs.get('functions', 'auto')
            if not difference({name: theirs.get(name) for name in ours}, ours):
                return out, ['--out', out, '--resume', 'auto', '--functions', ours['functions']]
        out = f'{settings.out}-{next(numbers)}'


def _is_in_use(out) -> bool:
    with contextlib.suppress(OSError), open(out / '.lock', 'r+') as lock:
        return _is_locked(lock)
    return False


def _identity_of(checkpoints) -> dict:
    """Returns the identity of the newest checkpoint that can be read; empty without one."""
    for path in checkpoints:
        found = properties_of(path).get('identity')
        if found:
            return found
    return {}


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
        InputError: There is no checkpoint, and --resume is not auto; or the checkpoint is of
            another number of epochs.
        ~extensions.CheckpointError: No checkpoint can be read, or the newest has another identity.
    """
    if settings.resume is None:
        return None
    auto = settings.resume == 'auto'
    place = checkpoints_of(settings.out) if auto else settings.resume
    try:
        found = checkpoint.newest(place, identity)
    except checkpoint.CheckpointError as error:
        if 'epochs' in error.differing:
            raise InputError(f'{error}: {_LONGER}') from None
        if list(error.differing) == ['functions']:
            own = error.differing['functions'].split()[1]
            raise InputError(f'{error}; to go on, give --functions {own}') from None
        raise
    if found is None and not auto:
        raise InputError(f'--resume {settings.resume}: there is no checkpoint; give another path')
    if found is None:
        print('no checkpoint yet: the run starts from the beginning', flush=True)
        return None
    path, entries = found
    print(f'goes on from {path}', flush=True)
    return entries
