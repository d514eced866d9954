"""The functions in C and in NumPy against Chainer's own in float64, which never go through them."""

import concurrent.futures
import hashlib
import tracemalloc
import warnings
from inspect import signature

import extensions  # noqa: F401  isort: skip  (makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import gradient_check
from chainer.functions.connection import convolution_2d
from chainer.functions.normalization import batch_normalization

from extensions import cpu_functions as functions
from extensions import kernels
from extensions.kernels import numpy_functions
from reproduce.resnet50 import ResNet50

SETS = list(kernels.functions)
COMPILED = pytest.param(
    'compiled', marks=pytest.mark.skipif(not SETS, reason=kernels.description())
)


@pytest.fixture(autouse=True, params=[COMPILED, 'numpy'])
def implementation(request):
    functions.enable(request.param)
    yield request.param
    functions.disable()


def by(*implementations):
    """Makes a test run by these implementations only."""
    return pytest.mark.parametrize('implementation', implementations, indirect=True)


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions that were called."""
    names, call = [], functions._call

    def counted(name, *arguments):
        names.append(name)
        call(name, *arguments)

    monkeypatch.setattr(functions, '_call', counted)
    return names


def by_chainer(function, *arguments, dtype=np.float64):
    """What Chainer's own functions compute, in float64 where the arguments are float32."""
    implementation = functions._implementation
    functions.disable()
    try:
        return function(*(a if a.dtype.kind == 'i' else a.astype(dtype) for a in arguments))
    finally:
        functions.enable(implementation)


def arrays(*shapes, seed=0):
    rng = np.random.RandomState(seed)
    return [np.asarray(rng.randn(*shape), np.float32) for shape in shapes]


def with_gradients(function):
    """Makes a function return its output, and the gradients by its arguments, for one gy."""

    def run(gy, *arguments):
        variables = [chainer.Variable(a) for a in arguments]
        y = function(*variables)
        y.grad = gy.reshape(y.shape)
        y.backward()
        return [y.array, *(v.grad for v in variables if v.grad is not None)]

    return run


def relative_error(actual, expected):
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    return abs(actual - expected).max() / max(abs(expected).max(), 1e-30)


def errors(function, gy, *arguments, implementations=None):
    """The relative errors of each result: of each implementation, and of Chainer in float32."""
    run, results = with_gradients(function), []
    expected = by_chainer(run, gy, *arguments)
    for implementation in implementations or [functions._implementation]:
        functions.enable(implementation)
        results.append(run(gy, *arguments))
    results.append(by_chainer(run, gy, *arguments, dtype=np.float32))
    return np.array([[relative_error(a, e) for a, e in zip(r, expected)] for r in results])


def compare(function, gy, *arguments, tolerance=3e-6):
    found, _ = errors(function, gy, *arguments)
    assert found.max() < tolerance, found


def convolution(**options):
    return lambda *inputs: F.convolution_2d(*inputs, **options)


def pooling(x):
    return F.max_pooling_2d(x, 3, stride=2, pad=1, cover_all=False)


# ---------------------------------------------------------------- ResNet-50

NETWORKS = {'smoke': (16, 'imagenet', 32, 8), 'cifar': (16, 'cifar', 32, 2)}
NETWORKS.update({'64': (64, 'imagenet', 64, 2), '224': (64, 'imagenet', 224, 1)})


@pytest.fixture(scope='module', params=NETWORKS)
def shapes(request):
    """The shapes of the inputs of each function, and the options of convolutions."""
    found = {'convolution': set(), 'bn': set(), 'relu': set(), 'pool': set()}
    width, stem, side, n = NETWORKS[request.param]

    class Recorder(chainer.FunctionHook):
        def forward_preprocess(self, node, inputs):
            shape = (n, *inputs[0].shape[1:])
            if isinstance(node, convolution_2d.Convolution2DFunction):
                found['convolution'].add((shape, inputs[1].shape, node.sy, node.ph))
            elif isinstance(node, batch_normalization.FixedBatchNormalization):
                found['bn'].add(shape)
            elif type(node).__name__ == 'ReLU':
                found['relu'].add(shape)
            elif type(node).__name__ == 'MaxPoolingND':
                found['pool'].add(shape)

    x = np.random.RandomState(0).rand(1, 3, side, side).astype(np.float32)
    with chainer.no_backprop_mode(), chainer.using_config('train', False), Recorder():
        ResNet50(10, width, stem, seed=0)(x)
    return {name: sorted(shapes) for name, shapes in found.items()}


