"""Chainer's convolution, batch normalization, ReLU and max pooling by PyTorch's operators.

Off by default. :func:`enable` replaces ``forward`` of the classes in ``_METHODS``. The rest of each
class is Chainer's: checks, the graph, and double backpropagation. On a GPU these operators are
cuDNN's, which CuPy 14 has no binding of; on a CPU they are oneDNN's. Arrays and tensors share their
memory in both directions: by NumPy's interface; on GPUs by DLPack, and back by the address.

All that Torch does not compute in the same way stays Chainer's: arrays of other types than float32,
``cover_all``, cuDNN's layouts, BN over other axes than (0, 2, 3), fixed BN that is differentiated,
and BN of one value per channel, where Torch's unbiased variance is NaN.

The module imports Torch 2. Both libraries use CUDA's default stream, as Chainer does: nothing
waits, and arrays must not be used on other streams.
"""

from __future__ import annotations

import os

import chainer
import numpy as np
import torch
from chainer.backends import cuda
from chainer.functions.activation import relu
from chainer.functions.connection import convolution_2d, deconvolution_2d
from chainer.functions.normalization import batch_normalization
from chainer.functions.pooling import max_pooling_nd

from extensions import replaced_methods

_FLOAT32 = np.dtype(np.float32)
_aten = torch.ops.aten
_flags: dict = {}  # Torch's settings of cuDNN before enable()


class UnusableTorchError(Exception):
    """Torch cannot compute on the device. The message has Torch's reason."""


def enable(device=None):
    """Makes Chainer compute by Torch, in this process, until :func:`disable`.

    Torch's settings of cuDNN become Chainer's: ``benchmark`` is ``chainer.config.autotune``, and
    ``deterministic`` is ``chainer.config.cudnn_deterministic``, as they are now. Both are off by
    default: an algorithm found by timing may differ between runs, and deterministic ones may be
    slower. TF32, which Torch allows in convolutions, is off: NVIDIA_TF32_OVERRIDE=1 allows it.

    Args:
        device (~chainer.backend.Device): Where the model will be; None for the CPU. On a GPU it
            becomes Torch's current device.

    Raises:
        UnusableTorchError: Torch cannot compute on this device.
    """
    _try_on(device)
    if not _flags:
        ours = {
            'allow_tf32': os.environ.get('NVIDIA_TF32_OVERRIDE') == '1',
            'benchmark': bool(chainer.config.autotune),
            'deterministic': bool(chainer.config.cudnn_deterministic),
        }
        for name, value in ours.items():
            _flags[name] = getattr(torch.backends.cudnn, name)
            setattr(torch.backends.cudnn, name, value)
    replaced_methods.put(_METHODS)


def disable():
    """Undoes :func:`enable`. Call it between iterations, not between forward and backward."""
    replaced_methods.undo(_METHODS)
    for name, value in _flags.items():
        setattr(torch.backends.cudnn, name, value)
    _flags.clear()


def description() -> str:
    """Returns Torch's version, cuDNN's if Torch uses a GPU, and the type of the products."""
    cudnn = f', cuDNN {torch.backends.cudnn.version()}' if torch.cuda.is_initialized() else ''
    products = 'TF32' if torch.backends.cudnn.allow_tf32 else 'float32'
    return f'torch {torch.__version__}{cudnn}, {products}'


def _try_on(device):
    """Computes 2 * 2 on the device, by a convolution."""
    xp, where = (np, '@numpy') if device is None else (device.xp, device.name)
    try:
        if xp is not np:
            if not torch.cuda.is_available():
                built_for = torch.version.cuda
                raise RuntimeError('it finds no GPU' if built_for else 'it is a build for CPUs')
            torch.cuda.set_device(device.device.id)
        two = xp.full((1, 1, 1, 1), 2, np.float32)
        product = float(_array(torch.conv2d(_tensor(two), _tensor(two)), two).item())
        if product != 4:
            raise ArithmeticError(f'2 * 2 is {product}')
    except Exception as error:  # Torch raises many kinds
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise UnusableTorchError(
            f'torch {torch.__version__} cannot compute on {where}: {reason}'
        ) from error


def _fit(arrays) -> bool:
    """Whether all arrays are float32, and of one library."""
    kind = type(arrays[0])
    return kind in (np.ndarray, cuda.ndarray) and all(
        type(a) is kind and a.dtype == _FLOAT32 for a in arrays
    )


