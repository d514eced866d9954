"""ResNet50 against its definition: initial values, shapes, a NumPy float64 oracle, torchvision."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from reproduce.resnet50 import ResNet50  # isort: skip  (makes Chainer importable on NumPy 2)
import chainer
import chainer.links as L
from chainer.backends import cuda

N_BLOCKS = {'res2': 3, 'res3': 4, 'res4': 6, 'res5': 3}


# --- The oracle: ResNet-50 written out in NumPy, from a dict of arrays to logits -----------------


def convolution(x, W, stride):
    ksize = W.shape[2]
    pad = ksize // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    height = (x.shape[2] - ksize) // stride + 1
    width = (x.shape[3] - ksize) // stride + 1
    y = 0
    for i in range(ksize):
        for j in range(ksize):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            y = y + np.tensordot(W[:, :, i, j], x[:, :, rows, columns], (1, 1))
    return y.transpose(1, 0, 2, 3)


def max_pooling(x):
    """3x3, stride 2, padding 1; only windows whose centre lies in the image."""
    height, width = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = [
        padded[:, :, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return np.max(windows, axis=0)


class Oracle:
    """The network as a function of ``arrays``; keeps the statistics of its last minibatch."""

    def __init__(self, arrays, stem, train):
        self.arrays = arrays
        self.stem = stem
        self.train = train
        self.statistics = {}

    def batch_normalization(self, x, name):
        p = {k: self.arrays[f'{name}/{k}'] for k in ('gamma', 'beta', 'avg_mean', 'avg_var')}
        if self.train:
            mean = x.mean(axis=(0, 2, 3))
            squares = ((x - mean[:, None, None]) ** 2).sum(axis=(0, 2, 3))
            m = x.shape[0] * x.shape[2] * x.shape[3]
            var = squares / m
            self.statistics[name] = mean, squares / (m - 1)
        else:
            mean, var = p['avg_mean'], p['avg_var']
        scale = p['gamma'] / np.sqrt(var + 1e-5)
        return (x - mean[:, None, None]) * scale[:, None, None] + p['beta'][:, None, None]

    def layer(self, x, prefix, number, stride=1):
        x = convolution(x, self.arrays[f'{prefix}conv{number}/W'], stride)
        return self.batch_normalization(x, f'{prefix}bn{number}')

    def __call__(self, x):
        h = np.maximum(self.layer(x, '', 1, 2 if self.stem == 'imagenet' else 1), 0)
        if self.stem == 'imagenet':
            h = max_pooling(h)
        for stage, n_blocks in N_BLOCKS.items():
            for i in range(n_blocks):
                prefix = f'{stage}/{i}/'
                stride = 2 if i == 0 and stage != 'res2' else 1
                branch = np.maximum(self.layer(h, prefix, 1), 0)
                branch = np.maximum(self.layer(branch, prefix, 2, stride), 0)
                branch = self.layer(branch, prefix, 3)
                shortcut = self.layer(h, prefix, 4, stride) if i == 0 else h
                h = np.maximum(shortcut + branch, 0)
        return h.mean(axis=(2, 3)) @ self.arrays['fc/W'].T + self.arrays['fc/b']


# --- Helpers -------------------------------------------------------------------------------------


def arrays_of(model, dtype=np.float64):
    """All parameters and statistics, copied: 'res2/0/bn1/gamma' -> array."""
    target = {}
    chainer.serializers.DictionarySerializer(target).save(model)
    return {name: np.array(array, dtype) for name, array in target.items()}


def links_of(model, link_type):
    return {n.lstrip('/'): link for n, link in model.namedlinks() if isinstance(link, link_type)}


def randomize(model, seed):
    """Gives every array that starts as a constant different values, so that all of them matter."""
    rng = np.random.RandomState(seed)
    for link in links_of(model, L.BatchNormalization).values():
        size = link.gamma.size
        link.gamma.array[...] = rng.uniform(0.5, 1.5, size) * rng.choice([-1, 1], size)
        link.beta.array[...] = rng.normal(0, 0.5, size)
        link.avg_mean[...] = rng.normal(0, 0.5, size)
        link.avg_var[...] = rng.uniform(0.5, 4, size)
    model.fc.W.array[...] = rng.normal(0, model.fc.W.shape[1] ** -0.5, model.fc.W.shape)
    model.fc.b.array[...] = rng.normal(0, 1, model.fc.b.shape)
    return model


def randomized(dtype=np.float32, **kwargs):
    with chainer.using_config('dtype', dtype):
        return randomize(ResNet50(seed=1, **kwargs), seed=2)


def images(n, height, width, dtype=np.float32, seed=3):
    return np.random.RandomState(seed).normal(0.3, 1, (n, 3, height, width)).astype(dtype)


def assert_close(actual, expected, tolerance):
    """Relative to the largest value: logits near 0 have no digits of their own."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.fixture(scope='module')