@by('numpy')  # and by the library: Chainer in float64 takes most of the time
def test_every_convolution_of_resnet50(shapes, calls):
    """The worst error over all shapes is below Chainer's: of y, gx and gW.

    NumPy's sums are those of Chainer, by the same BLAS, in another order: either may be the better.
    """
    implementations = [*SETS[:1], 'numpy']
    worst = np.zeros((len(implementations) + 1, 3))
    for x_shape, W_shape, stride, pad in shapes['convolution']:
        side = (x_shape[2] + 2 * pad - W_shape[2]) // stride + 1
        inputs = arrays((x_shape[0], W_shape[0], side, side), x_shape, W_shape)
        function = convolution(stride=stride, pad=pad)
        found = errors(function, *inputs, implementations=implementations)
        assert found[:-1].max() < 5e-6, (x_shape, W_shape, found)
        worst = np.maximum(worst, found)
    of_numpy, chainers = worst[-2:]
    assert (worst[:-2] < np.maximum(chainers, 1e-6)).all(), worst
    assert (of_numpy < np.maximum(1.5 * chainers, 1e-6)).all(), worst
    n = len(shapes['convolution']) * len(implementations)
    assert n >= 22 and calls == n * ['convolution', 'convolution_gx', 'convolution_gw']


def test_every_batch_normalization_of_resnet50(shapes, calls):
    for shape in shapes['bn']:
        gy, x, gamma, beta = arrays(shape, shape, shape[1:2], shape[1:2])
        found = errors(
            lambda *inputs: F.batch_normalization(*inputs, eps=1e-5), gy, 3 * x + 1, gamma, beta
        )
        assert (found[0] < np.maximum(1.5 * found[1], 1e-6)).all(), (shape, found)
    n = len(shapes['bn'])
    assert n >= 8 and calls == n * ['batch_normalization', 'batch_normalization_gradients']


def test_relu_and_max_pooling_of_resnet50(shapes, calls):
    for shape in shapes['relu']:
        compare(F.relu, *arrays(shape, shape), tolerance=1e-12)
    for shape in shapes['pool']:
        gy, x = arrays((*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2), shape)
        compare(pooling, gy, np.maximum(x, 0), tolerance=3e-7)  # of equal values the first counts
    assert {'relu', 'relu_gx'} <= set(calls)


def head(n, channels, side, n_classes):
    t = np.arange(n, dtype=np.int32) % n_classes

    def function(x, W, b):
        return F.softmax_cross_entropy(F.linear(F.average(x, axis=(2, 3)), W, b), t)

    return function, ((n, channels, side, side), (n_classes, channels), (n_classes,))


@pytest.mark.parametrize('n, channels, side, n_classes', [(32, 512, 1, 10), (3, 2048, 7, 1000)])
def test_the_head_of_resnet50(n, channels, side, n_classes, calls):
    function, shapes = head(n, channels, side, n_classes)
    x, W, b = arrays(*shapes)
    found = errors(function, np.array(0.7, np.float32), x, W / 8, b)
    assert (found[0] < np.maximum(found[1], 1e-6)).all(), found
    names = ['sum_pixels', 'convolution', 'add_bias', 'softmax_cross_entropy']
    assert calls[:4] == names and set(calls[4:]) == {
        'softmax_cross_entropy_gx',
        'convolution_gx',
        'convolution_gw',
        'sum_pixels',
        'spread',
    }


def test_losses_of_single_images(calls):
    (x,), t = arrays((50, 7)), np.arange(-1, 49, dtype=np.int32) % 8 - 1

    def losses(x):
        with chainer.no_backprop_mode():
            return F.softmax_cross_entropy(x, t, reduce='no').array

    found, expected = losses(20 * x), by_chainer(losses, 20 * x)
    assert calls == ['softmax_cross_entropy'] and (found[t == -1] == 0).all()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-30)


