"""Torch's functions against Chainer's own in float64, which never go through Torch."""

import gc
import subprocess
import sys
import types
import warnings
import weakref

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import gradient_check
from chainer.functions.connection import convolution_2d
from chainer.functions.normalization import batch_normalization

from reproduce.resnet50 import ResNet50

torch = pytest.importorskip('torch')
functions = pytest.importorskip('extensions.torch_functions')

# Of the largest element, in float32. An output and the gradient by x are sums of at most 4,608
# products (3 x 3 x 512); seen: 2e-6. A gradient by a parameter is the sum of up to 25,088
# (2 x 112 x 112), which oneDNN adds one after the other: half a unit, 6e-8, times the root of their
# number is 1e-5; seen: 6e-6. With TF32 or float16 the errors are above 1e-4.
TOLERANCE, OF_PARAMETERS = 3e-6, 1e-5


@pytest.fixture(autouse=True)
def enabled():
    functions.enable()
    yield
    functions.disable()


@pytest.fixture
def calls(monkeypatch):
    """The names of Torch's operators that were called."""
    names, aten = [], functions._aten

    class Counted:
        def __getattr__(self, name):
            names.append(name)
            return getattr(aten, name)

    monkeypatch.setattr(functions, '_aten', Counted())
    return names


def by_chainer(function, *arguments):
    """What Chainer's own functions compute, in float64 where the arguments are float32."""
    functions.disable()
    try:
        return function(*(a if a is None else a.astype(np.float64) for a in arguments))
    finally:
        functions.enable()


def assert_close(actual, expected, what='', tolerance=TOLERANCE):
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    assert actual.flags.c_contiguous and actual.flags.writeable
    error = abs(actual - expected).max() / abs(expected).max()
    assert error < tolerance, f'{what}: {error:.2g}'


def arrays(*shapes, seed=0):
    rng = np.random.RandomState(seed)
    return [rng.randn(*shape).astype(np.float32) for shape in shapes]


def with_gradients(function):
    """Makes a function return its output, and the gradients by its arguments, for one gy."""

    def run(gy, *arguments):
        variables = [chainer.Variable(a) for a in arguments]
        y = function(*variables)
        y.grad = gy.reshape(y.shape)
        y.backward()
        return [y.array, *(v.grad for v in variables)]

    return run


def compare(function, gy, *arguments, what=''):
    run = with_gradients(function)
    results = zip(run(gy, *arguments), by_chainer(run, gy, *arguments))
    for i, (actual, expected) in enumerate(results):
        assert_close(actual, expected, what, TOLERANCE if i < 2 else OF_PARAMETERS)


def convolution(**options):
    return lambda *inputs: F.convolution_2d(*inputs, **options)


@pytest.fixture(scope='module')
def shapes_of_resnet50():
    """The shapes of the inputs of each function, and the options of convolutions."""
    found = {'convolution': set(), 'bn': set(), 'relu': set(), 'pool': set()}

    class Recorder(chainer.FunctionHook):
        def forward_preprocess(self, node, inputs):
            shape = (2, *inputs[0].shape[1:])
            if isinstance(node, convolution_2d.Convolution2DFunction):
                found['convolution'].add((shape, inputs[1].shape, node.sy, node.ph))
            elif isinstance(node, batch_normalization.BatchNormalization):
                found['bn'].add(shape)
            elif type(node).__name__ == 'ReLU':
                found['relu'].add(shape)
            elif type(node).__name__ == 'MaxPoolingND':
                found['pool'].add(shape)

    with chainer.no_backprop_mode(), Recorder():
        ResNet50(seed=0)(np.random.RandomState(0).rand(1, 3, 224, 224).astype(np.float32))
    return {name: sorted(shapes) for name, shapes in found.items()}


# ---------------------------------------------------------------- ResNet-50


def test_every_convolution_of_resnet50(shapes_of_resnet50, calls):
    shapes = shapes_of_resnet50['convolution']
    assert len(shapes) == 23
    assert {(W[2], stride) for _, W, stride, _ in shapes} == {
        (7, 2),
        (1, 1),
        (3, 1),
        (3, 2),
        (1, 2),
    }
    for x_shape, W_shape, stride, pad in shapes:
        side = (x_shape[2] + 2 * pad - W_shape[2]) // stride + 1
        gy, x, W = arrays((2, W_shape[0], side, side), x_shape, W_shape)
        compare(convolution(stride=stride, pad=pad), gy, x, W, what=(x_shape, W_shape, stride))
    assert calls == 23 * ['convolution', 'convolution_backward', 'convolution_backward']