def _tensor(array):
    """Returns a tensor on the array's memory.

    It is on a copy if the array is read-only, which no tensor can be, or not in C order: so the
    bits of a result do not depend on the order.
    """
    if isinstance(array, np.ndarray):
        if not array.flags.carray:
            array = np.require(array, requirements='CAW')
        return torch.from_numpy(array)
    # -1: both libraries use the default stream, and none has to wait for the other.
    return torch.from_dlpack(cuda.cupy.ascontiguousarray(array).__dlpack__(stream=-1))


def _array(tensor, like):
    """Returns an array of ``like``'s library, in C order, on the tensor's memory."""
    tensor = tensor.contiguous()
    if isinstance(like, np.ndarray):
        return tensor.numpy()
    # In a quarter of the time of CUDA's array interface: there are 600 in an iteration.
    n_bytes = tensor.numel() * tensor.element_size()
    memory = cuda.cupy.cuda.UnownedMemory(tensor.data_ptr(), n_bytes, tensor, tensor.get_device())
    place = cuda.cupy.cuda.MemoryPointer(memory, 0)
    return cuda.cupy.ndarray(tuple(tensor.shape), _FLOAT32, place)


# ---------------------------------------------------------------- convolution


def _geometry(node):
    return [node.sy, node.sx], [node.ph, node.pw], [node.dy, node.dx]


def _convolution(node, inputs):
    if node.cover_all or not _fit(inputs):
        return NotImplemented
    node.retain_inputs((0, 1))
    x, W, *b = map(_tensor, inputs)
    bias = b[0] if b else None
    y = _aten.convolution.default(x, W, bias, *_geometry(node), False, [0, 0], node.groups)
    return (_array(y, inputs[0]),)


def _convolution_backward(node, gy, x, W, mask):
    geometry = _geometry(node)
    return _aten.convolution_backward.default(
        gy, x, W, None, *geometry, False, [0, 0], node.groups, mask
    )


def _gradient_by_x(node, inputs):
    """Computes a deconvolution, which is the gradient of a convolution by its x."""
    if not _fit(inputs):
        return NotImplemented
    shape, W_shape = inputs[0].shape, inputs[1].shape
    node._calc_out_size(shape, W_shape)
    node._set_cover_all(shape, W_shape)
    if node.cover_all:
        return NotImplemented
    node.retain_inputs((0, 1))
    gy, W, *b = map(_tensor, inputs)
    x_shape = shape[0], W_shape[1] * node.groups, node.outh, node.outw
    x = gy.new_empty(()).expand(x_shape)  # only its shape is used
    gx = _convolution_backward(node, gy, x, W, [True, False, False])[0]
    if b:
        gx += b[0][:, None, None]
    return (_array(gx, inputs[0]),)


def _gradient_by_W(node, inputs):
    if node.cover_all or node.W_dtype != _FLOAT32 or not _fit(inputs):
        return NotImplemented
    node.retain_inputs((0, 1))
    x, gy = map(_tensor, inputs)
    W = x.new_empty(node.W_shape)  # only its shape is used
    gW = _convolution_backward(node, gy, x, W, [False, True, False])[1]
    return (_array(gW, inputs[0]),)


# ---------------------------------------------------------------- batch normalization


class _BatchNormalization(batch_normalization._BatchNormalizationImpl):
    """Chainer's part of BN that depends on the library. Torch takes cuDNN's or its own kernels."""

    def forward(
        self, axis, gamma, x, x_layout, xp, expander, beta, eps, decay, running_mean, running_var
    ):
        statistics = [None, None]
        if running_mean is not None:
            statistics = [_tensor(running_mean), _tensor(running_var)]  # written in place
        y, mean, inv_std, reserve, kernel = _aten._batch_norm_impl_index.default(
            _tensor(x), _tensor(gamma), _tensor(beta), *statistics, True, 1 - decay, eps, True
        )
        arrays = _array(mean, x), None, _array(inv_std, x)  # for double backpropagation
        data = mean, inv_std, reserve, kernel
        return _array(y, x), x_layout, running_mean, running_var, *arrays, data

    def backward(
        self, axis, gamma, gy, x, x_layout, xp, expander, mean, inv_std, eps, var, forward_data
    ):
        mean, inv_std, reserve, kernel = forward_data
        gx, ggamma, gbeta = _aten._batch_norm_impl_index_backward.default(
            kernel,
            _tensor(x),
            _tensor(gy),
            _tensor(gamma),
            None,
            None,
            mean,
            inv_std,
            True,
            eps,
            [True, True, True],
            reserve,
        )
        return _array(gx, x), x_layout, _array(ggamma, x), _array(gbeta, x)


