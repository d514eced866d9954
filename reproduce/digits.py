"""The 1,797 handwritten digits that come with the program: real images for a machine that has no
others.

Provenance and licence (CC BY 4.0) stand in data/README.md.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

_FILE = Path(__file__).parent / 'data' / 'digits.csv.gz'
_N_VALIDATION = 360
_SIDE = 32


def load() -> tuple[np.ndarray, np.ndarray]:
    """The data set as it was published.

    Returns:
        tuple: Images, uint8 [1797, 8, 8] of values 0 to 16, ink on nothing, and labels, int32
            [1797].
    """
    table = np.loadtxt(_FILE, delimiter=',', dtype=np.float64).astype(np.uint8)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int32)


def split(n_images: int = 1797) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the 1,437 training and the 360 validation images, drawn once and for all."""
    permutation = np.random.RandomState(0).permutation(n_images)
    return np.sort(permutation[_N_VALIDATION:]), np.sort(permutation[:_N_VALIDATION])


def write_image_folder(root) -> None:
    """Writes ROOT/{train,val}/DIGIT/NNNN.png, 32 x 32 pixels in grey, unless ROOT is there.

    The folder appears complete or not at all: it is written under another name and then renamed.

    Args:
        root (str or Path): Its parent must exist.
    """
    root = Path(root)
    if root.exists():
        return
    unfinished = root.with_name(f'{root.name}.unfinished-{os.getpid()}')
    images, labels = load()
    pixels = np.round(images * (255 / 16)).astype(np.uint8)
    for name, indices in zip(('train', 'val'), split(len(images))):
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
