"""How fast do all ranks get ImageNet's list of images? ./run_mpi.sh benchmark listing"""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
from mpi4py import MPI

from reproduce import listing
from reproduce.listing import ImageFolder, fingerprint
from reproduce.studies.speed.side_by_side import side_by_side, table


def _names_like_imagenet(root):
    """Returns a listing of ROOT with ImageNet's number of classes and of images.

    Makes the class folders, and leaves them empty.
    """
    rng = np.random.RandomState(0)
    classes = [f'n{number:08}' for number in np.sort(rng.choice(10**8, 1000, replace=False))]
    counts = np.full(1000, 1281) + (np.arange(1000) < 167)
    files = bytearray()
    for name, n in zip(classes, counts):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (0, 0))
        numbers = np.sort(rng.choice(10**5, n, replace=False))
        files += ''.join(f'{name}_{number}.JPEG\0' for number in numbers).encode()
    mark, _ = fingerprint(root)
    return ImageFolder(str(root), tuple(classes), counts, bytes(files), mark)


def run(repeat: int) -> dict | None:
    """Times how the list of a training set of ImageNet's size reaches all ranks.

    Ours is read from a manifest and sent packed. The peer is a pickled list of names.

    Args:
        repeat (int): Rounds that are timed.

    Returns:
        dict: The table and the megabytes sent, on rank 0; None on the other ranks.
    """
    mpi = MPI.COMM_WORLD
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / 'train'
        if mpi.rank == 0:
            made = _names_like_imagenet(root)
            listing.save_manifest(made, folder)
        sent = None

        def from_manifest():
            nonlocal sent
            sent = listing.listing_of(root, folder).pack() if mpi.rank == 0 else None
            return listing.ImageFolder.unpack(mpi.bcast(sent)).labels

        names = [made.name(i) for i in range(len(made))] if mpi.rank == 0 else None
        ours = 'manifest, packed, on every rank'
        candidates = {ours: from_manifest, 'pickled list of names': lambda: mpi.bcast(names)}
        seconds = side_by_side(candidates, repeat, mpi.barrier)
        slowest = {name: np.max(mpi.allgather(values), axis=0) for name, values in seconds.items()}
    if mpi.rank > 0:
        return None
    result = table(f'{len(made):,} images in 1,000 classes, {mpi.size} ranks', slowest, ours)
    megabytes = len(pickle.dumps(sent)) / 1e6
    print(f'{megabytes:.1f} MB on the wire; pickled names: {len(pickle.dumps(names)) / 1e6:.1f} MB')
    return {**result, 'megabytes': megabytes}
