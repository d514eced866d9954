"""Which images there are: folders of classes, and manifests, from which they are known at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

SUFFIXES = ('.jpeg', '.jpg', '.png')
_LAYOUT_OF_A_MANIFEST = 1
_THREADS = 16  # that list: a network file system answers each with a delay


class DataError(Exception):
    """The images cannot be used; the message names the path, what is wrong and what helps."""


def print_any_name():
    """From now on standard output takes the names of files that are no text, too."""
    sys.stdout.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The listing of ROOT/CLASS/FILE: files sorted by class and name, whatever the file system's
    order.

    It is held as bytes: 35 MB for ImageNet, where a million strings would be 140 MB.

    Attributes:
        root (str): The folder.
        classes (tuple of str): Names of the class folders, sorted; a label is an index into it.
        counts (int64 array): Images of each class.
        files (bytes): FILE of each image, class after class, as the file system spells it; each
            ends with a zero.
        mark (str): The folder's :func:`fingerprint` before it was listed.
    """

    root: str
    classes: tuple
    counts: np.ndarray
    files: bytes
    mark: str = ''

    def __len__(self) -> int:
        return int(self.counts.sum())

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Label of each image, int32."""
        return np.repeat(np.arange(len(self.classes), dtype=np.int32), self.counts)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.flatnonzero(np.frombuffer(self.files, np.uint8) == 0)

    def name(self, index: int) -> str:
        """CLASS/FILE of an image."""
        start = self._ends[index - 1] + 1 if index else 0
        file = os.fsdecode(self.files[start : self._ends[index]])
        return f'{self.classes[self.labels[index]]}/{file}'

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))

    def digest(self) -> str:
        """Identifies the classes and names, wherever the folder is."""
        sha = hashlib.sha256(os.fsencode('\0'.join(self.classes)))
        sha.update(self.counts.astype('<i8').tobytes() + self.files)
        return sha.hexdigest()[:16]

    def pack(self) -> tuple:
        """The listing in a few objects: quick to send, however long it is."""
        return self.root, '\0'.join(self.classes), self.counts, zlib.compress(self.files, 1)

    @classmethod
    def unpack(cls, packed: tuple) -> ImageFolder:
        root, classes, counts, files = packed
        return cls(root, tuple(classes.split('\0')), counts, zlib.decompress(files))


def list_images(root) -> ImageFolder:
    """Lists ROOT/CLASS/*.jpg, .jpeg and .png, whatever the case of the suffix; prints a line every
    ten seconds.

    Raises:
        DataError: There is no such folder, it has no class folder, or a class cannot be read or has
            no image.
    """
    root = os.fspath(root)
    classes = _class_folders(root)
    mark, _ = fingerprint(root)
    files, counts, last = [], [], time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        for done, found in enumerate(
            threads.map(lambda name: _images_in(os.path.join(root, name)), classes)
        ):
            files += found
            counts.append(len(found))
            if time.monotonic() > last + 10:
                last = time.monotonic()
                print(
                    f'  {root}: {len(files):,} images in {done + 1:,} of {len(classes):,} classes',
                    flush=True,
                )
    names = b''.join(name + b'\0' for name in files)
    return ImageFolder(root, tuple(classes), np.array(counts, np.int64), names, mark)


def _class_folders(root) -> list:
    try:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError as error:
        raise DataError(
            f'image folder {root}: {error.strerror}; it must hold a folder of images for each class'
        ) from error
    if not classes:
        raise DataError(
            f'image folder {root} has no class folders; images belong into {root}/CLASS/'
        )
    return classes


def _images_in(folder) -> list:
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError as error:
        raise DataError(f'class folder {folder}: {error.strerror}') from error
    names = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not names:
        raise DataError(
            f'class folder {folder} has no image ({", ".join(SUFFIXES)}); fill it or remove it'
        )
    return sorted(map(os.fsencode, names))


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Raises DataError, with names, if the two folders do not have the same classes."""
    for one, other in ((train, val), (val, train)):
        extra = sorted(set(one.classes) - set(other.classes))
        if extra:
            shown = ', '.join(extra[:3]) + (', ...' if len(extra) > 3 else '')
            raise DataError(
                f'{one.root} has {len(extra)} class folder(s) that {other.root} has not: {shown}; '
                'both must have the same'
            )


def fingerprint(root) -> tuple[str, float]:
    """Of the class folders' names and times of change: another one once an image is added, removed
    or renamed. A thousand questions to the file system instead of a million; an image whose
    contents were replaced keeps it.

    Returns:
        tuple: The fingerprint, and the latest change in seconds since 1970.
    """
    times = [(name, os.stat(os.path.join(root, name)).st_mtime_ns) for name in _class_folders(root)]
    digest = hashlib.sha256(repr(times).encode('utf-8', 'surrogateescape')).hexdigest()[:16]
    return digest, max(time_ for _, time_ in times) / 1e9


def manifest_of(root, manifests) -> Path:
    """The file in the folder ``manifests`` that the listing of ``root`` is kept in."""
    full = os.path.abspath(root)
    digest = hashlib.sha256(os.fsencode(full)).hexdigest()[:8]
    return Path(manifests) / f'{os.path.basename(full)}-{digest}.npz'


def listing_of(root, manifests) -> ImageFolder:
    """The listing of an image folder: its manifest's where that matches, else the folder's own. It
    writes nothing: see :func:`save_manifest`.

    Args:
        root (str): The folder.
        manifests (str or Path): The folder of manifests.

    Raises:
        DataError: As :func:`list_images`.
    """
    path, root = manifest_of(root, manifests), os.fspath(root)
    try:
        with np.load(path) as file:
            manifest = {name: file[name] for name in file.files}
        if manifest['layout'] != _LAYOUT_OF_A_MANIFEST:
            raise ValueError('of another release')
        if str(manifest['fingerprint']) != fingerprint(root)[0]:
            raise ValueError('the folder has changed since')
        classes = os.fsdecode(manifest['classes'].tobytes())
        packed = root, classes, manifest['counts'], manifest['files'].tobytes()
        return ImageFolder.unpack(packed)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f'manifest {path} is not used ({error}): lists {root} again', flush=True)
    return list_images(root)


def save_manifest(folder: ImageFolder, manifests, now=time.time) -> None:
    """Writes the manifest of a listing, unless there is one already that matches.

    A folder that has changed since it was listed is not kept, nor one that has within the last two
    seconds: another change could come in the same tick of the file system's clock. A manifest that
    cannot be written is a note, and no error.
    """
    path = manifest_of(folder.root, manifests)
    try:
        mark, changed = fingerprint(folder.root)
        if mark != folder.mark or changed > now() - 2 or _has(path, mark):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _, classes, counts, files = folder.pack()
        unfinished = path.with_name(f'{path.name}.unfinished-{os.getpid()}')
        with open(unfinished, 'wb') as file:
            np.savez(
                file,
                layout=_LAYOUT_OF_A_MANIFEST,
                fingerprint=mark,
                classes=np.frombuffer(os.fsencode(classes), np.uint8),
                counts=counts,
                files=np.frombuffer(files, np.uint8),
            )
        os.replace(unfinished, path)
    except (OSError, DataError) as error:
        print(f'note: manifest {path} cannot be written ({error})', flush=True)
        return
    print(f'{len(folder):,} images in {folder.root}; list kept in {path}', flush=True)


def _has(path, mark) -> bool:
    try:
        with np.load(path) as file:
            return str(file['fingerprint']) == mark and file['layout'] == _LAYOUT_OF_A_MANIFEST
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
