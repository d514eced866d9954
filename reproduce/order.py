"""The order of images, a pure function of seed and epoch that every process can compute."""

from __future__ import annotations

import functools

import numpy as np


class ImageOrder:
    """Assigns images to each worker in each iteration.

    Every epoch is a new random permutation of the whole training set (G). All permutations, laid
    end to end, form one endless stream. With b images per worker and B = n b, image k of the stream
    belongs to iteration k // B and worker (k % B) // b. Each image comes once per epoch, and a
    batch may straddle epochs. Nothing needs to be scattered or saved.

    Args:
        n_images (int): Number of training images.
        n_workers (int): n, number of workers.
        local_batch_size (int): b, images per worker and iteration.
        seed (int): Seed of the permutations, 0 to 2**32 - 1.

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
                f'training set of {n_images}: use fewer workers or smaller minibatches'
            )
        # RandomState's stream never changes. A Generator's may change with NumPy's version.
        # Two permutations suffice: an iteration touches two epochs at most, over all workers.
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.RandomState([seed, epoch]).permutation(n_images)
        )

    def __call__(self, iteration: int, worker: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the images of a worker in an iteration.

        Args:
            iteration (int): Iteration, from 0.
            worker (int): Worker, from 0.

        Returns:
            tuple: Epoch and index of each image, two int64 arrays [local_batch_size].
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