def full():
    """The paper's network as it starts; read only."""
    return ResNet50(seed=0)


# --- Structure -----------------------------------------------------------------------------------


def closed_form(n_classes, width, ksize):
    """Weights and two numbers per BN channel, stage by stage."""
    n = 3 * ksize**2 * width + 2 * width
    c_in = width
    for n_blocks, w in zip([3, 4, 6, 3], [width, 2 * width, 4 * width, 8 * width]):
        first = c_in * w + 9 * w**2 + 4 * w**2 + 4 * w * c_in + 2 * (w + w + 4 * w + 4 * w)
        other = 4 * w**2 + 9 * w**2 + 4 * w**2 + 2 * (w + w + 4 * w)
        n += first + (n_blocks - 1) * other
        c_in = 4 * w
    return n + c_in * n_classes + n_classes


def test_number_of_parameters_of_the_paper(full):
    assert full.count_params() == 25_557_032 == closed_form(1000, 64, 7)
    assert sum(p.array.size for p in full.params()) == 25_557_032


@pytest.mark.parametrize('stem, ksize', [('imagenet', 7), ('cifar', 3)])
@pytest.mark.parametrize(
    'n_classes, width', [(10, 16), (7, 3), (1, 1), (np.int64(100), np.int32(8))]
)
def test_number_of_parameters(n_classes, width, stem, ksize):
    model = ResNet50(n_classes, width, stem, seed=0)
    assert model.count_params() == closed_form(int(n_classes), int(width), ksize)


def test_a_shallow_network_has_the_first_bottleneck_of_each_stage():
    shallow = ResNet50(10, 8, 'imagenet', 0, shallow=True)
    assert shallow.count_params() == 130_962
    shapes = {name: param.shape for name, param in ResNet50(10, 8, seed=0).namedparams()}
    expected = {n: s for n, s in shapes.items() if '/res' not in n or n.split('/')[2] == '0'}
    assert {name: param.shape for name, param in shallow.namedparams()} == expected
    assert shallow(np.zeros((2, 3, 32, 32), np.float32)).shape == (2, 10)


def test_has_53_convolutions_without_bias_each_followed_by_its_bn(full):
    convolutions = links_of(full, L.Convolution2D)
    assert len(convolutions) == 53
    assert all(link.b is None for link in convolutions.values())
    assert not any(n.endswith('/b') for n, _ in full.namedparams() if n != '/fc/b')
    normalizations = links_of(full, L.BatchNormalization)
    assert set(normalizations) == {name.replace('conv', 'bn') for name in convolutions}
    for name, link in convolutions.items():
        assert normalizations[name.replace('conv', 'bn')].gamma.shape == (link.out_channels,)


@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
def test_the_stride_is_in_the_3x3_convolution(stem):
    model = ResNet50(10, 4, stem, seed=0)
    strided = {
        name: (link.ksize, link.stride)
        for name, link in links_of(model, L.Convolution2D).items()
        if link.stride != (1, 1)
    }
    expected = {'conv1': (7, (2, 2))} if stem == 'imagenet' else {}
    for stage in ('res3', 'res4', 'res5'):
        expected[f'{stage}/0/conv2'] = (3, (2, 2))
        expected[f'{stage}/0/conv4'] = (1, (2, 2))
    assert strided == expected