def test_logits_beyond_the_range_of_exp():
    (x,), t = arrays((4, 5)), np.array([1, 0, 3, 4])
    compare(lambda x: F.softmax_cross_entropy(x, t), np.array(0.7, np.float32), 3000 * x)


def step(model, x, t):
    model.cleargrads()
    loss = F.softmax_cross_entropy(model(x), t)
    loss.backward()
    grads = {name: p.grad for name, p in sorted(model.namedparams())}
    links = sorted(model.namedlinks())
    variances = {name: link.avg_var.copy() for name, link in links if hasattr(link, 'avg_var')}
    return loss.array, grads, variances


@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
def test_the_whole_network(stem, calls):
    """At the start the last gamma of each block is 0, and few ReLUs lie at their edge."""
    model = ResNet50(10, 16, stem, seed=3)
    x = np.random.RandomState(0).randn(4, 3, 64, 64).astype(np.float32)
    t = np.arange(4, dtype=np.int32)
    loss, grads, variances = step(model, x, t)
    functions.disable()
    expected_loss, expected_grads, expected_variances = step(model, x, t)
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    for name, grad in grads.items():
        error = np.linalg.norm(grad - expected_grads[name])
        assert error <= 1e-4 * np.linalg.norm(expected_grads[name]), name
        assert grad.flags.carray, name
    for name, variance in variances.items():
        np.testing.assert_allclose(variance, expected_variances[name], rtol=1e-4, atol=0)
    convolutions = 54  # 53, and the linear layer
    assert calls.count('convolution') == calls.count('convolution_gw') == convolutions
    assert calls.count('batch_normalization_gradients') == 53 and calls.count('relu_gx') == 49


# ---------------------------------------------------------------- the same bits

ODD = [  # channels, output channels, kernel, side, options
    (3, 5, (1, 1), (1, 1), {}),
    (1, 1, (3, 3), (3, 3), {}),
    (17, 33, (3, 3), (5, 4), {'pad': 1}),
    (16, 32, (3, 3), (9, 8), {'pad': 1, 'stride': 2}),
    (15, 31, (2, 3), (7, 10), {'pad': (0, 2), 'stride': (2, 1)}),
    (8, 16, (1, 1), (7, 6), {'stride': 2}),
    (3, 16, (7, 7), (11, 13), {'pad': 3, 'stride': 2}),
    (4, 4, (2, 2), (9, 9), {'stride': 3}),  # some pixels have no gradient
    (2, 7, (5, 5), (3, 2), {'pad': 3, 'stride': 4}),  # larger than the image
    (260, 9, (3, 1), (4, 5), {'pad': (1, 0)}),  # too many channels to read in place
    (5, 40, (1, 1), (19, 17), {'pad': 1}),  # more pixels than a block
    (2, 3, (2, 2), (3, 9), {'pad': 2, 'stride': 9}),  # a stride beyond the image
]


@pytest.mark.parametrize('channels, out, kernel, side, options', ODD)
@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('bias', [False, True])
@by(*SETS, 'numpy')
def test_odd_convolutions(n, bias, channels, out, kernel, side, options, calls):
    inputs = arrays((n, channels, *side), (out, channels, *kernel), (out,))[: 3 if bias else 2]
    (gy,) = arrays(F.convolution_2d(*inputs, **options).shape, seed=1)
    del calls[:]
    actual = with_gradients(convolution(**options))(gy, *inputs)
    expected = by_chainer(with_gradients(convolution(**options)), gy, *inputs)
    for one, other in zip(actual, expected):
        assert relative_error(one, other) < 2e-6
    assert calls.count('convolution_gw') == calls.count('convolution_gx') == 1


