"""The order of images: a pure function of (seed, epoch), the same whoever asks."""

from __future__ import annotations

import functools

import numpy as np


class ImageOrder:
    """Which images each worker sees in each iteration.

    Every epoch is a new random permutation of the whole training set (G). Laid end to end they are
    one endless stream, and image k of it belongs to iteration k // B, worker (k % B) // b, with b
    images per worker and B = n b. So a batch may straddle epochs, each image comes once in each,
    and nothing needs to be scattered or saved.

    Args:
        n_images (int): Images of the training set.
        n_workers (int): n.
        local_batch_size (int): b.
        seed (int): 0 to 2**32 - 1.

    Raises:
        ValueError: The total batch is larger than the training set.
    """

    def __init__(self, n_images: int, n_workers: int, local_batch_size: int, seed: int):
        self.n_images = n_images
        self.local_batch_size = local_batch_size
        self.total_batch_size = n_workers * local_batch_size
        if self.total_batch_size > n_images:
            raise ValueError(
                f'the total batch of {self.total_batch_size} images is larger than the '
                f'training set of {n_images}'
            )
        # RandomState's stream is frozen for good; a Generator's may change with NumPy's version.
        # A local batch touches two epochs at most, and so does the iteration of all the workers of
        # a process.
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.RandomState([seed, epoch]).permutation(n_images)
        )

    def __call__(self, iteration: int, worker: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of a worker in an iteration.

        Returns:
            tuple: The epoch and the index of each image, two int64 arrays [local_batch_size].
        """
        first = iteration * self.total_batch_size + worker * self.local_batch_size
        epochs, positions = np.divmod(
            np.arange(first, first + self.local_batch_size, dtype=np.int64), self.n_images
        )
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            indices[now] = self._permutation(int(epoch))[positions[now]]
        return epochs, indices
