"""The miniature's second network against its definition, written out in NumPy with float64."""

import numpy as np
import pytest

from reproduce.studies.miniature.network import ResNet10  # isort: skip  (first: Chainer on NumPy 2)
import chainer

WIDTH, N_CLASSES = 3, 4
STRIDES = {'res2': 1, 'res3': 2, 'res4': 2, 'res5': 2}


def arrays_of(model):
    """Random values instead of the initial ones, whose gamma 0 would hide half of the network."""
    rng = np.random.RandomState(1)
    for _, param in sorted(model.namedparams()):
        param.array[...] = rng.uniform(0.2, 0.9, param.shape) * rng.choice((-1, 1), param.shape)
    return {name: param.array.astype(np.float64) for name, param in model.namedparams()}


def convolution(x, W, stride):
    n, _, height, width = x.shape
    pad, side = W.shape[2] // 2, W.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    y = np.empty((n, len(W), -(-height // stride), -(-width // stride)))
    for i, j in np.ndindex(*y.shape[2:]):
        window = x[:, :, i * stride : i * stride + side, j * stride : j * stride + side]
        y[:, :, i, j] = np.einsum('nchw,ochw->no', window, W)
    return y


def logits(arrays, x):
    """The network of the docstring's table. BN has the statistics of ``x``."""

    def normalized(h, name):
        mean, var = h.mean((0, 2, 3), keepdims=True), h.var((0, 2, 3), keepdims=True)
        gamma, beta = (arrays[f'{name}/{k}'].reshape(1, -1, 1, 1) for k in ('gamma', 'beta'))
        return gamma * (h - mean) / np.sqrt(var + 1e-5) + beta

    def layer(h, place, number, stride):
        h = convolution(h, arrays[f'{place}/conv{number}/W'], stride)
        return normalized(h, f'{place}/bn{number}')

    h = np.maximum(layer(x, '', 1, 1), 0)
    padded = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    sides = [range(-(-side // 2)) for side in h.shape[2:]]
    h = np.array(
        [[padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((2, 3)) for j in sides[1]]
         for i in sides[0]]
    ).transpose(2, 3, 0, 1)  # fmt: skip
    for name, stride in STRIDES.items():
        inside = np.maximum(layer(h, f'/{name}', 1, stride), 0)
        inside = layer(inside, f'/{name}', 2, 1)
        shortcut = layer(h, f'/{name}', 3, stride) if stride > 1 else h
        h = np.maximum(inside + shortcut, 0)
    return h.mean((2, 3)) @ arrays['/fc/W'].T + arrays['/fc/b']


@pytest.mark.parametrize('shape', [(5, 3, 32, 32), (2, 3, 13, 18)])
def test_logits_are_those_of_the_definition(shape):
    model = ResNet10(N_CLASSES, WIDTH, 'cifar', 0, True)
    arrays = arrays_of(model)
    x = np.random.RandomState(2).randn(*shape).astype(np.float32)
    with chainer.using_config('train', True):
        y = model(x)
    assert (y.dtype, y.shape) == (np.float32, (shape[0], N_CLASSES))
    expected = logits(arrays, x.astype(np.float64))
    assert np.ptp(expected) > 1
    # float32: 10 layers of some hundred additions each, whose values BN keeps near 1.
    np.testing.assert_allclose(y.array, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_has_the_size_that_the_table_gives():
    model = ResNet10(10, 32, 'cifar', 0, True)
    channels, size = (32, 32, 64, 128, 256), 9 * 3 * 32 + 2 * 32
    for before, after in zip(channels, channels[1:]):
        size += 9 * after * (before + after) + 4 * after
        size += (before * after + 2 * after) * (before != after)
    assert sum(param.size for param in model.params()) == size + 257 * 10 == 1_228_970


def test_starts_as_its_shortcuts_and_from_its_seed():
    first, same, other = (ResNet10(10, 32, 'cifar', seed, True) for seed in (0, 0, 1))
    for (name, a), (_, b), (_, c) in zip(*(sorted(m.namedparams()) for m in (first, same, other))):
        np.testing.assert_array_equal(a.array, b.array)
        if name.endswith('/W'):
            assert (a.array != c.array).mean() > 0.999
            fan_out = np.prod(a.shape) / a.shape[1]
            deviation = 0.01 if name == '/fc/W' else np.sqrt(2 / fan_out)
            assert a.array.std() == pytest.approx(deviation, rel=0.1)
        else:
            expected = 'gamma' in name and ('res' not in name or 'bn2' not in name)
            np.testing.assert_array_equal(a.array, np.full(a.shape, expected, np.float32))


@pytest.mark.parametrize('stem, shallow', [('imagenet', True), ('cifar', False)])
def test_other_networks_are_refused(stem, shallow):
    with pytest.raises(ValueError, match=f'not {stem!r} and {shallow}'):
        ResNet10(10, 32, stem, 0, shallow)
