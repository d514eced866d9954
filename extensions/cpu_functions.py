"""ResNet-50's functions on the CPU, in C or in NumPy, in channels-last order.

Off by default. :func:`enable` replaces ``forward`` and ``backward`` of the classes in ``_METHODS``.
The rest of each class is Chainer's, as are links, hooks and the graph. An output has Chainer's
shape [N, C, H, W], and lies in memory as [N, H, W, C], which the next function reads without a
copy; any other order is copied first. So the bits of a result do not depend on it.

In C all sums have one order, which the C files state. The bits depend neither on the processor's
instruction set nor on the number of threads. NumPy's functions need no compiler. Their bits depend
on NumPy, its BLAS, the processor and the number of threads.

All that these functions do not compute stays Chainer's: GPUs, arrays of other types than float32,
groups, dilation, ``cover_all``, BN over other axes than (0, 2, 3), fixed BN that is differentiated,
and double backpropagation. Two gradients differ from Chainer's on the CPU: in C, that of a ReLU
below 0 is 0 for an infinite gradient, too, as on GPUs; and that of a maximum of -inf goes to a
pixel of the image, never to the padding.
"""

from __future__ import annotations

import chainer
import numpy as np
from chainer.functions.activation import relu
from chainer.functions.connection import convolution_2d, linear
from chainer.functions.loss import softmax_cross_entropy
from chainer.functions.math import average
from chainer.functions.normalization import batch_normalization
from chainer.functions.pooling import max_pooling_nd

from extensions import kernels, replaced_methods
from extensions.kernels import numpy_functions

_FLOAT32 = np.dtype(np.float32)
_implementation = ''  # in use: 'numpy', or a key of kernels.functions
_functions: dict = {}  # of the implementation, by name


class NotCompiledError(Exception):
    """There is no compiled library. The message says why."""


def enable(implementation: str = 'compiled'):
    """Makes Chainer compute by an implementation, in this process, until :func:`disable`.

    Args:
        implementation (str): ``'compiled'`` for the library with the processor's fastest
            instruction set, or a key of ``kernels.functions`` for that set, with the same bits;
            ``'numpy'`` for NumPy, which needs no library.

    Raises:
        NotCompiledError: There is no compiled library.
        ValueError: There is no such implementation, or the processor lacks the instruction set.
    """
    global _implementation, _functions
    found = {**kernels.functions, 'numpy': numpy_functions.FUNCTIONS}
    if implementation == 'compiled':
        if not kernels.functions:
            raise NotCompiledError(kernels.why_not)
        implementation = next(iter(found))
    if implementation not in found:
        names = ', '.join(['compiled', *found])
        raise ValueError(f'implementation {implementation!r} is none of {names}')
    _implementation, _functions = implementation, found[implementation]
    replaced_methods.put(_METHODS)


def disable():
    """Undoes :func:`enable`. Call it between iterations, not between forward and backward."""
    global _implementation, _functions
    _implementation, _functions = '', {}
    replaced_methods.undo(_METHODS)


def description() -> str:
    """Returns the implementation in use."""
    if _implementation == 'numpy':
        return 'NumPy, channels last, float32'
    return f'compiled C, {_implementation or "not enabled"}, float32'


def _fit(*arrays) -> bool:
    """Whether all arrays are NumPy's, float32, and have elements."""
    return all(type(a) is np.ndarray and a.dtype == _FLOAT32 and a.size for a in arrays)


def _call(name, numbers, *arrays):
    """Calls a function. For C, arrays become their addresses, and None a null pointer."""
    if _implementation == 'numpy':
        _functions[name](*numbers, *arrays)
        return
    _functions[name](*numbers, *[a if a is None else kernels.address(a) for a in arrays])


def _packed(array):
    """Returns the array, or a copy that C can read: aligned and in C order."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else np.array(array, order='C')


def _channels_last(array):
    """Returns [N, H, W, C] of an array [N, C, H, W]."""
    return _packed(array.transpose(0, 2, 3, 1))


def _in_memory(array):
    """Returns the array, or a copy, in the order in which these functions keep it in memory."""
    return _channels_last(array) if array.ndim == 4 else _packed(array)


def _empty(*shape):
    """Returns a new array in the order of :func:`_in_memory`, and the same in Chainer's shape."""
    if len(shape) != 4:
        return 2 * (np.empty(shape, np.float32),)
    n, channels, height, width = shape
    array = np.empty((n, height, width, channels), np.float32)
    return array, array.transpose(0, 3, 1, 2)