def test_every_batch_normalization_of_resnet50(shapes_of_resnet50, calls):
    shapes = shapes_of_resnet50['bn']
    assert len(shapes) == 12
    for shape in shapes:
        gy, x, gamma, beta = arrays(shape, shape, shape[1:2], shape[1:2])
        compare(
            lambda *inputs: F.batch_normalization(*inputs, eps=1e-5),
            gy,
            3 * x + 1,
            gamma,
            beta,
            what=shape,
        )
    assert calls == 12 * ['_batch_norm_impl_index', '_batch_norm_impl_index_backward']


def test_relu_and_max_pooling_of_resnet50(shapes_of_resnet50, calls):
    for shape in shapes_of_resnet50['relu']:
        gy, x = arrays(shape, shape)
        compare(F.relu, gy, x, what=shape)
    ((shape,),) = [shapes_of_resnet50['pool']]
    gy, x = arrays((2, 64, 56, 56), shape)
    compare(pooling, gy, np.maximum(x, 0), what=shape)  # many zeros: the first of them counts
    assert set(calls) == {
        'relu',
        'threshold_backward',
        'max_pool2d_with_indices',
        'max_pool2d_with_indices_backward',
    }


def pooling(x):
    return F.max_pooling_2d(x, 3, stride=2, pad=1, cover_all=False)


def test_the_whole_network(calls):
    """At the start the last gamma of each block is 0, and few ReLUs lie at their edge."""
    model = ResNet50(10, 16, seed=3)
    x = np.random.RandomState(0).randn(4, 3, 64, 64).astype(np.float32)
    t = np.arange(4, dtype=np.int32)

    def run(x):
        model.cleargrads()
        loss = F.softmax_cross_entropy(model(x), t)
        loss.backward()
        grads = {name: p.grad for name, p in model.namedparams()}
        return (
            loss.array,
            grads,
            {
                name: link.avg_var.copy()
                for name, link in model.namedlinks()
                if hasattr(link, 'avg_var')
            },
        )

    loss, grads, variances = run(x)
    assert calls.count('convolution') == calls.count('_batch_norm_impl_index') == 53
    functions.disable()
    expected_loss, expected_grads, expected_variances = run(x)
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    for name, grad in grads.items():
        error = np.linalg.norm(grad - expected_grads[name])
        assert error <= 1e-4 * np.linalg.norm(expected_grads[name]), name
    for name, variance in variances.items():
        np.testing.assert_allclose(variance, expected_variances[name], rtol=1e-4, atol=0)


def test_a_training_of_a_few_iterations(calls):
    """From equal parameters the losses agree to rounding, which the training enlarges."""
    rng = np.random.RandomState(0)
    x = rng.randn(5, 8, 3, 64, 64).astype(np.float32)
    t = rng.randint(0, 10, (5, 8)).astype(np.int32)

    def train():
        model = ResNet50(10, 8, seed=1)
        optimizer = extensions.RMSpropWarmup(0.01).setup(model)
        losses = []
        for images, labels in zip(x, t):
            model.cleargrads()
            loss = F.softmax_cross_entropy(model(images), labels)
            loss.backward()
            optimizer.update()
            losses.append(float(loss.array))
        return losses

    losses = train()
    assert calls.count('convolution') == 5 * 53
    functions.disable()
    expected = train()
    errors = abs(np.array(losses) / expected - 1)
    assert errors[0] < 1e-6 and errors.max() < 1e-5, errors
    assert max(expected) - min(expected) > 0.05


# ---------------------------------------------------------------- convolution


@pytest.mark.parametrize(
    'options, W_shape, side',
    [
        ({'stride': (2, 1), 'pad': (0, 2)}, (5, 4, 3, 2), (10, 7)),
        ({'dilate': (2, 1), 'pad': 2}, (5, 4, 3, 3), (9, 10)),
        ({'groups': 2, 'pad': 1}, (6, 2, 3, 3), (8, 9)),
        ({'groups': 4, 'stride': 2, 'dilate': 2}, (8, 1, 2, 3), (9, 9)),
        ({'stride': 3}, (5, 4, 2, 2), (9, 9)),  # some pixels have no gradient
        ({'pad': 3}, (5, 4, 7, 7), (3, 3)),  # larger than the image
    ],
)
@pytest.mark.parametrize('bias', [False, True])
def test_convolution_with_options(options, W_shape, side, bias, calls):
    x, W, b = arrays((3, 4, *side), W_shape, W_shape[:1])
    inputs = (x, W, b) if bias else (x, W)
    (gy,) = arrays(F.convolution_2d(*inputs, **options).shape, seed=1)
    compare(convolution(**options), gy, *inputs)
    assert calls.count('convolution') == 2 and calls.count('convolution_backward') == 2


