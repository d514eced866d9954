"""ResNet-50 as Goyal et al. train it, in Chainer."""

from __future__ import annotations

import numbers

import extensions  # noqa: F401  isort: skip  (makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import initializers

BLOCKS = {'res2': 3, 'res3': 4, 'res4': 6, 'res5': 3}
STEMS = {'imagenet': (7, 2), 'cifar': (3, 1)}  # kernel size and stride of the first convolution


def convolution(n_in, n_out, ksize, stride, rng):
    W = initializers.HeNormal(fan_option='fan_out', rng=rng)
    return L.Convolution2D(n_in, n_out, ksize, stride, pad=ksize // 2, nobias=True, initialW=W)


def batch_normalization(size, initial_gamma=1):
    return L.BatchNormalization(size, decay=0, eps=1e-5, initial_gamma=initial_gamma)


class Bottleneck(chainer.Chain):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; ``width`` channels inside, ``4 * width`` out.

    The 3x3 convolution has the stride. If the shape changes, the shortcut is a 1x1 convolution with
    that stride, followed by BN. If not, the shortcut is the identity. ``bn3`` starts with gamma 0,
    so a new block passes on its shortcut only.
    """

    def __init__(self, in_channels: int, width: int, stride: int, rng=None):
        super().__init__()
        self.projects = stride != 1 or in_channels != 4 * width
        with self.init_scope():
            self.conv1 = convolution(in_channels, width, 1, 1, rng)
            self.bn1 = batch_normalization(width)
            self.conv2 = convolution(width, width, 3, stride, rng)
            self.bn2 = batch_normalization(width)
            self.conv3 = convolution(width, 4 * width, 1, 1, rng)
            self.bn3 = batch_normalization(4 * width, initial_gamma=0)
            if self.projects:
                self.conv4 = convolution(in_channels, 4 * width, 1, stride, rng)
                self.bn4 = batch_normalization(4 * width)

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + (self.bn4(self.conv4(x)) if self.projects else x))


class ResNet50(chainer.Chain):
    """ResNet-50 with the stride in the 3x3 convolutions (G); 25,557,032 parameters by default (D)::

        link   layers                        channels     side: imagenet, 224   cifar, 32
        conv1  7x7, stride 2 (cifar 3x3, 1)  width        112                   32
               max pooling 3x3, stride 2     width        56                    (none)
        res2   3 bottlenecks                 4 * width    56                    32
        res3   4 bottlenecks, 1st stride 2   8 * width    28                    16
        res4   6 bottlenecks, 1st stride 2   16 * width   14                    8
        res5   3 bottlenecks, 1st stride 2   32 * width   7                     4
        fc     linear, after global average  n_classes

    Convolutions have no bias, and BN follows each of them. The initial values (G)::

        convolutions  He-normal by fan-out, N(0, 2 / (k * k * out_channels))
        gamma         1, except 0 in each block's last BN, bn3
        beta          0
        fc.W          N(0, 0.01**2)
        fc.b          0

    BN has ``decay=0``: ``avg_mean`` and ``avg_var`` are the last minibatch's, not moving averages
    (S). BN's ``eps`` is 1e-5. This is Torch's default, which fb.resnet.torch (the "fb" of this
    variant) keeps. Chainer's default is 2e-5.

    Deviation: for m values, Chainer's ``avg_var`` is m / (m - 1) times the variance that normalizes
    the values.

    Args:
        n_classes (int): Number of classes, and of logits.
        width (int): Channels of the stem. All other layers scale with them; 16 is a slim network.
        stem (str): ``'imagenet'``, or ``'cifar'`` for small images (not the paper's).
        seed (int or None): Seed of the initial values, which depend on nothing else. They are drawn
            in this order: conv1; each block's conv1, conv2, conv3, conv4 (if the block projects);
            fc. None draws from NumPy's global state.
        shallow (bool): Whether each stage has one bottleneck only, for small studies (not the
            paper's).

    Raises:
        ValueError: ``stem`` is neither of the two, or ``n_classes`` or ``width`` is not an integer
            above 0.
    """

    def __init__(
        self, n_classes=1000, width=64, stem='imagenet', seed: int | None = None, shallow=False
    ):
        for name, value in (('n_classes', n_classes), ('width', width)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f'{name} must be an integer of at least 1, not {value!r}')
        if stem not in STEMS:
            raise ValueError(f'stem must be one of {", ".join(map(repr, STEMS))}, not {stem!r}')
        super().__init__()
        rng = None if seed is None else np.random.RandomState(seed)
        self.stem = stem
        with self.init_scope():
            self.conv1 = convolution(3, width, *STEMS[stem], rng)
            self.bn1 = batch_normalization(width)
            in_channels = width
            for name, n_blocks in BLOCKS.items():
                # Not a Sequential, which numbers its links in another order than it calls them.
                setattr(self, name, chainer.ChainList())
                for i in range(1 if shallow else n_blocks):
                    stride = 2 if i == 0 and name != 'res2' else 1
                    self[name].append(Bottleneck(in_channels, width, stride, rng))
                    in_channels = 4 * width
                width *= 2
            self.fc = L.Linear(in_channels, n_classes, initialW=initializers.Normal(0.01, rng=rng))

    def forward(self, x):
        """Computes logits [N, n_classes] from float32 images [N, 3, H, W] of any size."""
        h = F.relu(self.bn1(self.conv1(x)))
        if self.stem == 'imagenet':
            # Chainer's default, cover_all=True, would turn a side of 112 into 57, not 56.
            h = F.max_pooling_2d(h, 3, stride=2, pad=1, cover_all=False)
        for name in BLOCKS:
            for block in self[name]:
                h = block(h)
        return self.fc(F.average(h, axis=(2, 3)))
