"""The miniature's second network: small enough for two cores, and good for 80 % on CIFAR-10."""

from __future__ import annotations

import extensions  # noqa: F401  isort: skip  (makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import initializers

from reproduce.resnet50 import batch_normalization, convolution


class BasicBlock(chainer.Chain):
    """Two 3x3 convolutions beside a shortcut (He et al., arXiv:1512.03385).

    The first one has the stride. If that is 1, channels are as many as before, and the shortcut is
    the identity. If not, the shortcut is a 1x1 convolution with the stride, followed by BN. ``bn2``
    starts with gamma 0 (G).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, rng=None):
        super().__init__()
        self.projects = stride != 1
        with self.init_scope():
            self.conv1 = convolution(in_channels, channels, 3, stride, rng)
            self.bn1 = batch_normalization(channels)
            self.conv2 = convolution(channels, channels, 3, 1, rng)
            self.bn2 = batch_normalization(channels, initial_gamma=0)
            if self.projects:
                self.conv3 = convolution(in_channels, channels, 1, stride, rng)
                self.bn3 = batch_normalization(channels)

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (self.bn3(self.conv3(x)) if self.projects else x))


class ResNet10(chainer.Chain):
    """He et al.'s ResNet-18 with one block per stage, narrower, and with a stem for small images::

        link   layers                        channels   side, of 32
        conv1  3x3                           width      32
               max pooling 3x3, stride 2     width      16
        res2   1 basic block                 width      16
        res3   1 basic block, stride 2       2 * width  8
        res4   1 basic block, stride 2       4 * width  4
        res5   1 basic block, stride 2       8 * width  2
        fc     linear, after global average  n_classes

    It takes the place of :class:`reproduce.resnet50.ResNet50`, and has its initial values and its
    BN. It has 1,228,970 parameters with a width of 32 and 10 classes.

    Args:
        n_classes (int): Number of classes, and of logits.
        width (int): Channels of the stem.
        stem (str): ``'cifar'``, as ResNet50 calls a first convolution of 3x3.
        seed (int or None): Seed of the initial values, drawn in the order of the links.
        shallow (bool): True, as ResNet50 calls one block per stage.

    Raises:
        ValueError: ``stem`` or ``shallow`` has another value.
    """

    def __init__(self, n_classes, width, stem, seed: int | None, shallow):
        if stem != 'cifar' or not shallow:
            raise ValueError(
                f"ResNet10 needs stem='cifar' and shallow=True, not {stem!r} and {shallow!r}"
            )
        super().__init__()
        rng = None if seed is None else np.random.RandomState(seed)
        with self.init_scope():
            self.conv1 = convolution(3, width, 3, 1, rng)
            self.bn1 = batch_normalization(width)
            self.res2 = BasicBlock(width, width, 1, rng)
            self.res3 = BasicBlock(width, 2 * width, 2, rng)
            self.res4 = BasicBlock(2 * width, 4 * width, 2, rng)
            self.res5 = BasicBlock(4 * width, 8 * width, 2, rng)
            self.fc = L.Linear(8 * width, n_classes, initialW=initializers.Normal(0.01, rng=rng))

    def forward(self, x):
        """Computes logits [N, n_classes] from float32 images [N, 3, H, W]."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.max_pooling_2d(h, 3, stride=2, pad=1, cover_all=False)
        h = self.res5(self.res4(self.res3(self.res2(h))))
        return self.fc(F.average(h, axis=(2, 3)))