@pytest.mark.parametrize('outsize', [None, (10, 11)])
@pytest.mark.parametrize('groups', [1, 2])
def test_deconvolution(outsize, groups, calls):
    x, W, b = arrays((2, 4, 4, 5), (4, 3, 3, 2), (3 * groups,))

    def function(*inputs):
        return F.deconvolution_2d(*inputs, stride=2, pad=0, outsize=outsize, groups=groups)

    (gy,) = arrays(function(x, W, b).shape, seed=1)
    compare(function, gy, x, W, b)
    assert calls.count('convolution_backward') == 3 and calls.count('convolution') == 1


# ---------------------------------------------------------------- batch normalization


def statistics(decay, x, views=True):
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
    assert calls == ['_batch_norm_impl_index']
    np.testing.assert_allclose(buffer, by_chainer(lambda x: statistics(decay, x), x), rtol=1e-6)
    m = 2 * 2 * 3
    new = np.var(x.astype(np.float64), axis=(0, 2, 3)) * m / (m - 1)  # unbiased
    np.testing.assert_allclose(buffer[5:8], decay * 7 + (1 - decay) * new, rtol=1e-6)
    assert (buffer[[0, 4, 8]] == 7).all()


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
    with pytest.warns(UserWarning, match='no more than one sample'):
        buffer = statistics(0, x)
    assert calls == []
    np.testing.assert_array_equal(y[0, :, 0, 0], beta)
    assert (buffer[7:-1] == 0).all()


def test_fixed_batch_normalization(calls):
    x, gamma, beta, mean, var = arrays((3, 6, 5, 4), *4 * [(6,)])

    def function(*inputs):
        with chainer.no_backprop_mode():
            return F.fixed_batch_normalization(*inputs, eps=1e-3).array

    inputs = x, gamma, beta, mean, abs(var)
    for array in inputs:
        array.flags.writeable = False
    assert_close(function(*inputs), by_chainer(function, *inputs))
    assert calls == ['_batch_norm_impl_index']
    compare(lambda *inputs: F.fixed_batch_normalization(*inputs, eps=1e-3), x, *inputs)
    assert len(calls) == 1


def test_links_in_training_and_in_validation(calls):
    link = L.BatchNormalization(4, decay=0, eps=1e-5)
    x = arrays((3, 4, 5, 5))[0] * 2 + 1
    link(x)
    with chainer.using_config('train', False), chainer.no_backprop_mode():
        y = link(x).array
    assert calls == 2 * ['_batch_norm_impl_index']
    mean, var = (f(x.astype(np.float64), axis=(0, 2, 3)) for f in (np.mean, np.var))
    expected = (x - mean[:, None, None]) / np.sqrt(var * 75 / 74 + 1e-5)[:, None, None]
    assert_close(y, expected)


# ---------------------------------------------------------------- what stays Chainer's


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_other_types_are_chainers(dtype, calls):
    gy, x, W, gamma, beta = (
        a.astype(dtype) for a in arrays((2, 5, 4, 4), (2, 4, 4, 4), (5, 4, 3, 3), (5,), (5,))
    )

    def function(x, W, gamma, beta):
        return F.relu(F.batch_normalization(F.convolution_2d(x, W, pad=1), gamma, beta))

    run = with_gradients(function)
    for actual in (run(gy, x, W, gamma, beta), [pooling(x).array]):
        assert all(array.dtype == dtype for array in actual)
    assert calls == []


@pytest.mark.parametrize(
    'function, shape',
    [
        (lambda x: F.max_pooling_2d(x, 3, stride=2), (2, 3, 8, 8)),  # cover_all
        (lambda x: F.max_pooling_2d(x, 2, pad=(0, 2), cover_all=False), (2, 3, 8, 8)),
        (lambda x: F.max_pooling_nd(x, 2, cover_all=False), (2, 3, 4, 4, 4)),
        (lambda x: F.max_pooling_2d(x, 2, cover_all=False, return_indices=True)[0], (2, 3, 8, 8)),
        (lambda x: F.convolution_2d(x, x[:, :, :2, :2], stride=2, cover_all=True), (3, 3, 7, 7)),
        (lambda x: F.batch_normalization(x, x[0, 0], x[0, 0], axis=(0, 1)), (4, 3, 2, 5)),
        (lambda x: F.batch_normalization(x, *2 * [x[:, 0, 0, 0]], axis=(1, 2, 3)), (4, 4, 2, 5)),
        (lambda x: F.batch_normalization(x, x[0], x[0]), (4, 3)),
    ],
)
def test_what_torch_computes_otherwise_is_chainers(function, shape, calls):
    (x,) = arrays(shape)
    (gy,) = arrays(function(x).shape, seed=1)
    run = with_gradients(function)
    for actual, expected in zip(run(gy, x), by_chainer(run, gy, x)):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert calls == []


