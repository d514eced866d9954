"""Lists the images of a folder of class folders, and caches the list in a manifest."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np

SUFFIXES = ('.jpeg', '.jpg', '.png')
_LAYOUT_OF_A_MANIFEST = 2
# Folders that systems, and other programs than this one, put beside the user's.
_FOREIGN = {
    *('lost+found', '__macosx', '$recycle.bin', 'system volume information'),
    *('@eadir', '@tmp', '@sharebin', '#recycle', '#snapshot', '@recycle', '@recently-snapshot'),
}
# Mounts that pass on the folders of something else, which may not keep their times.
_PASS_ON = ('fuse', '9p', 'virtiofs', 'cifs', 'smb3', 'vboxsf')
_THREADS = 16  # many, because a network file system answers each question with a delay

_numbers = itertools.count(1)
_n_seen = 0


class DataError(Exception):
    """Images that cannot be used. The message names the path, the cause and the remedy."""


class BadImage(DataError):
    """An image file whose contents cannot be decoded, though they can be read."""


def print_any_name():
    """Lets standard output print file names that are not valid text, with escapes."""
    sys.stdout.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The list of the images ROOT/CLASS/FILE, sorted by class and file name on any file system.

    The names are held as bytes. They take 35 MB for ImageNet; a million strings would take 140 MB.

    Attributes:
        root (str): The folder ROOT.
        classes (tuple of str): Sorted names of the class folders. A label is an index into them.
        counts (int64 array): Number of images in each class.
        files (bytes): FILE of each image, class by class, as the file system spells the name. A
            zero byte ends each name.
        mark (str): The folder's :func:`fingerprint`, taken before the folder was listed.
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
        """The label of each image, int32."""
        return np.repeat(np.arange(len(self.classes), dtype=np.int32), self.counts)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.flatnonzero(np.frombuffer(self.files, np.uint8) == 0)

    def name(self, index: int) -> str:
        """Returns CLASS/FILE of an image."""
        start = self._ends[index - 1] + 1 if index else 0
        file = os.fsdecode(self.files[start : self._ends[index]])
        return f'{self.classes[self.labels[index]]}/{file}'

    def path(self, index: int) -> str:
        """Returns ROOT/CLASS/FILE of an image."""
        return os.path.join(self.root, self.name(index))

    def digest(self) -> str:
        """Returns a hash of the classes and file names, which does not depend on ROOT."""
        sha = hashlib.sha256(os.fsencode('\0'.join(self.classes)))
        sha.update(self.counts.astype('<i8').tobytes() + self.files)
        return sha.hexdigest()[:16]

    def pack(self) -> tuple:
        """Returns a few objects that are quick to send, even for a million images."""
        return self.root, '\0'.join(self.classes), self.counts, zlib.compress(self.files, 1)

    @classmethod
    def unpack(cls, packed: tuple) -> ImageFolder:
        """Restores the listing that :meth:`pack` packed."""
        root, classes, counts, files = packed
        return cls(root, tuple(classes.split('\0')), counts, zlib.decompress(files))


def position():
    """Tells the Watchdog how far the lists are. A slow file system may take hours, if it answers.

    Returns:
        tuple: The progress, None, and the position in words, as the Watchdog asks for them.
    """
    return 0, None, f'the list of images, {_n_seen:,} files and folders seen'


def _seen(items):
    """Yields the items, and counts them, in any thread."""
    global _n_seen
    for item in items:
        _n_seen = next(_numbers)
        yield item


def list_images(root) -> ImageFolder:
    """Lists ROOT/CLASS/*.jpg, .jpeg and .png, with suffixes in upper or lower case.

    Passes over what :func:`is_foreign` tells, and over pipes, sockets and folders that have the
    name of an image. Prints a line of progress every ten seconds.

    Args:
        root (str or Path): The folder ROOT.

    Returns:
        ImageFolder: The list.

    Raises:
        DataError: The folder does not exist or has no class folder; a class folder cannot be read,
            has no image, or is another one, too; or a link leads nowhere.
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


def is_foreign(name: str) -> bool:
    """Returns whether a file or folder is hidden, or belongs to a system such as that of a NAS."""
    return name.startswith('.') or name.lower() in _FOREIGN


def image_files(folder, kind='image folder') -> list[str]:
    """Returns the sorted names of the images in a folder.

    Args:
        folder (str): The folder.
        kind (str): What an error calls it.

    Raises:
        DataError: The folder cannot be read, or a link in it leads nowhere.
    """
    return _select(folder, kind, _is_image)


def passed_over(root) -> list[str]:
    """Returns the folders in ROOT, then what is in ROOT/CLASS, that the list does not have."""
    classes = _class_folders(root)
    folders = _select(root, 'image folder', lambda entry: entry.is_dir(follow_symlinks=False))
    found = [os.path.join(root, name) for name in sorted({*folders} - {*classes})]
    for folder in (os.path.join(root, name) for name in classes):
        others = _select(folder, 'class folder', lambda entry: not _is_image(entry))
        found += [os.path.join(folder, name) for name in others]
    return found


def _class_folders(root) -> list[str]:
    remedy = 'give a folder that has one folder per class'
    classes = _select(root, 'image folder', _is_class, remedy)
    if not classes:
        raise DataError(
            f'image folder {root} has no class folders; move the images to {root}/CLASS/'
        )
    return classes


def _images_in(folder) -> list[bytes]:
    names = image_files(folder, 'class folder')
    if not names:
        below = _select(folder, 'class folder', _is_class)
        if below:
            raise DataError(
                f'{folder} has folders, such as {below[0]}, but no image; if they are the classes, '
                f'give {folder} instead of the folder above it'
            )
        raise DataError(
            f'class folder {folder} has no image ({", ".join(SUFFIXES)}); add one, or remove it'
        )
    return sorted(map(os.fsencode, names))


def _select(folder, kind, wanted, remedy='make it readable, or remove it') -> list[str]:
    """Returns the sorted names of those entries of a folder that ``wanted`` accepts."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in _seen(entries) if wanted(entry))
    except OSError as error:
        if error.filename not in (None, folder):
            kind, folder, remedy = 'link', error.filename, 'mend the link, or remove it'
        raise DataError(f'{kind} {folder}: {error.strerror}; {remedy}') from error


def _is_class(entry) -> bool:
    return not is_foreign(entry.name) and (entry.is_dir() or _leads_nowhere(entry))


def _is_image(entry) -> bool:
    name = entry.name
    if name[0] == '.' or not name.lower().endswith(SUFFIXES):
        return False
    return entry.is_file() or _leads_nowhere(entry)


def _leads_nowhere(entry) -> bool:
    """Raises OSError for a link that leads nowhere, which is_file() takes for none; else False."""
    if entry.is_symlink():
        entry.stat()
    return False


def check_same_classes(train: ImageFolder, val: ImageFolder) -> None:
    """Raises DataError, with the names of classes, if only one of the two folders has them."""
    for one, other in ((train, val), (val, train)):
        extra = sorted(set(one.classes) - set(other.classes))
        if extra:
            shown = ', '.join(extra[:3]) + (', ...' if len(extra) > 3 else '')
            raise DataError(
                f'{one.root} has {len(extra)} class folder(s) that {other.root} lacks: {shown}; '
                'both must have the same classes'
            )


def fingerprint(root) -> tuple[str, float]:
    """Returns a hash of the class folders' names and times.

    The hash changes when an image is added, removed or renamed, but not when the contents of an
    image are replaced. Only the class folders are queried: a thousand queries instead of a million.
    Modification times alone would not do: ``touch``, ``rsync`` and ``tar`` set them. The system
    alone sets the time of the last change of status.

    Some file systems keep no times of folders: those behind FUSE and other mounts that pass on
    another system's folders, or where the times are 0. There the hash is empty, and stands for
    nothing.

    Args:
        root (str): The folder of class folders.

    Returns:
        tuple: The hash, and the latest modification time in seconds since 1970.

    Raises:
        DataError: As in :func:`list_images`.
    """
    paths = {name: os.path.join(root, name) for name in _class_folders(root)}
    stats = {name: os.stat(path) for name, path in _seen(paths.items())}
    _refuse_twins(stats, paths)
    latest = max(s.st_mtime for s in stats.values())
    devices = {f'{os.major(s.st_dev)}:{os.minor(s.st_dev)}' for s in stats.values()}
    if min(s.st_ctime for s in stats.values()) <= 0 or devices & _devices_that_pass_on():
        return '', latest
    times = [(name, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats.items()]
    digest = hashlib.sha256(repr(times).encode('utf-8', 'surrogateescape')).hexdigest()[:16]
    return digest, latest


def _refuse_twins(stats, paths):
    """Raises DataError if two names are links to one class folder."""
    by_inode = sorted(stats, key=lambda name: (stats[name].st_dev, stats[name].st_ino))
    for one, other in zip(by_inode, by_inode[1:]):
        if not os.path.samestat(stats[one], stats[other]):
            continue
        if os.path.realpath(paths[one]) == os.path.realpath(paths[other]):
            raise DataError(
                f'class folders {paths[one]} and {paths[other]} are one folder; remove a link'
            )


def _devices_that_pass_on() -> set[str]:
    """Returns MAJOR:MINOR of all mounts of the kinds in ``_PASS_ON``."""
    with open('/proc/self/mountinfo', errors='surrogateescape') as mounts:
        lines = [line.partition(' - ') for line in mounts]
    return {mount.split()[2] for mount, _, kind in lines if kind.startswith(_PASS_ON)}


def manifest_of(root, manifests) -> Path:
    """Returns the path of the manifest of ``root``, a file in the folder ``manifests``."""
    full = os.path.abspath(root)
    digest = hashlib.sha256(os.fsencode(full)).hexdigest()[:8]
    return Path(manifests) / f'{os.path.basename(full)}-{digest}.npz'


def listing_of(root, manifests) -> ImageFolder:
    """Reads the manifest of an image folder, or lists the folder if the manifest is not up to date.

    Writes nothing; :func:`save_manifest` writes manifests.

    Args:
        root (str or Path): The image folder.
        manifests (str or Path): The folder of manifests.

    Returns:
        ImageFolder: The list.

    Raises:
        DataError: As in :func:`list_images`.
    """
    path, root = manifest_of(root, manifests), os.fspath(root)
    try:
        with np.load(path) as file:
            manifest = {name: file[name] for name in file.files}
        if manifest['layout'] != _LAYOUT_OF_A_MANIFEST:
            raise ValueError('another release wrote it')
        mark, _ = fingerprint(root)
        if not mark:
            raise ValueError('the file system may not keep the times of folders')
        if str(manifest['fingerprint']) != mark:
            raise ValueError('the folder has changed since')
        classes = os.fsdecode(manifest['classes'].tobytes())
        packed = root, classes, manifest['counts'], manifest['files'].tobytes()
        return ImageFolder.unpack(packed)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        print(f'note: manifest {path} is not used ({error}); listing {root} again', flush=True)
    return list_images(root)


def save_manifest(folder: ImageFolder, manifests, now=time.time) -> None:
    """Writes the manifest of a listing, unless an up-to-date manifest exists.

    Writes none if the folder has changed since it was listed. Nor does it write one within two
    seconds of a change: the next change could come in the same tick of the file system's clock. A
    manifest that cannot be written causes a note, not an error; so does a file system that may not
    keep the times of folders, for which none is written (:func:`fingerprint`).

    Args:
        folder (ImageFolder): The list.
        manifests (str or Path): The folder of manifests.
        now (callable): Returns the time in seconds since 1970.
    """
    path = manifest_of(folder.root, manifests)
    try:
        mark, changed = fingerprint(folder.root)
        if not mark:
            print(
                f'note: every start lists {folder.root} anew: its file system may not keep the '
                'times of folders',
                flush=True,
            )
            return
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
        print(
            f'note: manifest {path} cannot be written ({error}); the next run lists images again',
            flush=True,
        )
        return
    print(f'{len(folder):,} images in {folder.root}; list kept in {path}', flush=True)


def _has(path, mark) -> bool:
    try:
        with np.load(path) as file:
            return str(file['fingerprint']) == mark and file['layout'] == _LAYOUT_OF_A_MANIFEST
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