def digest(place=lambda array: array):
    """Of the outputs and gradients of all functions, on odd shapes."""
    result = hashlib.sha256()
    for channels, out, kernel, side, options in ODD:
        x, W, b = map(place, arrays((2, channels, *side), (out, channels, *kernel), (out,)))
        gamma, beta = map(place, arrays((out,), (out,), seed=2))

        def function(x, W, b, gamma, beta, options=options):
            h = F.batch_normalization(F.convolution_2d(x, W, b, **options), gamma, beta)
            h = F.max_pooling_2d(F.relu(h), 3, stride=2, pad=1, cover_all=False)
            h = F.linear(F.average(h, axis=(2, 3)), W[:, :, 0, 0].T)
            return F.softmax_cross_entropy(h, np.arange(2) % h.shape[1])

        gy = np.array(0.3, np.float32)
        for array in with_gradients(function)(gy, x, W, b, gamma, beta):
            result.update(array.tobytes())
    return result.hexdigest()


@by(*SETS)
def test_each_instruction_set_gives_the_same_bits():
    own = digest()
    functions.enable('compiled')
    assert own == digest()


@by(COMPILED)
def test_each_instruction_set_gives_a_network_the_same_bits():
    x = np.random.RandomState(0).randn(2, 3, 32, 32).astype(np.float32)
    t = np.array([3, 7], np.int32)
    digests = set()
    for instruction_set in SETS:
        functions.enable(instruction_set)
        loss, grads, variances = step(ResNet50(10, 8, seed=3), x, t)
        parts = loss, *grads.values(), *variances.values()
        digests.add(hashlib.sha256(b''.join(part.tobytes() for part in parts)).hexdigest())
    assert len(digests) == 1


def at_offset(offset):
    def place(array):
        raw = np.zeros(array.nbytes + 128, np.uint8)
        start = (offset - raw.ctypes.data) % 64
        copy = raw[start : start + array.nbytes].view(np.float32).reshape(array.shape)
        copy[...] = array
        return copy

    return place


@pytest.mark.parametrize(
    'place',
    [
        at_offset(4),
        at_offset(36),
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: np.frombuffer(b'0' + a.tobytes(), np.float32, offset=1).reshape(a.shape),
    ],
    ids=['offset 4', 'offset 36', 'Fortran', 'strided', 'reversed', 'unaligned, read-only'],
)
def test_any_memory_gives_the_same_bits(place):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert digest(place=place) == digest()


def test_threads_share_nothing():
    x, W = arrays((4, 64, 14, 14), (64, 64, 3, 3))

    def convolve(_):
        out = np.empty((4, 14, 14, 64), np.float32)
        geometry = 4, 14, 14, 64, 64, 3, 3, 1, 1, 1, 1
        functions._call('convolution', geometry, functions._channels_last(x), W, out)
        return out.tobytes()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(convolve, range(40)))) == 1


# ---------------------------------------------------------------- exp and log


def ulps(actual, exact):
    """The error in units of the float32 that is nearest to the exact value."""
    nearest = np.abs(exact).astype(np.float32)
    with np.errstate(over='ignore', invalid='ignore'):
        return np.abs(actual - exact) / np.spacing(nearest).astype(np.float64)


def by_c(name, x):
    y = np.empty_like(x)
    getattr(kernels._open(), name)(
        *(
            kernels.ctypes.c_int64(x.size),
            *map(kernels.ctypes.c_void_p, map(kernels.address, (x, y))),
        )
    )
    return y


@by(COMPILED)
def test_exp_is_rounded_once():
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.uniform(-105, 89, 1_000_000), rng.standard_normal(1_000_000) * 1e-3])
    x = np.concatenate([x, 2.0 ** np.arange(-149, 7), -(2.0 ** np.arange(-149, 7))])
    x = x.astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    finite = exact < 3.4e38
    assert ulps(by_c('exp_float32', x), exact)[finite].max() < 0.5001
    special = np.array([np.inf, -np.inf, 0, -0.0, 3e38, -3e38, 88.73, -104], np.float32)
    expected = np.array([np.inf, 0, 1, 1, np.inf, 0, np.inf, 0], np.float32)
    np.testing.assert_array_equal(by_c('exp_float32', special), expected)
    assert np.isnan(by_c('exp_float32', np.array([np.nan], np.float32)))


