"""ResNet-50 as Goyal et al. train it, in PyTorch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# A layer's tensors, and the names that Chainer has for them.
CHAINERS = {
    nn.Conv2d: {'weight': 'W'},
    nn.BatchNorm2d: {
        'weight': 'gamma',
        'bias': 'beta',
        'running_mean': 'avg_mean',
        'running_var': 'avg_var',
    },
    nn.Linear: {'weight': 'W', 'bias': 'b'},
}
BLOCKS = {'res2': 3, 'res3': 4, 'res4': 6, 'res5': 3}
STEMS = {'imagenet': (7, 2), 'cifar': (3, 1)}  # kernel size and stride of the first convolution


def _convolution(n_in, n_out, ksize, stride):
    return nn.Conv2d(n_in, n_out, ksize, stride, padding=ksize // 2, bias=False)


def _batch_normalization(size):
    """With momentum 1 the running statistics are those of the last minibatch (S)."""
    return nn.BatchNorm2d(size, eps=1e-5, momentum=1.0)


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 convolutions beside a shortcut."""

    def __init__(self, in_channels, width, stride):
        super().__init__()
        self.conv1 = _convolution(in_channels, width, 1, 1)
        self.bn1 = _batch_normalization(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.bn2 = _batch_normalization(width)
        self.conv3 = _convolution(width, 4 * width, 1, 1)
        self.bn3 = _batch_normalization(4 * width)
        self.projects = stride != 1 or in_channels != 4 * width
        if self.projects:
            self.conv4 = _convolution(in_channels, 4 * width, 1, stride)
            self.bn4 = _batch_normalization(4 * width)

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + (self.bn4(self.conv4(x)) if self.projects else x))


class ResNet50(nn.Module):
    """The twin of :class:`reproduce.resnet50.ResNet50`, which has a table of the layers.

    The same arguments give the same initial values, bit by bit: NumPy draws them in the same order.

    Args:
        n_classes, width, stem, seed, shallow: As there.
    """

    def __init__(self, n_classes=1000, width=64, stem='imagenet', seed=None, shallow=False):
        super().__init__()
        self.stem = stem
        self.conv1 = _convolution(3, width, *STEMS[stem])
        self.bn1 = _batch_normalization(width)
        in_channels = width
        for name, n_blocks in BLOCKS.items():
            blocks = nn.ModuleList()
            for i in range(1 if shallow else n_blocks):
                stride = 2 if i == 0 and name != 'res2' else 1
                blocks.append(Bottleneck(in_channels, width, stride))
                in_channels = 4 * width
            self.add_module(name, blocks)
            width *= 2
        self.fc = nn.Linear(in_channels, n_classes)
        self._initialize(np.random.RandomState(seed))

    @torch.no_grad()
    def _initialize(self, rng):
        for layer in self.modules():  # in the order of their construction
            if isinstance(layer, nn.Conv2d):
                shape = layer.weight.shape
                deviation = np.sqrt(2 / (shape[0] * shape[2] * shape[3]))  # He, by fan-out
                layer.weight[...] = _normal(rng, deviation, shape)
        self.fc.weight[...] = _normal(rng, 0.01, self.fc.weight.shape)
        self.fc.bias.zero_()
        for block in self.modules():
            if isinstance(block, Bottleneck):
                block.bn3.weight.zero_()

    def forward(self, x):
        """Computes logits [N, n_classes] from float32 images [N, 3, H, W]."""
        h = F.relu(self.bn1(self.conv1(x)))
        if self.stem == 'imagenet':
            h = F.max_pool2d(h, 3, stride=2, padding=1)
        for name in BLOCKS:
            for block in getattr(self, name):
                h = block(h)
        return self.fc(h.mean(dim=(2, 3)))


def _normal(rng, deviation, shape):
    return torch.from_numpy(rng.normal(0, deviation, tuple(shape)).astype(np.float32))


def chainer_names(model) -> dict:
    """Returns {name in PyTorch: name in Chainer} of all parameters and batch statistics.

    Args:
        model (torch.nn.Module): ResNet50, or another model of the layers in ``CHAINERS``.
    """
    return {
        f'{name}.{own}': '/' + f'{name}.{theirs}'.replace('.', '/')
        for name, layer in model.named_modules()
        for own, theirs in CHAINERS.get(type(layer), {}).items()
        if getattr(layer, own, None) is not None
    }
