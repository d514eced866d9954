"""The networks that the benchmarks of functions and of systems train. It imports no package."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Network:
    """A ResNet-50 and its minibatch."""

    width: int
    stem: str
    image_size: int
    batch_size: int
    n_classes: int

    def __str__(self):
        return (
            f'ResNet-50, width {self.width}, stem {self.stem}; {self.batch_size} images of '
            f'{self.image_size} x {self.image_size}'
        )


NETWORKS = {
    'smoke': Network(16, 'imagenet', 32, 32, 10),
    'cifar': Network(16, 'cifar', 32, 32, 10),
    '64px': Network(64, 'imagenet', 64, 16, 1000),
    '224px': Network(64, 'imagenet', 224, 4, 1000),
}
