"""Which images a run trains and validates on: folders, or the 1,797 digits that come along.

Provenance and licence (CC BY 4.0) of the digits stand in data/README.md.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from extensions.virtual_workers import workers_of
from reproduce import listing

_FILE = Path(__file__).parent / 'data' / 'digits.csv.gz'
_N_VALIDATION = 360
_SIDE = 32


class InputError(Exception):
    """The user's input cannot be run; the message says why in one line, and what would work."""


def roots(settings):
    """The folders of training and validation images; None where nothing was said."""
    if (settings.train_root is None) != (settings.val_root is None):
        raise InputError('--train-root and --val-root go together: one of them is missing')
    if settings.train_root is None and settings.preset == 'paper' and 'IMAGENET_ROOT' in os.environ:
        root = Path(os.environ['IMAGENET_ROOT'])
        return str(root / 'train'), str(root / 'val')
    return settings.train_root, settings.val_root


def count_images(settings) -> int:
    """Training images, counted where there is a folder."""
    train_root, _ = roots(settings)
    if not train_root:
        return settings.n_train_images
    return len(listing.listing_of(train_root, settings.manifests_folder))


def find(settings, n_processes):
    """Looks for the images, and checks that the settings fit them; writes nothing.

    Args:
        settings (Settings): Of the run.
        n_processes (int): That play its workers.

    Returns:
        tuple of ImageFolder: Training and validation images; None for the digits, which
            :func:`save` writes.

    Raises:
        InputError, ~reproduce.listing.DataError: What does not fit, and how to mend it.
    """
    try:
        workers_of(0, n_processes, settings.workers)
    except ValueError as error:
        raise InputError(f'--workers: {error}') from error
    train_root, _ = roots(settings)
    if train_root is None and settings.preset == 'smoke':
        check_total_batch(settings, len(split_digits()[0]))
        return None
    if train_root is None:
        raise InputError(
            'no images: give --train-root and --val-root, or set IMAGENET_ROOT to a folder with '
            'train and val in it; "./run_mpi.sh smoke" runs without any'
        )
    folders = list_folders(settings)
    check_total_batch(settings, len(folders[0]))
    return folders


def save(settings, folders):
    """Keeps the listings that :func:`find` returned in manifests, or writes the digits into --out.

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
    """The listings of the folders of training and validation images, from their manifests where
    these are up to date."""
    train, val = (listing.listing_of(root, settings.manifests_folder) for root in roots(settings))
    listing.check_same_classes(train, val)
    return train, val


def check_total_batch(settings, n_images):
    if settings.total_batch_size > n_images:
        raise InputError(
            f'the total batch of {settings.workers} workers x {settings.local_batch_size} images = '
            f'{settings.total_batch_size} is larger than the training set of {n_images} images: '
            'choose fewer --workers or a smaller --local-batch-size'
        )


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The data set as it was published.

    Returns:
        tuple: Images, uint8 [1797, 8, 8] of values 0 to 16, ink on nothing, and labels, int32
            [1797].
    """
    table = np.loadtxt(_FILE, delimiter=',', dtype=np.float64).astype(np.uint8)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int32)


def split_digits(n_images: int = 1797) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the 1,437 training and the 360 validation images, drawn once and for all."""
    permutation = np.random.RandomState(0).permutation(n_images)
    return np.sort(permutation[_N_VALIDATION:]), np.sort(permutation[:_N_VALIDATION])


def write_digits(root) -> None:
    """Writes ROOT/{train,val}/DIGIT/NNNN.png, 32 x 32 pixels in grey, unless ROOT is there.

    The folder appears complete or not at all: it is written under another name and then renamed.

    Args:
        root (str or Path): Its parent must exist.
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
