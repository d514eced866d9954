"""What only the miniature does, against its formulas in float64."""

import contextlib
import importlib

import chainer
import numpy as np
import pytest

import extensions
from reproduce.studies.miniature import parts

LR, MU1, MU2, EPS, DECAY = 0.3, 0.8, 0.9, 1e-3, 0.05
SHAPES = {'W': (3, 4), 'b': (5,)}


@pytest.fixture
def put():
    """``parts.put`` until the end of the test. Afterwards all is as before."""

    def replaced():
        places = [place for _, places in parts._PARTS.values() for place in places]
        return [getattr(importlib.import_module(module), name) for module, name in places]

    before = replaced()
    with contextlib.ExitStack() as stack:
        yield lambda name: stack.enter_context(parts.put(name))
    assert replaced() == before


def trained(alphas):
    """A link after an update per pair of alphas, with the gradients that it used."""
    rng = np.random.RandomState(1)
    link = chainer.Link()
    with link.init_scope():
        for name, shape in SHAPES.items():
            setattr(link, name, chainer.Parameter(rng.randn(*shape).astype(np.float32)))
    start = {name: getattr(link, name).array.astype(np.float64) for name in SHAPES}
    optimizer = extensions.RMSpropWarmup(LR, mu1=MU1, mu2=MU2, eps=EPS).setup(link)
    link.W.update_rule.hyperparam.weight_decay_rate = DECAY
    grads = []
    for optimizer.alpha_sgd, optimizer.alpha_rmsprop in alphas:
        for name, shape in SHAPES.items():
            getattr(link, name).grad = rng.randn(*shape).astype(np.float32)
        grads.append({name: getattr(link, name).grad.astype(np.float64) for name in SHAPES})
        optimizer.update()
    return link, start, grads


ALPHAS = [(0.02, 0.004), (0.5, 0.002), (1.0, 0.0)]


def test_the_mistake_has_the_rmsprop_term_outside_the_momentum(put):
    put('outside')
    link, theta, grads = trained(ALPHAS)
    for name, decay in (('W', DECAY), ('b', 0)):
        p, m, delta = theta[name], 0, 0
        for (sgd, rmsprop), grad in zip(ALPHAS, grads):
            g = grad[name] + decay * p
            m = MU2 * m + (1 - MU2) * g**2
            delta = MU1 * delta - sgd * g
            p = p + LR * (delta - rmsprop / (np.sqrt(m) + EPS) * g)
        np.testing.assert_allclose(getattr(link, name).array, p, rtol=2e-6, atol=1e-6)
        state = getattr(link, name).update_rule.state
        np.testing.assert_allclose(state['m'], m, rtol=1e-5)
        np.testing.assert_allclose(state['delta'], delta, rtol=1e-5, atol=1e-6)


def test_lars_scales_the_rate_of_weights_alone(put, monkeypatch):
    monkeypatch.setattr(parts, 'LARS_TRUST', 0.2)
    put('lars')
    link, theta, grads = trained([(1.0, 0.0)] * 3)
    for name, decay in (('W', DECAY), ('b', 0)):
        p, v = theta[name], 0
        for grad in grads:
            g = grad[name]
            rate = 1
            if name == 'W':
                length = np.sqrt(np.sum(p**2))
                rate = 0.2 * length / (np.sqrt(np.sum(g**2)) + decay * length)
            v = MU1 * v + LR * rate * (g + decay * p)
            p = p - v
        np.testing.assert_allclose(getattr(link, name).array, p, rtol=2e-6, atol=1e-6)


def test_the_norm_has_one_order_on_every_processor():
    a = np.random.RandomState(0).randn(1001, 7).astype('f')
    assert parts.norm_of(a) == parts.norm_of(a.T[::-1]) == parts.norm_of(np.sort(a, axis=None))
    assert parts.norm_of(a) == pytest.approx(np.linalg.norm(a.astype('d')), rel=1e-14)


def test_the_abrupt_transition_has_one_of_the_two_at_a_time(put):
    put('abrupt')
    assert extensions.AlphaSGDSchedule is parts.AbruptTransition
    schedule = extensions.AlphaSGDSchedule(4, 40, epochs=90, beta_center=10.0, lr_rmsprop=0.006)
    optimizer = extensions.RMSpropWarmup(lr=0.3)
    for epoch, expected in ((0, (0, 0.02)), (9.99, (0, 0.02)), (10, (1, 0)), (60, (1, 0))):
        schedule._set(optimizer, epoch)
        found = (optimizer.alpha_sgd, optimizer.alpha_rmsprop)
        assert found == pytest.approx(expected, rel=1e-12), epoch


def half(*values):
    return [np.array([value], np.float16) for value in values]


def test_sums_round_in_their_own_order():
    # Above 2048 float16 has even numbers only: where 1 is added tells the order.
    values = half(2048, 1, 1, 1, 1)

    pairs = [np.float16(2048), np.float16(2), np.float16(1)]  # 2048 + 1 -> 2048; 1 + 1; 1
    total = np.float16(np.float16(pairs[0] + pairs[1]) + pairs[2])
    assert parts.tree_mean(list(values)) == total / np.float16(5)
    with np.errstate(over='ignore'):
        assert parts.tree_mean(half(60000, 60000))[0] == np.inf
    assert parts.mean_divided_first(half(60000, 60000))[0] == 60000
    third = np.float16(np.float16(1) / np.float16(3))
    expected = np.float16(np.float16(third + third) + np.float16(np.float16(7) / np.float16(3)))
    assert parts.mean_divided_first(half(1, 1, 7)) == expected


@pytest.mark.parametrize('name', ['tree', 'divide-first'])
def test_the_communicator_adds_that_way(put, name):
    put(name)
    comm = extensions.create_communicator('mpi', accumulate='ring')
    rng = np.random.RandomState(2)
    model = chainer.links.Linear(7, 3)
    for _ in range(2):  # twice: nothing is left of the first iteration
        sent = []
        for _ in range(5):
            model.W.grad = rng.randn(3, 7).astype(np.float32)
            model.b.grad = rng.randn(3).astype(np.float32)
            sent.append({n: p.grad.astype(np.float16) for n, p in model.namedparams()})
            comm.add_grad(model)
        comm.mean_grad(model)
        for n, p in model.namedparams():
            a, b, c, d, e = (grads[n] for grads in sent)
            if name == 'tree':
                expected = (((a + b) + (c + d)) + e) / np.float16(5)
            else:
                a, b, c, d, e = (x / np.float16(5) for x in (a, b, c, d, e))
                expected = (((a + b) + c) + d) + e
            np.testing.assert_array_equal(p.grad, expected.astype(np.float32))