def _variables(indexes, gradients):
    """Returns the gradients by the inputs in ``indexes``, each computed by a function."""
    return tuple(chainer.Variable(gradients[i](), requires_grad=False) for i in indexes)


def _gradients_of(arrays) -> bool:
    """Whether a backward pass with these arrays is not Chainer's: no double backpropagation."""
    return not chainer.config.enable_backprop and _fit(*arrays)


# ---------------------------------------------------------------- convolution


def _geometry(node, x, W):
    """Returns the arguments for the shapes; None if the convolution is Chainer's."""
    if node.cover_all or node.groups != 1 or (node.dy, node.dx) != (1, 1):
        return None
    if not x.ndim == W.ndim == 4 or x.shape[1] != W.shape[1]:
        return None
    (n, channels, height, width), (out_channels, _, ky, kx) = x.shape, W.shape
    if height + 2 * node.ph < ky or width + 2 * node.pw < kx:
        return None
    sides = node.sy, node.sx, node.ph, node.pw
    return n, height, width, channels, out_channels, ky, kx, *sides


def _convolution(node, inputs):
    geometry = _fit(*inputs) and _geometry(node, *inputs[:2])
    x, W, *b = inputs
    if not geometry or any(array.shape != (len(W),) for array in b):
        return NotImplemented
    node.retain_inputs((0, 1))
    out, y = _empty(len(x), len(W), *node._get_out_size(x.shape, W.shape))
    _call('convolution', geometry, _channels_last(x), _packed(W), out)
    if b:
        _call('add_bias', (out.size // len(W), len(W)), _packed(b[0]), out)
    return (y,)


def _convolution_backward(node, indexes, grad_outputs):
    x, W = (variable.array for variable in node.get_retained_inputs())
    gy = grad_outputs[0].array
    geometry = _gradients_of((x, W, gy)) and _geometry(node, x, W)
    if not geometry:
        return NotImplemented
    gy = _channels_last(gy)

    def by_x():
        out, gx = _empty(*x.shape)
        _call('convolution_gx', geometry, gy, _packed(W), out)
        return gx

    def by_W():
        gW = np.empty(W.shape, np.float32)
        _call('convolution_gw', geometry, _channels_last(x), gy, gW)
        return gW

    return _variables(indexes, (by_x, by_W, lambda: _sum_of_rows(gy)))


def _sum_of_rows(gy):
    """Returns the sums over all but the last axis."""
    gb = np.empty(gy.shape[-1], np.float32)
    _call('sum_pixels', (1, gy.size // gb.size, gb.size, 1.0), gy, gb)
    return gb


# ---------------------------------------------------------------- batch normalization


def _is_over_channels(node, x, *vectors) -> bool:
    shapes = {vector.shape for vector in vectors}
    return x.ndim == 4 and shapes == {x.shape[1:2]} and node.axis in (None, (0, 2, 3))


def _batch_normalization(node, inputs):
    x, gamma, beta = inputs
    statistics = [a for a in (node.running_mean, node.running_var) if a is not None]
    if (
        node._impl_selector is not batch_normalization._impl_selector
        or not _fit(*inputs, *statistics)
        or not _is_over_channels(node, x, gamma, beta, *statistics)
        or x.size == gamma.size  # Chainer warns
        or len(statistics) == 1
        or not all(a.flags.carray for a in statistics)
    ):
        return NotImplemented
    node.retain_inputs((0, 1))
    n, channels, height, width = x.shape
    node.saved = np.empty((2, channels))
    out, y = _empty(*x.shape)
    _call(
        'batch_normalization',
        (n * height * width, channels, node.eps, node.decay),
        _channels_last(x),
        _packed(gamma),
        _packed(beta),
        node.running_mean,
        node.running_var,
        node.saved,
        out,
    )
    return (y,)


def _batch_normalization_backward(node, indexes, grad_outputs):
    if not hasattr(node, 'saved'):
        return NotImplemented
    x, gamma = (variable.array for variable in node.get_retained_inputs())
    gy = grad_outputs[0].array
    if not _gradients_of((gy,)):
        _prepare_chainers_backward(node)
        return NotImplemented
    n, channels, height, width = x.shape
    out, gx = _empty(*x.shape)
    ggamma, gbeta = np.empty((2, channels), np.float32)
    _call(
        'batch_normalization_gradients',
        (n * height * width, channels),
        _channels_last(x),
        _packed(gamma),
        node.saved,
        _channels_last(gy),
        out,
        ggamma,
        gbeta,
    )
    return _variables(indexes, (lambda: gx, lambda: ggamma, lambda: gbeta))


def _prepare_chainers_backward(node):
    """Sets what Chainer's forward pass leaves to the backward pass."""
    node.axis, node.key_axis = (0, 2, 3), (1,)
    node.expander = (None, slice(None), None, None)
    node._impl = batch_normalization.GeneralBatchNormalizationImpl()
    node.mean, node.inv_std = node.saved.astype(np.float32)


def _fixed_batch_normalization(node, inputs):
    x, gamma, *_ = inputs
    if chainer.config.enable_backprop or not _fit(*inputs) or not _is_over_channels(node, *inputs):
        return NotImplemented
    out, y = _empty(*x.shape)
    _call(
        'fixed_batch_normalization',
        (x.size // len(gamma), len(gamma), node.eps),
        _channels_last(x),
        *map(_packed, inputs[1:]),
        out,
    )
    return (y,)


# ---------------------------------------------------------------- ReLU and max pooling


def _relu(node, inputs):
    if not _fit(*inputs):
        return NotImplemented
    node.retain_outputs((0,))
    out, y = _empty(*inputs[0].shape)
    _call('relu', (out.size,), _in_memory(inputs[0]), out)
    return (y,)


def _relu_backward(node, indexes, grad_outputs):
    y, gy = node.get_retained_outputs()[0].array, grad_outputs[0].array
    if not _gradients_of((y, gy)):
        return NotImplemented
    out, gx = _empty(*y.shape)
    _call('relu_gx', (out.size,), _in_memory(y), _in_memory(gy), out)
    return _variables(indexes, (lambda: gx,))


def _max_pooling(node, inputs):
    (x,) = inputs
    on_image = all(2 * pad <= size for pad, size in zip(node.pad, node.ksize))
    is_image = node.ndim == 2 and x.ndim == 4
    if not is_image or node.return_indices or node.cover_all or not on_image or not _fit(x):
        return NotImplemented
    (n, channels, *sides), windows = x.shape, list(zip(node.ksize, node.stride, node.pad))
    outs = [(side + 2 * p - k) // s + 1 for side, (k, s, p) in zip(sides, windows)]
    if min(outs) < 1 or n * sides[0] * sides[1] >= 1 << 31:
        return NotImplemented
    node.retain_inputs((0,))
    out, y = _empty(n, channels, *outs)
    node.pixels = np.empty(out.shape, np.int32)
    geometry = n, *sides, channels, *node.ksize, *node.stride, *node.pad
    _call('max_pooling', geometry, _channels_last(x), out, node.pixels)
    return (y,)


def _max_pooling_backward(node, indexes, grad_outputs):
    if not hasattr(node, 'pixels'):
        return NotImplemented
    gy = grad_outputs[0].array
    shape = node.get_retained_inputs()[0].shape
    if not _gradients_of((gy,)):
        node.forward_cpu((node.get_retained_inputs()[0].array,))  # sets Chainer's indexes
        return NotImplemented
    out, gx = _empty(*shape)
    channels = shape[1]
    pixels_of_x, pixels = out.size // channels, gy.size // channels
    _call('max_pooling_gx', (pixels_of_x, pixels, channels), _channels_last(gy), node.pixels, out)
    return _variables(indexes, (lambda: gx,))


# ---------------------------------------------------------------- the head


def _average(node, inputs):
    (x,) = inputs
    if node.axis != (2, 3) or node.keepdims or x.ndim != 4 or not _fit(x):
        return NotImplemented
    n, channels, height, width = x.shape
    node.multiplier = 1 / (height * width)
    y = np.empty((n, channels), np.float32)
    _call('sum_pixels', (n, height * width, channels, node.multiplier), _channels_last(x), y)
    return (y,)


def _average_backward(node, indexes, grad_outputs):
    gy, shape = grad_outputs[0].array, node.inputs[0].shape
    if node.axis != (2, 3) or node.keepdims or len(shape) != 4 or not _gradients_of((gy,)):
        return NotImplemented
    out, gx = _empty(*shape)
    n, channels, height, width = shape
    _call('spread', (n, height * width, channels, node.multiplier), _packed(gy), out)
    return _variables(indexes, (lambda: gx,))


def _linear_geometry(x, W):
    """A linear function is a convolution of images of one pixel."""
    return len(x), 1, 1, x.shape[1], len(W), 1, 1, 1, 1, 0, 0


def _linear(node, inputs):
    x, W, *b = inputs
    if (
        not _fit(*inputs)
        or not x.ndim == W.ndim == 2
        or x.shape[1] != W.shape[1]
        or any(array.shape != (len(W),) for array in b)
    ):
        return NotImplemented
    node.retain_inputs((0, 1))
    x, W, *b = map(_packed, inputs)
    y = np.empty((len(x), len(W)), np.float32)
    _call('convolution', _linear_geometry(x, W), x, W, y)
    if b:
        _call('add_bias', y.shape, b[0], y)
    return (y,)


def _linear_backward(node, indexes, grad_outputs):
    x, W = (variable.array for variable in node.get_retained_inputs())
    gy = grad_outputs[0].array
    if not _gradients_of((x, W, gy)):
        return NotImplemented
    x, W, gy = map(_packed, (x, W, gy))

    def by_x():
        gx = np.empty(x.shape, np.float32)
        _call('convolution_gx', _linear_geometry(x, W), gy, W, gx)
        return gx

    def by_W():
        gW = np.empty(W.shape, np.float32)
        _call('convolution_gw', _linear_geometry(x, W), x, gy, gW)
        return gW

    return _variables(indexes, (by_x, by_W, lambda: _sum_of_rows(gy)))


def _softmax_cross_entropy(node, inputs):
    x, t = inputs
    if (
        not _fit(x)
        or x.ndim != 2
        or t.shape != x.shape[:1]
        or t.dtype.kind != 'i'
        or node.class_weight is not None
        or (node.reduce == 'no' and chainer.config.enable_backprop)
    ):
        return NotImplemented
    ignored = t == node.ignore_label
    if not (ignored | (t >= 0) & (t < x.shape[1])).all():
        return NotImplemented  # Chainer reports a wrong label
    node.retain_inputs((0, 1))
    count = t.size - np.count_nonzero(ignored) if node.normalize else len(x)
    node._coeff = 1 / max(int(count), 1)
    node.labels = np.where(ignored, -1, t).astype(np.int32)
    node.y = np.empty(x.shape, np.float32)
    mean, each = np.empty((), np.float32), np.empty(len(x), np.float32)
    numbers = *x.shape, -1, node._coeff
    _call('softmax_cross_entropy', numbers, _packed(x), node.labels, node.y, mean, each)
    return (each if node.reduce == 'no' else mean,)


def _softmax_cross_entropy_backward(node, indexes, grad_outputs):
    gloss = grad_outputs[0].array
    if not hasattr(node, 'labels') or not _gradients_of((gloss,)):
        return NotImplemented
    gx = np.empty(node.y.shape, np.float32)
    numbers = *gx.shape, -1, float(gloss) * node._coeff
    _call('softmax_cross_entropy_gx', numbers, node.y, node.labels, gx)
    return chainer.Variable(gx, requires_grad=False), None


_METHODS = {
    (convolution_2d.Convolution2DFunction, 'forward'): _convolution,
    (convolution_2d.Convolution2DFunction, 'backward'): _convolution_backward,
    (batch_normalization.BatchNormalization, 'forward'): _batch_normalization,
    (batch_normalization.BatchNormalization, 'backward'): _batch_normalization_backward,
    (batch_normalization.FixedBatchNormalization, 'forward'): _fixed_batch_normalization,
    (relu.ReLU, 'forward'): _relu,
    (relu.ReLU, 'backward'): _relu_backward,
    (max_pooling_nd.MaxPoolingND, 'forward'): _max_pooling,
    (max_pooling_nd.MaxPoolingND, 'backward'): _max_pooling_backward,
    (average.Mean, 'forward'): _average,
    (average.Mean, 'backward'): _average_backward,
    (linear.LinearFunction, 'forward'): _linear,
    (linear.LinearFunction, 'backward'): _linear_backward,
    (softmax_cross_entropy.SoftmaxCrossEntropy, 'forward'): _softmax_cross_entropy,
    (softmax_cross_entropy.SoftmaxCrossEntropy, 'backward'): _softmax_cross_entropy_backward,
}