@by(COMPILED)
def test_log_is_rounded_once():
    rng = np.random.RandomState(0)
    any_positive = rng.randint(1, 0x7F800000, 2_000_000, dtype=np.int64).astype(np.uint32)
    near_1 = (1 + rng.standard_normal(1_000_000) * 1e-3).astype(np.float32)
    x = np.concatenate([any_positive.view(np.float32), near_1, 2 ** np.arange(-149, 128.0)])
    x = np.concatenate([x, np.sqrt(2 ** np.arange(-149, 128.0))]).astype(np.float32)
    exact = np.log(x.astype(np.float64))
    assert ulps(by_c('log_float32', x), exact)[x != 1].max() < 0.5001
    special = np.array([np.inf, 0, 1, -1, -np.inf, np.nan], np.float32)
    expected = [np.inf, -np.inf, 0, np.nan, np.nan, np.nan]
    np.testing.assert_array_equal(by_c('log_float32', special), expected)


# ---------------------------------------------------------------- gradients by differences


@pytest.mark.parametrize(
    'function, shapes',
    [
        (convolution(stride=2, pad=1), [(2, 3, 4, 5), (4, 3, 3, 3), (4,)]),
        (F.batch_normalization, [(3, 4, 2, 3), (4,), (4,)]),
        (F.linear, [(3, 4), (5, 4), (5,)]),
        (pooling, [(2, 3, 5, 4)]),
        (F.relu, [(2, 3, 5, 4)]),
        (lambda x: F.average(x, axis=(2, 3)), [(2, 3, 5, 4)]),
        (lambda x: F.softmax_cross_entropy(x, np.array([1, 0, 3, -1])), [(4, 5)]),
        (head(2, 5, 3, 4)[0], head(2, 5, 3, 4)[1]),
    ],
)
def test_gradients_by_differences(function, shapes, calls):
    inputs = arrays(*shapes)
    (gy,) = arrays(function(*inputs).shape, seed=1)
    y, *gradients = with_gradients(function)(gy, *inputs)
    assert len(calls) > 1
    wide = [a.astype(np.float64) for a in inputs]
    with chainer.using_config('dtype', np.float64):
        np.testing.assert_allclose(y, function(*wide).array, rtol=2e-6, atol=2e-6)
        expected = gradient_check.numerical_grad(
            lambda: (function(*wide).array,), wide, (gy.astype(np.float64),), eps=1e-5
        )
    for one, other in zip(gradients, expected):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


# ---------------------------------------------------------------- batch normalization


def statistics(decay, x):
    """Mean and variance after a forward pass of x, as views of one array with a neighbour each."""
    size = x.shape[1]
    buffer = np.full(2 * size + 3, 7, x.dtype)
    mean, var = buffer[1 : 1 + size], buffer[2 + size : -1]
    gamma, beta = np.ones(size, x.dtype), np.zeros(size, x.dtype)
    F.batch_normalization(x, gamma, beta, running_mean=mean, running_var=var, decay=decay)
    return buffer


@pytest.mark.parametrize('decay', [0, 0.9])
def test_statistics_are_chainers_and_written_through_their_views(decay, calls):
    x = arrays((2, 3, 2, 3))[0] * 2 + 1
    buffer = statistics(decay, x)
    assert calls == ['batch_normalization']
    np.testing.assert_allclose(buffer, by_chainer(lambda x: statistics(decay, x), x), rtol=1e-6)
    m = 2 * 2 * 3
    new = np.var(x.astype(np.float64), axis=(0, 2, 3)) * m / (m - 1)  # unbiased
    np.testing.assert_allclose(buffer[5:8], decay * 7 + (1 - decay) * new, rtol=1e-6)
    assert (buffer[[0, 4, 8]] == 7).all()


@pytest.mark.parametrize('offset', [0, 100, -3000])
def test_a_mean_far_from_0_and_pixels_far_from_the_mean(offset):
    """The first and last pixels are outliers, as where zeros surround an image."""
    x = arrays((4, 20, 9, 9))[0] + np.float32(offset)
    x[0, :, 0, 0] = x[-1, :, -1, -1] = 0
    buffer, expected = statistics(0, x), by_chainer(lambda x: statistics(0, x), x)
    np.testing.assert_allclose(buffer, expected, rtol=5e-7, atol=2e-7)  # of a deviation of 1