def test_weights_of_another_type_are_chainers(calls):
    gy, x, W = arrays((2, 5, 4, 4), (2, 4, 4, 4), (5, 4, 3, 3))
    y, gx, gW = with_gradients(convolution(pad=1))(gy, x, W.astype(np.float16))
    assert (y.dtype, gx.dtype, gW.dtype) == (np.float32, np.float32, np.float16)
    assert calls == []


def test_layouts_of_cudnn_are_chainers(calls):
    x, W = map(chainer.as_variable, arrays((4, 4, 4, 4), (4, 4, 4, 4)))
    x = x.as_layout(chainer.memory_layouts.CUDNN_CHANNEL_LAST_X)
    W = W.as_layout(chainer.memory_layouts.CUDNN_CHANNEL_LAST_W)
    with pytest.raises(RuntimeError, match='Non-standard memory layouts'):
        F.convolution_2d(x, W)
    assert calls == []


def test_no_images(calls):
    gy, x, W = arrays((0, 6, 5, 5), (0, 4, 5, 5), (6, 4, 3, 3))
    y, gx, gW = with_gradients(lambda x, W: F.relu(F.convolution_2d(x, W, pad=1)))(gy, x, W)
    assert (y.shape, gx.shape) == (gy.shape, x.shape) and calls
    np.testing.assert_array_equal(gW, np.zeros_like(W))


def test_a_batch_normalization_with_its_own_implementation_keeps_it(calls):
    """As ChainerMN's, over all processes."""
    chosen = []

    def selector(node, inputs):
        chosen.append(1)
        return batch_normalization.GeneralBatchNormalizationImpl()

    x, gamma, beta = arrays((2, 3, 4, 4), (3,), (3,))
    batch_normalization.BatchNormalization(impl_selector=selector).apply((x, gamma, beta))
    assert chosen == [1] and calls == []


# ---------------------------------------------------------------- double backpropagation


@pytest.mark.parametrize(
    'function, shapes',
    [
        (lambda x, W: F.convolution_2d(x, W, stride=2, pad=1), [(2, 4, 5, 5), (6, 4, 3, 3)]),
        # The last row and column of x have no gradient: cover_all, where it is differentiated.
        (lambda x, W: F.convolution_2d(x, W, stride=2), [(2, 4, 6, 6), (6, 4, 3, 3)]),
        (lambda x, W: F.convolution_2d(x, W, groups=2, dilate=2), [(2, 4, 6, 6), (6, 2, 3, 3)]),
        (lambda x, W: F.deconvolution_2d(x, W, stride=2), [(2, 4, 3, 3), (4, 3, 3, 3)]),
        (lambda x, g, b: F.batch_normalization(x, g, b), [(3, 4, 3, 3), (4,), (4,)]),
        (lambda x: F.relu(x) * x, [(3, 4, 5, 5)]),
        (lambda x: pooling(x) ** 2, [(3, 4, 6, 6)]),
    ],
)
def test_double_backpropagation(function, shapes, calls):
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


def test_gradients_of_gradients_by_differences():
    """Chainer's numerical check, which needs no other implementation."""
    x, W, gy, ggx, ggW = arrays(
        (2, 2, 5, 5), (3, 2, 3, 3), (2, 3, 3, 3), (2, 2, 5, 5), (3, 2, 3, 3), seed=2
    )
    gradient_check.check_double_backward(
        convolution(stride=2, pad=1),
        (x, W),
        gy,
        (ggx, ggW),
        eps=1e-1,  # convolutions are linear in each argument
        rtol=1e-3,
        atol=1e-3,
    )


# ---------------------------------------------------------------- memory


