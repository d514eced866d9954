"""Finds the images for training and validation: two folders, or the 1,797 digits in data/.

data/README.md states the provenance and the licence (CC BY 4.0) of the digits.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from extensions.virtual_workers import workers_of
from reproduce import listing
from reproduce.settings import InputError

_FILE = Path(__file__).parent / 'data' / 'digits.csv.gz'
_N_VALIDATION = 360
_SIDE = 32
_NO_IMAGES = (
    'no images: give {}, or, for --preset paper, set IMAGENET_ROOT to a folder that contains train '
    'and val; "./run_mpi.sh smoke" needs none'
)


def roots(settings):
    """Returns the folders of training and validation images, or None for both if none is given.

    Raises:
        InputError: Only one of the folders is given; or both are one, or one lies in the other.
    """
    if (settings.train_root is None) != (settings.val_root is None):
        raise InputError('--train-root and --val-root go together: give both')
    if settings.train_root is None and settings.preset == 'paper' and 'IMAGENET_ROOT' in os.environ:
        root = Path(os.environ['IMAGENET_ROOT'])
        train, val = str(root / 'train'), str(root / 'val')
    else:
        train, val = settings.train_root, settings.val_root
    if train is not None and os.path.exists(train):
        _check_apart(train, val)
    return train, val


def _check_apart(train, val):
    real = [os.path.realpath(root) for root in (train, val)]
    if os.path.commonpath(real) in real:
        how = 'are one folder' if real[0] == real[1] else 'lie one in the other'
        raise InputError(
            f'the training images {train} and the validation images {val} {how}: '
            'give two folders of class folders to --train-root and --val-root'
        )


def count_images(settings) -> int:
    """Counts the training images; without a folder, returns ``settings.n_train_images``."""
    train_root, _ = roots(settings)
    if not train_root:
        return settings.n_train_images
    return len(listing.listing_of(train_root, settings.manifests_folder))


def find(settings, n_processes):
    """Finds the images, and checks that the settings fit them. Writes nothing.

    Args:
        settings (Settings): Settings of the run.
        n_processes (int): Number of processes that play the workers.

    Returns:
        tuple of ImageFolder: Training and validation images. None stands for the digits, which
            :func:`save` writes.

    Raises:
        InputError: A setting does not fit the images or the processes.
        ~reproduce.listing.DataError: The images cannot be used.
    """
    check_workers(settings, n_processes)
    train_root, _ = roots(settings)
    if train_root is None and settings.preset == 'smoke':
        check_total_batch(settings, len(split_digits()[0]))
        return None
    if train_root is None:
        raise InputError(_NO_IMAGES.format('--train-root and --val-root'))
    folders = list_folders(settings)
    check_total_batch(settings, len(folders[0]))
    return folders


def find_validation(settings):
    """Finds the images for validation alone. Writes nothing but the digits, if they are not there.

    Args:
        settings (Settings): Settings of the run.

    Returns:
        ImageFolder: The images of --val-root, of IMAGENET_ROOT, or the digits in --out.

    Raises:
        InputError: There is no folder, or the digits cannot be written.
        ~reproduce.listing.DataError: The images cannot be used.
    """
    root = settings.val_root
    if root is None and settings.train_root is None:
        _, root = roots(settings)
    if root is not None:
        return listing.listing_of(root, settings.manifests_folder)
    if settings.preset != 'smoke' or settings.train_root is not None:
        raise InputError(_NO_IMAGES.format('--val-root'))
    digits = Path(settings.out) / 'digits'
    try:
        digits.parent.mkdir(parents=True, exist_ok=True)
        write_digits(digits)
    except OSError as error:
        raise InputError(
            f'--out {settings.out} cannot take the digits: {error.strerror}; choose another folder'
        ) from error
    return listing.list_images(digits / 'val')


def save(settings, folders):
    """Saves listings as manifests, or writes the digits into --out.

    Args:
        settings (Settings): Settings of the run.
        folders (tuple of ImageFolder): Returned by :func:`find`; None for the digits.

    Returns:
        tuple of ImageFolder: Training and validation images.
    """
    if folders is None:
        root = Path(settings.out) / 'digits'
        write_digits(root)
        return listing.list_images(root / 'train'), listing.list_images(root / 'val')
    for folder in folders:
        listing.save_manifest(folder, settings.manifests_folder)
    return folders


def list_folders(settings):
    """Lists the training and the validation images, from manifests that are up to date if possible.

    Prints a note if the two folders may have been swapped, or if one may be a copy of the other.

    Returns:
        tuple of ImageFolder: Training and validation images.

    Raises:
        ~reproduce.listing.DataError: A folder cannot be used, or their classes differ.
    """
    train, val = (listing.listing_of(root, settings.manifests_folder) for root in roots(settings))
    listing.check_same_classes(train, val)
    if len(val) > len(train):
        print(
            f'note: more images for validation ({len(val):,} in {val.root}) than for training '
            f'({len(train):,} in {train.root}): are --train-root and --val-root swapped?',
            flush=True,
        )
    if train.digest() == val.digest():
        print(
            f'note: {train.root} and {val.root} have the same file names in all classes: '
            'is one a copy of the other?',
            flush=True,
        )
    return train, val


def check_workers(settings, n_processes):
    """Raises InputError if the processes cannot play the workers."""
    try:
        workers_of(0, n_processes, settings.workers)
    except ValueError as error:
        raise InputError(f'--workers: {error}') from error


def check_total_batch(settings, n_images):
    """Raises InputError if the total batch is larger than the ``n_images`` training images."""
    if settings.total_batch_size > n_images:
        raise InputError(
            f'the total batch of {settings.workers} workers x {settings.local_batch_size} images = '
            f'{settings.total_batch_size} is larger than the training set of {n_images} images: '
            'choose fewer --workers or a smaller --local-batch-size'
        )


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Loads the digits as they were published.

    Returns:
        tuple: Images, uint8 [1797, 8, 8], from 0 (no ink) to 16; labels, int32 [1797].
    """
    table = np.loadtxt(_FILE, delimiter=',', dtype=np.float64).astype(np.uint8)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int32)


def split_digits(n_images: int = 1797) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the 1,437 training and the 360 validation images, always the same."""
    permutation = np.random.RandomState(0).permutation(n_images)
    return np.sort(permutation[_N_VALIDATION:]), np.sort(permutation[:_N_VALIDATION])


def write_digits(root) -> None:
    """Writes ROOT/{train,val}/DIGIT/NNNN.png, 32 x 32 pixels in grey, unless ROOT exists.

    The folder appears complete or not at all: a folder of another name is filled, then renamed.

    Args:
        root (str or Path): The folder ROOT, whose parent must exist.
    """
    root = Path(root)
    if root.exists():
        return
    unfinished = root.with_name(f'{root.name}.unfinished-{os.getpid()}')
    images, labels = load_digits()
    pixels = np.round(images * (255 / 16)).astype(np.uint8)
    for name, indices in zip(('train', 'val'), split_digits(len(images))):
        for digit in range(10):
            (unfinished / name / str(digit)).mkdir(parents=True)
        for i in indices:
            enlarged = Image.fromarray(pixels[i]).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
            enlarged.save(unfinished / name / str(labels[i]) / f'{i:04d}.png')
    try:
        unfinished.rename(root)
    except OSError:
        shutil.rmtree(unfinished)
        if not root.exists():
            raise