def _is_over_channels(node, x, gamma) -> bool:
    return x.ndim == 4 and gamma.ndim == 1 and node.axis in (None, (0, 2, 3))


def _batch_normalization(node, inputs):
    """Chooses Torch's part, for Chainer's forward to call."""
    x, gamma, _ = inputs
    statistics = [a for a in (node.running_mean, node.running_var) if a is not None]
    if (
        node._impl_selector is batch_normalization._impl_selector
        and _is_over_channels(node, x, gamma)
        and x.size > gamma.size
        and _fit([*inputs, *statistics])
        and all(_is_shared(array) for array in statistics)
    ):
        node._impl_selector = lambda *_: _BatchNormalization()
    return NotImplemented


def _is_shared(array) -> bool:
    """Whether a tensor on this array would write into it."""
    return array.flags.carray if isinstance(array, np.ndarray) else array.flags.c_contiguous


def _fixed_batch_normalization(node, inputs):
    x, gamma, *_ = inputs
    if chainer.config.enable_backprop or not _is_over_channels(node, x, gamma) or not _fit(inputs):
        return NotImplemented
    y, *_ = _aten._batch_norm_impl_index.default(*map(_tensor, inputs), False, 0.0, node.eps, True)
    return (_array(y, x),)


# ---------------------------------------------------------------- ReLU and max pooling


def _relu(node, inputs):
    if not _fit(inputs):
        return NotImplemented
    node.retain_outputs((0,))
    return (_array(_aten.relu.default(_tensor(inputs[0])), inputs[0]),)


def _relu_gradient(node, inputs):
    if not _fit([*inputs, node.b]):
        return NotImplemented
    gx = _aten.threshold_backward.default(_tensor(inputs[0]), _tensor(node.b), 0)
    return (_array(gx, inputs[0]),)


def _windows(node):
    return list(node.ksize), list(node.stride), list(node.pad), [1, 1], False


def _max_pooling(node, inputs):
    torchs = not node.cover_all and all(2 * p <= k for p, k in zip(node.pad, node.ksize))
    if node.ndim != 2 or node.return_indices or not torchs or not _fit(inputs):
        return NotImplemented
    node.retain_inputs((0,))
    y, node.torch_indexes = _aten.max_pool2d_with_indices.default(
        _tensor(inputs[0]), *_windows(node)
    )
    return (_array(y, inputs[0]),)


def _max_pooling_gradient(node, inputs):
    pooling = node.func
    if not hasattr(pooling, 'torch_indexes'):
        return NotImplemented
    x = _tensor(pooling.get_retained_inputs()[0].array)
    gx = _aten.max_pool2d_with_indices_backward.default(
        _tensor(inputs[0]), x, *_windows(pooling), pooling.torch_indexes
    )
    return (_array(gx, inputs[0]),)


def _max_pooling_gradient_of_gradient(node, inputs):
    if not hasattr(node.func, 'torch_indexes'):
        return NotImplemented
    indexes = node.func.torch_indexes
    ggy = _tensor(inputs[0]).flatten(2).gather(2, indexes.flatten(2)).view(indexes.shape)
    return (_array(ggy, inputs[0]),)


_METHODS = {
    (convolution_2d.Convolution2DFunction, 'forward'): _convolution,
    (convolution_2d.Convolution2DGradW, 'forward'): _gradient_by_W,
    (deconvolution_2d.Deconvolution2DFunction, 'forward'): _gradient_by_x,
    (batch_normalization.BatchNormalization, 'forward'): _batch_normalization,
    (batch_normalization.FixedBatchNormalization, 'forward'): _fixed_batch_normalization,
    (relu.ReLU, 'forward'): _relu,
    (relu.ReLUGrad2, 'forward'): _relu_gradient,
    (max_pooling_nd.MaxPoolingND, 'forward'): _max_pooling,
    (max_pooling_nd.MaxPoolingNDGrad, 'forward'): _max_pooling_gradient,
    (max_pooling_nd.MaxPoolingNDWithIndexes, 'forward'): _max_pooling_gradient_of_gradient,
}