def test_gradients_where_the_mean_is_far_from_0():
    gy, x, gamma, beta = arrays((4, 20, 9, 9), (4, 20, 9, 9), (20,), (20,))
    compare(F.batch_normalization, gy + x + 5, x + 1000, gamma, beta)


def test_statistics_that_are_not_contiguous_are_chainers(calls):
    x, buffer = arrays((4, 3, 5, 5))[0], np.zeros((2, 6), np.float32)
    mean, var = buffer[:, ::2]
    one = np.ones(3, np.float32)
    F.batch_normalization(x, one, one, running_mean=mean, running_var=var, decay=0)
    assert calls == []
    np.testing.assert_allclose(buffer[0, ::2], x.mean((0, 2, 3)), rtol=0, atol=1e-6)
    assert (buffer[:, 1::2] == 0).all() and (var > 0.5).all()


def test_one_value_per_channel_is_chainers(calls):
    gy, x, gamma, beta = arrays((1, 5, 1, 1), (1, 5, 1, 1), (5,), (5,))
    with pytest.warns(UserWarning, match='no more than one sample'):
        y, *_ = with_gradients(F.batch_normalization)(gy, x, gamma, beta)
    assert calls == []
    np.testing.assert_array_equal(y[0, :, 0, 0], beta)


def test_links_in_training_and_in_validation(calls):
    link = L.BatchNormalization(4, decay=0, eps=1e-5)
    x = arrays((3, 4, 5, 5))[0] * 2 + 1
    link(x)
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        y = link(x).array
    assert calls == ['batch_normalization', 'fixed_batch_normalization']
    mean, var = (f(x.astype(np.float64), axis=(0, 2, 3)) for f in (np.mean, np.var))
    expected = (x - mean[:, None, None]) / np.sqrt(var * 75 / 74 + 1e-5)[:, None, None]
    assert relative_error(y, expected) < 1e-6


# ---------------------------------------------------------------- what stays Chainer's


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_other_types_are_chainers(dtype, calls):
    gy, x, W, gamma, beta = (
        a.astype(dtype) for a in arrays((2, 5, 4, 4), (2, 4, 4, 4), (5, 4, 3, 3), (5,), (5,))
    )

    def function(x, W, gamma, beta):
        return F.relu(F.batch_normalization(F.convolution_2d(x, W, pad=1), gamma, beta))

    for actual in (with_gradients(function)(gy, x, W, gamma, beta), [pooling(x).array]):
        assert all(array.dtype == dtype for array in actual)
    assert calls == []


@pytest.mark.parametrize(
    'function, shape',
    [
        (lambda x: F.max_pooling_2d(x, 3, stride=2), (2, 3, 8, 8)),  # cover_all
        (lambda x: F.max_pooling_nd(x, 2, cover_all=False), (2, 3, 4, 4, 4)),
        (lambda x: F.max_pooling_2d(x, 2, cover_all=False, return_indices=True)[0], (2, 3, 8, 8)),
        (lambda x: F.convolution_2d(x, x[:, :, :2, :2], stride=2, cover_all=True), (3, 3, 7, 7)),
        (lambda x: F.convolution_2d(x, x[:, :, :2, :2], dilate=2), (3, 3, 7, 7)),
        (lambda x: F.convolution_2d(x, x[:, :1, :2, :2], groups=3), (3, 3, 7, 7)),
        (lambda x: F.batch_normalization(x, x[0, 0], x[0, 0], axis=(0, 1)), (4, 3, 2, 5)),
        (lambda x: F.batch_normalization(x, *2 * [x[:, 0, 0, 0]], axis=(1, 2, 3)), (4, 4, 2, 5)),
        (lambda x: F.batch_normalization(x, x[0], x[0]), (4, 3)),
        (lambda x: F.average(x, axis=(1, 2)), (4, 3, 2, 5)),
        (lambda x: F.average(x, axis=(2, 3), keepdims=True), (4, 3, 2, 5)),
        (lambda x: F.softmax_cross_entropy(x, np.array([1, 2]), reduce='no'), (2, 3)),  # backward
    ],
)
def test_what_is_computed_otherwise_is_chainers(function, shape, calls):
    (x,) = arrays(shape)
    (gy,) = arrays(function(x).shape, seed=1)
    run = with_gradients(function)
    for actual, expected in zip(run(gy, x), by_chainer(run, gy, x)):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert calls == []