def test_memory_is_shared_and_outlives_torchs_tensor():
    (x,) = arrays((2, 3, 4, 5))
    tensor = functions._tensor(x)
    assert tensor.data_ptr() == x.ctypes.data
    assert functions._array(tensor, x).ctypes.data == x.ctypes.data
    assert functions._array(tensor.transpose(0, 3), x).flags.c_contiguous
    x.flags.writeable = False  # a tensor would let others write
    assert functions._tensor(x).data_ptr() != x.ctypes.data
    y = functions._array(torch.full((1000, 1000), 3.0), x)
    gc.collect()
    torch.full((1000, 1000), 5.0)  # would take the memory, were it free
    assert (y == 3).all()
    y += 1  # Chainer accumulates gradients in place
    assert (y == 4).all()


def test_the_memory_of_an_output_is_freed_with_its_array():
    y = F.relu(arrays((50, 50))[0]).array
    gone = weakref.ref(y.base)
    del y
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize('kind', ['read-only', 'transposed', 'reversed', 'strided', 'unaligned'])
def test_any_memory_layout_gives_the_same_bits(kind):
    x, W = arrays((3, 4, 6, 6), (5, 4, 3, 3))
    other = {
        'read-only': x.copy(),
        'transposed': np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        'reversed': x[::-1].copy()[::-1],
        'strided': np.repeat(x, 2, axis=3)[..., ::2],
        'unaligned': np.frombuffer(b'0' + x.tobytes(), np.float32, offset=1).reshape(x.shape),
    }[kind]
    if kind == 'read-only':
        other.flags.writeable = False

    def run(x):
        return with_gradients(lambda x: pooling(F.relu(F.convolution_2d(x, W, pad=1))))(
            arrays((3, 5, 3, 3))[0], x
        )

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for expected, actual in zip(run(x), run(other)):
            np.testing.assert_array_equal(actual, expected)


def test_inputs_are_not_written():
    inputs = arrays((3, 4, 6, 6), (5, 4, 3, 3), (5,), (5,))
    before = [a.copy() for a in inputs]
    function = with_gradients(
        lambda x, W, g, b: pooling(F.relu(F.batch_normalization(F.convolution_2d(x, W), g, b)))
    )
    function(arrays((3, 5, 2, 2))[0], *inputs)
    for array, copy in zip(inputs, before):
        np.testing.assert_array_equal(array, copy)


def test_nan_is_not_hidden():
    x = np.array([[[[np.nan, -1], [2, np.inf]]]], np.float32)
    assert np.isnan(F.relu(x).array[0, 0, 0, 0]) and F.relu(x).array[0, 0, 1, 1] == np.inf
    assert np.isnan(F.max_pooling_2d(x, 2, cover_all=False).array).all()
    y, (gamma, beta) = np.tile(x, (3, 1, 1, 1)), np.ones((2, 1), np.float32)
    assert np.isnan(F.batch_normalization(y, gamma, beta).array).all()


# ---------------------------------------------------------------- on, off, and errors


def test_on_and_off():
    cls = convolution_2d.Convolution2DFunction
    functions.enable()
    forward = cls.forward
    functions.enable()
    assert cls.forward is forward  # not replaced twice
    functions.disable()
    assert 'forward' not in vars(cls) and cls.forward is chainer.FunctionNode.forward
    assert not hasattr(batch_normalization.BatchNormalization.forward, '__wrapped__')
    functions.disable()


def test_cudnn_is_chainers_and_never_tf32(monkeypatch):
    cudnn = torch.backends.cudnn
    functions.disable()
    monkeypatch.setattr(cudnn, 'allow_tf32', True)
    functions.enable()
    assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (False, False, False)
    functions.disable()
    assert cudnn.allow_tf32
    with chainer.using_config('autotune', True), chainer.using_config('cudnn_deterministic', True):
        functions.enable()
    assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (False, True, True)
    functions.disable()
    assert (cudnn.benchmark, cudnn.deterministic) == (False, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason='Torch has a GPU')
def test_a_torch_without_cuda_is_refused_for_a_gpu():
    functions.disable()
    gpu = types.SimpleNamespace(
        xp=types.ModuleType('cupy'), device=types.SimpleNamespace(id=0), name='@cupy:0'
    )
    with pytest.raises(functions.UnusableTorchError) as error:
        functions.enable(gpu)
    message = str(error.value)
    assert message.startswith(f'torch {torch.__version__} cannot compute on @cupy:0: ')
    assert message.endswith(('a build for CPUs', 'finds no GPU'))
    assert convolution_2d.Convolution2DFunction.forward is chainer.FunctionNode.forward


def test_extensions_alone_do_not_import_torch():
    code = 'import sys, extensions, reproduce.train; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
