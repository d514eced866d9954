"""The hook against Chainer's own, bit by bit, and against the formula."""

import chainer
import numpy as np
import pytest
from chainer import optimizer_hooks

from extensions import WeightDecay, kernels


def decayed(hook, dtype, order):
    rng = np.random.RandomState(0)
    param = chainer.Parameter(np.asarray(rng.standard_normal((7, 301)).astype(dtype), order=order))
    before = rng.standard_normal((7, 301)).astype(dtype)
    param.grad = before.copy(order)
    hook(None, param)
    return before, param


@pytest.mark.parametrize('compiled', [True, False])
@pytest.mark.parametrize('order', ['C', 'F'])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_bits_of_chainers(monkeypatch, dtype, order, compiled):
    if not compiled:
        monkeypatch.setattr(kernels, 'compiled', {})
    _, theirs = decayed(optimizer_hooks.WeightDecay(0.037), dtype, order)
    before, ours = decayed(WeightDecay(0.037), dtype, order)
    np.testing.assert_array_equal(ours.grad, theirs.grad)
    exact = before.astype(np.float64) + 0.037 * ours.data.astype(np.float64)
    np.testing.assert_allclose(ours.grad, exact, rtol=1e-6, atol=1e-7)


def test_without_a_gradient_and_with_a_loss_scale():
    param = chainer.Parameter(np.full(3, 2, np.float32))
    WeightDecay(0.5)(None, param)
    assert param.grad is None
    param.grad = np.ones(3, np.float32)
    param._loss_scale = 8
    WeightDecay(0.5)(None, param)
    np.testing.assert_array_equal(param.grad, 1 + 8 * 0.5 * 2)