def test_bn_has_no_moving_average_and_goyals_eps(full):
    normalizations = links_of(full, L.BatchNormalization)
    assert len(normalizations) == 53
    assert {link.decay for link in normalizations.values()} == {0}
    assert {link.eps for link in normalizations.values()} == {1e-5}


class OutputShapes(chainer.LinkHook):
    """Notes the height and width that went into and came out of every link, by id."""

    def __init__(self):
        self.entered = {}
        self.left = {}

    def forward_postprocess(self, args):
        self.entered[id(args.link)] = args.args[0].shape[2:]
        self.left[id(args.link)] = args.out.shape[2:]


def sides(stem, side):
    """What entered res2, and what left res2, res3, res4, res5."""
    model = ResNet50(5, 1, stem, seed=0)
    hook = OutputShapes()
    with chainer.using_config('train', False), chainer.no_backprop_mode(), hook:
        y = model(images(2, side, side + 2))
    assert y.shape == (2, 5) and y.dtype == np.float32
    shapes = [hook.left[id(model.conv1)], hook.entered[id(model.res2[0])]]
    return shapes + [hook.left[id(model[stage][-1])] for stage in N_BLOCKS]


@pytest.mark.parametrize('side', [224, 225, 223, 192, 97, 32, 7, 1])
def test_sizes_with_the_imagenet_stem(side):
    expected = [((side + 1) // 2, (side + 3) // 2)]
    for _ in range(2):  # pooling is one of them; res2 keeps the size
        expected.append(expected[-1])
    expected[1] = expected[2] = tuple((n + 1) // 2 for n in expected[0])
    for _ in range(3):
        expected.append(tuple((n + 1) // 2 for n in expected[-1]))
    assert sides('imagenet', side) == expected
    if side == 224:
        assert [height for height, _ in expected] == [112, 56, 56, 28, 14, 7]


@pytest.mark.parametrize('side', [32, 33, 31, 8, 1])
def test_sizes_with_the_cifar_stem(side):
    expected = [(side, side + 2)] * 3
    for _ in range(3):
        expected.append(tuple((n + 1) // 2 for n in expected[-1]))
    assert sides('cifar', side) == expected
    if side == 32:
        assert [height for height, _ in expected] == [32, 32, 32, 16, 8, 4]


@pytest.mark.parametrize(
    'kwargs, named',
    [
        ({'stem': 'cifar10'}, ["'cifar10'", "'imagenet'", "'cifar'"]),
        ({'stem': None}, ['None', "'imagenet'", "'cifar'"]),
        ({'width': 0}, ['width', '0', 'at least 1']),
        ({'width': -16}, ['width', '-16', 'at least 1']),
        ({'width': 1.5}, ['width', '1.5', 'integer']),
        ({'n_classes': 0}, ['n_classes', '0', 'at least 1']),
        ({'n_classes': '10'}, ['n_classes', "'10'", 'integer']),
    ],
)
def test_unusable_arguments_are_named(kwargs, named):
    with pytest.raises(ValueError) as error:
        ResNet50(**kwargs)
    assert all(word in str(error.value) for word in named)


# --- Initial values ------------------------------------------------------------------------------


def test_gamma_is_0_in_the_last_bn_of_each_block_and_1_elsewhere(full):
    zero = {f'{stage}/{i}/bn3' for stage, n_blocks in N_BLOCKS.items() for i in range(n_blocks)}
    assert len(zero) == 16
    for name, link in links_of(full, L.BatchNormalization).items():
        assert (link.gamma.array == (0 if name in zero else 1)).all(), name
        assert (link.beta.array == 0).all(), name
        assert (link.avg_mean == 0).all() and (link.avg_var == 1).all(), name


def test_each_block_starts_as_its_shortcut():
    model = ResNet50(10, 4, seed=0)
    x = np.abs(images(2, 8, 8)[:, :1]).repeat(16, axis=1) * np.arange(1, 17)[:, None, None]
    x = x.astype(np.float32)
    np.testing.assert_array_equal(model.res2[1](x).array, x)


def assert_normal(values, std, name):
    """Mean, standard deviation and kurtosis within 5 standard errors of N(0, std**2)."""
    n = values.size
    z = values.astype(np.float64).ravel() / std
    assert abs(z.mean()) < 5 / n**0.5, name
    assert abs(z.std() - 1) < 5 / (2 * n) ** 0.5, name
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5, name


def test_convolutions_are_he_normal_by_fan_out(full):
    n_distinguished = 0
    for name, link in links_of(full, L.Convolution2D).items():
        W = link.W.array
        out_channels, in_channels, ksize, _ = W.shape
        assert_normal(W, (2 / (ksize * ksize * out_channels)) ** 0.5, name)
        if in_channels != out_channels:
            by_fan_in = (2 / (ksize * ksize * in_channels)) ** 0.5
            assert abs(W.std() / by_fan_in - 1) > 50 / (2 * W.size) ** 0.5, name
            n_distinguished += 1
    # All but the sixteen 3x3 convolutions and the 1x1 one at the start of res2.
    assert n_distinguished == 53 - 16 - 1


def test_fc_is_normal_with_standard_deviation_1_percent(full):
    assert full.fc.W.shape == (1000, 2048)
    assert_normal(full.fc.W.array, 0.01, 'fc')
    assert (full.fc.b.array == 0).all()


def expected_draws(rng, n_classes, width, ksize):
    """The documented order, written out."""

    def convolution_W(out_channels, in_channels, ksize):
        std = np.sqrt(2 / (ksize * ksize * out_channels))
        return rng.normal(0, std, (out_channels, in_channels, ksize, ksize))

    draws = {'conv1/W': convolution_W(width, 3, ksize)}
    in_channels = width
    for stage, n_blocks in N_BLOCKS.items():
        for i in range(n_blocks):
            draws[f'{stage}/{i}/conv1/W'] = convolution_W(width, in_channels, 1)
            draws[f'{stage}/{i}/conv2/W'] = convolution_W(width, width, 3)
            draws[f'{stage}/{i}/conv3/W'] = convolution_W(4 * width, width, 1)
            if i == 0:
                draws[f'{stage}/{i}/conv4/W'] = convolution_W(4 * width, in_channels, 1)
            in_channels = 4 * width
        width *= 2
    draws['fc/W'] = rng.normal(0, 0.01, (n_classes, in_channels))
    return draws


@pytest.mark.parametrize('stem, ksize', [('imagenet', 7), ('cifar', 3)])
@pytest.mark.parametrize('seed', [0, 12345])
def test_a_seed_gives_the_documented_draws(stem, ksize, seed):
    actual = arrays_of(ResNet50(10, 4, stem, seed), np.float32)
    draws = expected_draws(np.random.RandomState(seed), 10, 4, ksize)
    assert set(draws) == {name for name in actual if name.endswith('/W')}
    for name, values in draws.items():
        np.testing.assert_array_equal(actual[name], values.astype(np.float32), err_msg=name)


def test_a_seed_neither_reads_nor_changes_the_global_state():
    np.random.seed(1)
    before = np.random.get_state()
    a = arrays_of(ResNet50(10, 4, seed=5))
    after = np.random.get_state()
    assert (before[1] == after[1]).all() and before[2:] == after[2:]
    np.random.seed(2)
    b = arrays_of(ResNet50(10, 4, seed=5))
    c = arrays_of(ResNet50(10, 4, seed=6))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        if name.endswith('/W'):
            assert (a[name] != c[name]).mean() > 0.99, name


def test_without_seed_the_global_state_decides():
    np.random.seed(7)
    first = arrays_of(ResNet50(10, 4), np.float32)
    second = arrays_of(ResNet50(10, 4), np.float32)
    for name, values in expected_draws(np.random.RandomState(7), 10, 4, 7).items():
        np.testing.assert_array_equal(first[name], values.astype(np.float32), err_msg=name)
        assert (first[name] != second[name]).mean() > 0.99, name


# --- Forward and backward ------------------------------------------------------------------------


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize(
    'stem, shape', [('imagenet', (6, 64, 64)), ('imagenet', (5, 61, 83)), ('cifar', (4, 17, 22))]
)
@pytest.mark.parametrize('dtype, tolerance', [(np.float32, 1e-4), (np.float64, 1e-11)])
def test_forward_equals_the_definition(stem, shape, train, dtype, tolerance):
    model = randomized(dtype, n_classes=11, width=16, stem=stem)
    x = images(*shape, dtype=dtype)
    oracle = Oracle(arrays_of(model), stem, train)
    expected = oracle(x.astype(np.float64))
    assert expected.std() > 0.3  # else the tolerance would mean little
    with chainer.using_config('train', train):
        actual = model(x)
    assert actual.dtype == dtype
    assert_close(actual.array, expected, tolerance)


def test_forward_equals_the_definition_at_full_width():
    model = randomized()
    x = images(4, 64, 64)
    expected = Oracle(arrays_of(model), 'imagenet', True)(x.astype(np.float64))
    assert_close(model(x).array, expected, 1e-4)


@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
def test_statistics_are_the_last_minibatchs_with_unbiased_variance(stem):
    model = randomized(np.float64, n_classes=4, width=4, stem=stem)
    oracle = Oracle(arrays_of(model), stem, train=True)
    model(images(3, 32, 32, np.float64, seed=8) * 5 + 2)
    last = images(5, 40, 36, np.float64, seed=9)
    model(last)
    oracle(last)
    normalizations = links_of(model, L.BatchNormalization)
    assert len(oracle.statistics) == 53
    for name, (mean, unbiased_var) in oracle.statistics.items():
        assert_close(normalizations[name].avg_mean, mean, 1e-10)
        assert_close(normalizations[name].avg_var, unbiased_var, 1e-10)


def test_test_mode_changes_nothing_and_looks_at_each_image_alone():
    model = randomized(n_classes=4, width=4)
    before = arrays_of(model)
    x = images(3, 32, 32)
    with chainer.using_config('train', False):
        together = model(x).array
        alone = np.concatenate([model(x[i : i + 1]).array for i in range(3)])
    assert_close(alone, together, 1e-5)
    after = arrays_of(model)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
def test_gradient_of_every_parameter_equals_the_oracles_derivative(stem):
    """Along one random direction per array, the others held, in float64, by the complex step.

    Im f(x + ih) / h is the derivative without a difference, so h can be too small to step over
    the kinks of ReLU and pooling; NumPy's maximum of complex numbers goes by the real part.
    """
    model = randomized(np.float64, n_classes=3, width=2, stem=stem)
    x = images(4, 36, 28, np.float64)
    rng = np.random.RandomState(4)
    weight = rng.normal(size=(4, 3))
    model.cleargrads()
    chainer.functions.sum(model(x) * weight).backward()
    gradients = {name.lstrip('/'): param.grad for name, param in model.namedparams()}
    assert len(gradients) == 53 + 2 * 53 + 2

    arrays = arrays_of(model)
    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        moved = {**arrays, name: arrays[name] + 1e-30j * direction}
        expected = (Oracle(moved, stem, train=True)(x) * weight).sum().imag / 1e-30
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert scale > 0.01, name
        assert abs((gradient * direction).sum() - expected) < 1e-9 * scale, name


def test_every_parameter_but_those_behind_gamma_0_learns_from_the_first_update():
    """With gamma 0 the gradient stops at bn3 of a block, whose gamma and beta do get one."""
    model = ResNet50(10, 4, seed=0)
    model.cleargrads()
    chainer.functions.softmax_cross_entropy(model(images(8, 32, 32)), np.arange(8)).backward()
    behind = ('conv1/W', 'bn1/gamma', 'bn1/beta', 'conv2/W', 'bn2/gamma', 'bn2/beta', 'conv3/W')
    for name, param in model.namedparams():
        in_branch = name.startswith('/res') and name.split('/', 3)[3] in behind
        assert (not param.grad.any()) == in_branch, name


# --- Chainer's other machinery -------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path):
    model = randomized(n_classes=4, width=4)
    chainer.serializers.save_npz(tmp_path / 'model.npz', model)
    loaded = ResNet50(4, 4, seed=99)
    chainer.serializers.load_npz(tmp_path / 'model.npz', loaded)
    a, b = arrays_of(model), arrays_of(loaded)
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    x = images(2, 32, 32)
    with chainer.using_config('train', False):
        np.testing.assert_array_equal(model(x).array, loaded(x).array)


def test_a_copy_is_independent():
    model = randomized(n_classes=4, width=4)
    x = images(2, 32, 32)
    twin = copy.deepcopy(model)
    with chainer.using_config('train', False):
        expected = model(x).array
        model.fc.W.array[...] = 0
        model.res2[0].bn1.avg_mean[...] = 100
        np.testing.assert_array_equal(twin(x).array, expected)


@pytest.mark.gpu
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
def test_gpu_equals_cpu(gpu, stem, train):
    model = randomized(n_classes=11, width=16, stem=stem)
    x = images(6, 64, 64)
    expected = Oracle(arrays_of(model), stem, train)(x.astype(np.float64))
    model.to_device(gpu)
    with chainer.using_config('train', train):
        y = model(gpu.send(x))
    chainer.functions.sum(y).backward()
    assert all(p.grad is not None for p in model.params())
    assert_close(cuda.to_cpu(y.array), expected, 1e-3)


# --- Another library -----------------------------------------------------------------------------


def torchvision_name(name):
    """'/res3/0/conv4/W' -> 'layer2.0.downsample.0.weight'."""
    *block, link, array = name.strip('/').split('/')
    if block:
        block[0] = {'res2': 'layer1', 'res3': 'layer2', 'res4': 'layer3', 'res5': 'layer4'}[
            block[0]
        ]
    link = {'conv4': 'downsample.0', 'bn4': 'downsample.1'}.get(link, link)
    array = {
        'W': 'weight',
        'b': 'bias',
        'gamma': 'weight',
        'beta': 'bias',
        'avg_mean': 'running_mean',
        'avg_var': 'running_var',
        'N': 'num_batches_tracked',
    }[array]
    return '.'.join([*block, link, array])


@pytest.mark.slow
@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('side', [128, 97])
def test_equals_torchvision(train, side):
    """Logits and all gradients at full width, in float64: in float32 ReLUs near 0 part company."""
    try:
        import torch
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the latter
        pytest.skip(f'needs torch and torchvision: {error}')
    model = randomized(np.float64)
    theirs = models.resnet50().double()
    arrays = arrays_of(model)
    theirs.load_state_dict({torchvision_name(n): torch.tensor(a) for n, a in arrays.items()})
    theirs.train(train)
    x = images(3, side, side, np.float64)
    weight = np.random.RandomState(4).normal(size=(3, 1000))

    with chainer.using_config('train', train):
        y = model(x)
        model.cleargrads()
        chainer.functions.sum(y * weight).backward()
    expected = theirs(torch.tensor(x))
    (expected * torch.tensor(weight)).sum().backward()
    assert_close(y.array, expected.detach().numpy(), 1e-10)
    gradients = {name: param.grad.numpy() for name, param in theirs.named_parameters()}
    for name, param in model.namedparams():
        assert_close(param.grad, gradients.pop(torchvision_name(name)), 1e-8)
    assert not gradients