def test_what_does_not_fit_together_is_chainers_to_report(calls):
    """Without Chainer's check of types, so that the arrays reach the functions."""
    x, W, b, vector = arrays((2, 4, 4, 4), (5, 3, 3, 3), (5,), (3,))
    with chainer.using_config('type_check', False):
        for function in (
            lambda: F.convolution_2d(x, W),
            lambda: F.convolution_2d(x, W[:, :1].repeat(4, 1), vector),
            lambda: F.linear(x[:, :, 0, 0], W[0, 0]),
            lambda: F.batch_normalization(x, vector, vector),
            lambda: F.batch_normalization(x, b[:4], b[:4], running_mean=b[:4].copy()),
            lambda: F.softmax_cross_entropy(x[:, :, 0, 0], np.zeros(3, np.int32)),
        ):
            with pytest.raises((ValueError, TypeError, IndexError, AttributeError)):
                function()
    assert calls == []


def test_arrays_in_a_layout_of_cudnn_are_chainers(calls):
    x, W = map(chainer.as_variable, arrays((4, 4, 4, 4), (4, 4, 4, 4)))
    x = x.as_layout(chainer.memory_layouts.CUDNN_CHANNEL_LAST_X)
    W = W.as_layout(chainer.memory_layouts.CUDNN_CHANNEL_LAST_W)
    with pytest.raises(RuntimeError, match='Non-standard memory layouts'):
        F.convolution_2d(x, W)
    assert calls == []


def test_wrong_labels_are_reported():
    with pytest.raises(IndexError):
        F.softmax_cross_entropy(arrays((2, 3))[0], np.array([0, 3], np.int32))


def test_a_batch_normalization_with_its_own_implementation_keeps_it(calls):
    """As ChainerMN's, over all processes."""
    chosen = []

    def selector(node, inputs):
        chosen.append(1)
        return batch_normalization.GeneralBatchNormalizationImpl()

    x, gamma, beta = arrays((2, 3, 4, 4), (3,), (3,))
    batch_normalization.BatchNormalization(impl_selector=selector).apply((x, gamma, beta))
    assert chosen == [1] and calls == []


@pytest.mark.parametrize(
    'function, shapes',
    [
        (convolution(stride=2, pad=1), [(2, 4, 5, 5), (6, 4, 3, 3)]),
        (F.batch_normalization, [(3, 4, 3, 3), (4,), (4,)]),
        (lambda x: F.relu(x) * x, [(3, 4, 5, 5)]),
        (lambda x: pooling(x) ** 2, [(3, 4, 6, 6)]),
        (lambda x: F.average(x, axis=(2, 3)) ** 2, [(3, 4, 6, 6)]),
        (F.linear, [(3, 4), (5, 4)]),
    ],
)
def test_double_backpropagation_is_chainers(function, shapes, calls):
    """The gradients of the sum of the squared gradients."""
    inputs = arrays(*shapes)
    (gy,) = arrays(function(*inputs).shape, seed=1)

    def run(gy, *arguments):
        variables = [chainer.Variable(a) for a in arguments]
        gy = chainer.Variable(gy)
        y = function(*variables)
        first = chainer.grad([y], variables, [gy], enable_double_backprop=True)
        total = sum(F.sum(g**2) for g in first if g is not None)
        second = chainer.grad([total], [gy, *variables])
        return [g.array for g in (*first, *second) if g is not None]

    actual, expected = run(gy, *inputs), by_chainer(run, gy, *inputs)
    assert len(actual) == len(expected) >= len(inputs) + 1
    for one, other in zip(actual, expected):
        assert abs(one - other).max() < 2e-5 * abs(other).max()
    assert calls


