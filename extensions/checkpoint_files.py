"""The files of checkpoints: how they are written, verified, read, and told apart in a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import numpy as np

PREFIX, SUFFIX = 'checkpoint-', '.npz'
BRANCH = 'branch'  # this file has the iteration after which checkpoints are of an abandoned run
_NAME = re.compile(rf'{PREFIX}(\d{{9,}}){SUFFIX}')
_MANIFEST = 'manifest'  # names of all other entries, names of the None entries, and properties
_BLOCK = 1 << 20  # bytes compared at a time
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # file systems that never can


class CheckpointError(Exception):
    """No checkpoint can be used. The message names the refused files and the reasons.

    Attributes:
        differing (dict): The items of the identity that differ, in words, by name.
    """

    def __init__(self, message, differing=()):
        super().__init__(message)
        self.differing = dict(differing)


def checkpoints(folder) -> list[Path]:
    """Returns the checkpoints in a folder, the newest first.

    The newest has the most iterations. But where a run went on from an older checkpoint, those that
    it has not reached come last: they are of the run that was abandoned.
    """
    folder = Path(folder)
    found = [path for path in folder.glob(f'{PREFIX}*') if _NAME.fullmatch(path.name)]
    try:
        last = int((folder / BRANCH).read_text())
    except (OSError, ValueError):
        return sorted(found, key=iteration_of, reverse=True)
    return sorted(found, key=lambda p: (iteration_of(p) <= last, iteration_of(p)), reverse=True)


def iteration_of(path) -> int:
    return int(path.stem[len(PREFIX) :])


def properties_of(path) -> dict:
    """What is known of a checkpoint besides its entries; empty if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(str(file[_MANIFEST]))
    except Exception:  # noqa: BLE001  (a damaged archive can raise anything)
        return {}


def as_json(identity) -> dict:
    """Returns an identity as it reads after it was written, with NumPy's numbers as Python's."""
    try:
        return json.loads(json.dumps(identity, default=lambda value: value.tolist()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'identity must have JSON values: {identity!r}: {error}') from error


def difference(found: dict, now: dict) -> dict:
    """Compares two identities. Returns the items that differ, in words, by name."""
    return {
        name: f'{name} {found.get(name)} (now {now.get(name)})'
        for name in sorted({*found, *now})
        # As text, since NaN equals nothing.
        if json.dumps(found.get(name)) != json.dumps(now.get(name))
    }


def write(path: Path, entries: dict, identity: dict, properties=None, before_naming=lambda: None):
    """Writes a checkpoint. The file at ``path`` is either complete or absent.

    Args:
        path (Path): Path of the file.
        entries (dict): Maps names to arrays, as Chainer's DictionarySerializer does.
        identity (dict): JSON values.
        properties (dict): More JSON values.
        before_naming (callable): Called when the file is verified, before it gets its name.

    Raises:
        OSError: The file could not be written, or reads back differently.
    """
    none = [name for name, array in entries.items() if array.dtype == object]
    arrays = {
        name: np.asarray(array, order='C') for name, array in entries.items() if name not in none
    }
    manifest = json.dumps(
        {
            **(properties or {}),
            'names': sorted(arrays),
            'none': none,
            'identity': as_json(identity),
        }
    )
    unfinished = path.with_name('.' + path.name)
    try:
        with open(unfinished, 'wb') as file:
            _savez(file, {_MANIFEST: np.array(manifest), **arrays})
            file.flush()
            _to_disk(file.fileno())
        if not _reads_as(unfinished, arrays):
            raise OSError(f'{path} does not read back as it was written')
        before_naming()
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    # The rename, too, must survive a power failure. Some file systems cannot flush a folder.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _to_disk(descriptor):
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise


def _savez(file, arrays):
    """Does the same as np.savez, but closes the archive when the disk is full.

    Each part goes to the file from where it lies: a copy would stop other threads.
    """
    with zipfile.ZipFile(file, 'w') as archive:
        for name, array in arrays.items():
            with archive.open(f'{name}.npy', 'w', force_zip64=True) as member:
                kind = {
                    'descr': np.lib.format.dtype_to_descr(array.dtype),
                    'fortran_order': False,
                    'shape': array.shape,
                }
                np.lib.format.write_array_header_1_0(member, kind)
                octets = _octets(array)
                for start in range(0, octets.size, _BLOCK):
                    member.write(octets[start : start + _BLOCK].data)


def _octets(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


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
            expected = _octets(array)
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
        none, identity = dict.fromkeys(manifest['none'], np.array(None)), manifest['identity']
        if not isinstance(identity, dict):
            raise TypeError('the identity is not a dictionary')
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(f'{path} is damaged or not a checkpoint ({error})') from error
    return {**arrays, **none}, identity


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
    identity = as_json(identity)
    candidates = checkpoints(path) if os.path.isdir(path) else [Path(path)]
    for candidate in candidates:
        try:
            entries, found = read(candidate)
        except CheckpointError as error:
            refused.append(str(error))
            print(f'warning: {error}; trying an older one', file=sys.stderr, flush=True)
            continue
        differing = difference(found, identity)
        if differing:
            words = ', '.join(differing.values())
            raise CheckpointError(f'{candidate} was made with {words}', differing)
        return candidate, entries
    if refused:
        raise CheckpointError('; '.join(refused))
    return None