# ---------------------------------------------------------------- arrays


def test_outputs_are_chainers_shapes_in_channels_last_order():
    x, W = arrays((3, 4, 6, 7), (5, 4, 3, 3))
    y = F.convolution_2d(x, W, pad=1).array
    assert y.shape == (3, 5, 6, 7) and y.transpose(0, 2, 3, 1).flags.carray
    for function in (F.relu, lambda h: F.relu(h + y), pooling):
        assert function(y).array.transpose(0, 2, 3, 1).flags.carray
    np.testing.assert_array_equal(F.sum(F.relu(y), axis=1).array, np.maximum(y, 0).sum(1))


def test_inputs_are_not_written():
    inputs = arrays((3, 4, 6, 6), (5, 4, 3, 3), (5,), (5,))
    before = [a.copy() for a in inputs]
    function = with_gradients(
        lambda x, W, g, b: pooling(F.relu(F.batch_normalization(F.convolution_2d(x, W), g, b)))
    )
    function(arrays((3, 5, 2, 2))[0], *inputs)
    for array, copy in zip(inputs, before):
        np.testing.assert_array_equal(array, copy)


@by('numpy')
def test_numpys_convolutions_copy_the_windows_of_some_images():
    """Those of all images are nine times as large as x."""
    gy, x, W = arrays((64, 16, 16, 16), (64, 16, 16, 16), (16, 16, 3, 3))
    tracemalloc.start()
    try:
        with_gradients(convolution(pad=1))(gy, x, W)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 7 * x.nbytes  # with y, gx, and gy and x once more, with the channels last


def test_no_images():
    x, W = np.zeros((0, 4, 5, 5), np.float32), arrays((6, 4, 3, 3))[0]
    assert F.relu(F.convolution_2d(x, W, pad=1)).shape == (0, 6, 5, 5)


@by(*SETS, 'numpy')
@pytest.mark.parametrize('channels', [1, 19])  # single values, and vectors
def test_nan_is_not_hidden(channels):
    x = np.empty((1, channels, 2, 2), np.float32)
    x[...] = [[np.nan, -1], [2, np.inf]]
    y = F.relu(x).array
    assert np.isnan(y[:, :, 0, 0]).all() and (y[:, :, 1, 1] == np.inf).all()
    for flipped in x, x[:, :, ::-1, ::-1]:
        assert np.isnan(F.max_pooling_2d(flipped, 2, cover_all=False).array).all()
    one = np.ones(channels, np.float32)
    assert np.isnan(F.batch_normalization(x, one, one).array).all()
    assert np.isnan(F.average(x, axis=(2, 3)).array).all()
    assert np.isnan(F.softmax_cross_entropy(x[0, :, 0], np.zeros(channels, int)).array)


# ---------------------------------------------------------------- on and off


def test_on_and_off(implementation):
    cls = convolution_2d.Convolution2DFunction
    functions.enable(implementation)
    forward = cls.forward
    functions.enable(implementation)
    assert hasattr(cls.backward, '__wrapped__')
    assert cls.forward is forward  # not replaced twice
    described = {'compiled': f'compiled C, {[*SETS, ""][0]}', 'numpy': 'NumPy, channels last'}
    assert functions.description() == f'{described[implementation]}, float32'
    functions.disable()
    assert 'forward' not in vars(cls) and cls.forward is chainer.FunctionNode.forward
    assert not hasattr(cls.backward, '__wrapped__')
    with pytest.raises(ValueError, match="'sse' is none of compiled, .*numpy"):
        functions.enable('sse')


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(kernels, 'functions', {})
    with pytest.raises(functions.NotCompiledError):
        functions.enable()
    functions.enable('numpy')


def test_numpys_functions_have_the_arguments_of_cs():
    found = {name: len(signature(f).parameters) for name, f in numpy_functions.FUNCTIONS.items()}
    assert found == {name: len(types) for name, types in kernels._arguments().items()}
