import ctypes
import shutil
import subprocess

import chainer
import numpy as np
import pytest
from chainer import optimizers
from chainer.optimizer_hooks import WeightDecay

import extensions
from extensions import RMSpropWarmup, RMSpropWarmupRule, kernels, rmsprop_warmup

HYPERPARAMETERS = ('lr', 'alpha_sgd', 'alpha_rmsprop', 'mu1', 'mu2', 'eps', 'weight_decay_rate')


def equations(theta, m, delta, g, lr, alpha_sgd, alpha_rmsprop, mu1, mu2, eps, weight_decay_rate=0):
    """[W1] [W2] [W3] in float64, as the paper states them."""
    g = g + weight_decay_rate * theta
    m = mu2 * m + (1 - mu2) * g**2
    delta = mu1 * delta - (alpha_sgd + alpha_rmsprop / (np.sqrt(m) + eps)) * g
    return theta + lr * delta, m, delta


def link_of(array):
    link = chainer.Link()
    with link.init_scope():
        link.p = chainer.Parameter(array.copy())
    return link


def dtype_of(value, dtype):
    return np.dtype(dtype).type(value)


def arrays(shape, dtype, seed=0):
    rng = np.random.RandomState(seed)
    return np.asarray(rng.standard_normal(shape), dtype), rng


@pytest.fixture(params=['C', 'NumPy'])
def arithmetic(request, monkeypatch):
    if request.param == 'NumPy':
        monkeypatch.setattr(kernels, 'compiled', {})
    elif not kernels.compiled:
        pytest.skip('no C compiler when the project was installed')


@pytest.mark.usefixtures('arithmetic')
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('shape', [(), (0,), (1,), (2, 3, 5), (65536,), (150001,)])
@pytest.mark.parametrize(
    'fixed',
    [
        {},
        {'mu1': 0.5, 'mu2': 0.9, 'eps': 0.1, 'weight_decay_rate': 0.03},
        {'mu1': 0.0, 'mu2': 0.0, 'eps': 1e-3},
    ],
)
def test_thousand_steps_follow_the_equations(dtype, shape, fixed):
    start, rng = arrays(shape, dtype)
    values = {'mu1': 0.9, 'mu2': 0.99, 'eps': 1e-8, **fixed}
    link = link_of(start)
    optimizer = RMSpropWarmup(0.1, **values).setup(link)
    theta, m, delta = start.astype(np.float64), 0.0, 0.0
    n_steps = 1000 if np.prod(shape) < 1000 else 30
    for step in range(n_steps):
        optimizer.lr = 0.1 if step % 7 else 0.03
        optimizer.alpha_sgd = min(1.0, step / n_steps + 0.01)
        optimizer.alpha_rmsprop = max(0.0, 0.5 - step / n_steps)
        g = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.randint(-3, 1), dtype)
        link.p.grad = g
        optimizer.update()
        theta, m, delta = equations(
            theta, m, delta, g.astype(np.float64), *(getattr(optimizer, n) for n in HYPERPARAMETERS)
        )
    # Each step rounds about ten times; m and delta forget the errors of old steps at the rates mu2
    # and mu1, 1 / (1 - mu) steps of them count, while theta keeps the errors of all.
    rounding = np.finfo(dtype).eps
    for actual, expected, steps in [
        (link.p.update_rule.state['m'], m, 100),
        (link.p.update_rule.state['delta'], delta, 20),
        (link.p.data, theta, n_steps),
    ]:
        scale = np.max(np.abs(expected), initial=1e-3)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=3 * rounding * steps * scale)
    assert link.p.dtype == dtype and optimizer.t == n_steps


@pytest.mark.skipif(not kernels.compiled, reason='no C compiler at the installation')
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('weight_decay_rate', [0, 0.02])
def test_c_and_numpy_give_the_same_bits(monkeypatch, dtype, weight_decay_rate):
    limits = np.finfo(dtype)
    odd = [0, -0.0, limits.tiny, limits.tiny / 8, limits.max, -limits.max, 1e15, np.inf, np.nan]
    start, rng = arrays((100003,), dtype)
    start[: len(odd)] = odd
    gradients = [rng.standard_normal(start.shape).astype(dtype) for _ in range(6)]
    for i, g in enumerate(gradients):
        g *= dtype_of(10.0 ** rng.randint(-20, 10), dtype)
        g[i : i + len(odd)] = odd
    results = []
    for compiled in (kernels.compiled, {}):
        monkeypatch.setattr(kernels, 'compiled', compiled)
        link = link_of(start)
        optimizer = RMSpropWarmup(0.1, alpha_rmsprop=0.3).setup(link)
        optimizer.weight_decay_rate = weight_decay_rate
        with np.errstate(all='ignore'):
            for step, g in enumerate(gradients):
                link.p.grad = g
                optimizer.alpha_rmsprop = 0.3 * (step % 2)
                optimizer.update()
        state = link.p.update_rule.state
        results.append((link.p.array, state['m'], state['delta']))
    for c, numpys in zip(*results):
        np.testing.assert_array_equal(np.isnan(c), np.isnan(numpys))
        c[np.isnan(c)] = numpys[np.isnan(numpys)] = 0  # a NaN's sign and payload have no meaning
        np.testing.assert_array_equal(c.view(np.uint8), numpys.view(np.uint8))


def test_layouts_other_than_c_order():
    start, rng = arrays((30, 20), 'float32')
    gradient = rng.standard_normal((20, 30)).astype('float32').T
    plain, transposed = link_of(start), link_of(start)
    transposed.p.array = np.asfortranarray(start)
    for link in (plain, transposed):
        optimizer = RMSpropWarmup(0.1, alpha_rmsprop=0.2).setup(link)
        link.p.grad = gradient
        for _ in range(3):
            optimizer.update()
    np.testing.assert_array_equal(plain.p.array, transposed.p.array)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_a_model_that_moves_between_devices_takes_its_state_along(device, dtype):
    start, rng = arrays((1001,), dtype)
    link = link_of(start)
    optimizer = RMSpropWarmup(0.1, 0.7, 0.3, weight_decay_rate=0.2).setup(link)
    theta, m, delta = start.astype(np.float64), 0.0, 0.0
    for place in ['@numpy', device, device, '@numpy', device]:
        link.to_device(place)
        g = rng.standard_normal(1001).astype(dtype)
        link.p.grad = link.device.send(g)
        optimizer.update()
        theta, m, delta = equations(
            theta, m, delta, g.astype(np.float64), 0.1, 0.7, 0.3, 0.9, 0.99, 1e-8, 0.2
        )
    state = link.p.update_rule.state
    rounding = np.finfo(dtype).eps
    for actual, expected in ((link.p.array, theta), (state['m'], m), (state['delta'], delta)):
        assert chainer.backend.get_device_from_array(actual) == device
        actual = chainer.get_device('@numpy').send(actual)
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=30 * rounding * scale)


def test_rmsprop_term_has_the_gain_of_the_momentum():
    # A constant gradient of 0.5: m -> g**2, Delta -> -(alpha_rmsprop / (|g| + eps)) g / (1 - mu1).
    link = link_of(np.zeros(1))
    optimizer = RMSpropWarmup(1.0, alpha_sgd=0.0, alpha_rmsprop=0.01).setup(link)
    for _ in range(4000):
        link.p.grad = np.full(1, 0.5)
        optimizer.update()
    np.testing.assert_allclose(link.p.update_rule.state['delta'], -0.1, rtol=1e-7)


def test_first_two_steps_by_hand():
    link = link_of(np.array([1.0]))
    optimizer = RMSpropWarmup(0.5, 0.25, 0.75, mu1=0.5, mu2=0.75, eps=1.0).setup(link)
    link.p.grad = np.array([2.0])
    optimizer.update()  # m = 1; Delta = -(0.25 + 0.75 / 2) 2 = -1.25; theta = 1 - 0.625
    np.testing.assert_array_equal(link.p.data, [0.375])
    link.p.grad = np.array([-2.0])
    optimizer.lr = 1.0  # outside the momentum: acts at once, on all of Delta
    optimizer.update()  # m = 0.75 + 1 = 1.75
    delta = 0.5 * -1.25 + (0.25 + 0.75 / (1.75**0.5 + 1)) * 2
    np.testing.assert_allclose(link.p.data, [0.375 + delta], rtol=1e-15)


def test_without_rmsprop_it_is_chainers_corrected_momentum_sgd():
    start, rng = arrays((50,), 'float64')
    ours, peer = link_of(start), link_of(start)
    optimizer = RMSpropWarmup(0.1, mu1=0.8).setup(ours)
    chainers = optimizers.CorrectedMomentumSGD(0.1, momentum=0.8).setup(peer)
    for step in range(100):
        optimizer.lr = chainers.lr = 0.1 / (1 + step)
        ours.p.grad = peer.p.grad = rng.standard_normal(50)
        optimizer.update()
        chainers.update()
    np.testing.assert_allclose(ours.p.data, peer.p.data, rtol=1e-12, atol=1e-14)


def test_without_sgd_and_momentum_it_is_chainers_rmsprop():
    start, rng = arrays((50,), 'float64')
    ours, peer = link_of(start), link_of(start)
    # Chainer's lr is eta * alpha_rmsprop, and its eps stands outside the root too
    # (eps_inside_sqrt=False).
    optimizer = RMSpropWarmup(0.5, alpha_sgd=0, alpha_rmsprop=0.02, mu1=0, eps=1e-2).setup(ours)
    chainers = optimizers.RMSprop(0.01, alpha=0.99, eps=1e-2).setup(peer)
    for _ in range(100):
        ours.p.grad = peer.p.grad = rng.standard_normal(50)
        optimizer.update()
        chainers.update()
    np.testing.assert_allclose(ours.p.data, peer.p.data, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('name', HYPERPARAMETERS)
def test_every_hyperparameter_reaches_the_rule(name):
    optimizer = RMSpropWarmup(**{'lr': 0.1, name: 0.125})
    link = link_of(np.ones(2))
    optimizer.setup(link)
    assert getattr(link.p.update_rule.hyperparam, name) == 0.125
    setattr(optimizer, name, 0.25)
    assert getattr(link.p.update_rule.hyperparam, name) == 0.25
    setattr(link.p.update_rule.hyperparam, name, 0.5)  # this parameter alone
    assert getattr(optimizer, name) == 0.25
    rule = RMSpropWarmupRule(**{'lr': 0.1, name: 0.125})
    assert getattr(rule.hyperparam, name) == 0.125


@pytest.mark.parametrize('name', HYPERPARAMETERS)
@pytest.mark.parametrize('value', [-0.1, float('nan'), float('inf'), True, np.True_, '1'])
def test_impossible_hyperparameters_are_errors(name, value):
    for optimizer in (RMSpropWarmup, RMSpropWarmupRule):
        with pytest.raises((ValueError, TypeError), match=name):
            optimizer(**{'lr': 0.1, name: value})


@pytest.mark.usefixtures('arithmetic')
@pytest.mark.parametrize('alpha_rmsprop', [0.0, 0.3])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_weight_decay_has_the_bits_of_chainers_hook(dtype, alpha_rmsprop):
    start, rng = arrays((7, 301), dtype)
    ours, peer = link_of(start), link_of(start)
    for link in (ours, peer):
        with link.init_scope():
            link.exempt = chainer.Parameter(start.copy())
    optimizer = RMSpropWarmup(0.1, alpha_rmsprop=alpha_rmsprop).setup(ours)
    ours.p.update_rule.hyperparam.weight_decay_rate = 0.037
    theirs = RMSpropWarmup(0.1, alpha_rmsprop=alpha_rmsprop).setup(peer)
    peer.p.update_rule.add_hook(WeightDecay(0.037))
    for _ in range(5):
        g = rng.standard_normal(start.shape).astype(dtype)
        for link in (ours, peer):
            link.p.grad, link.exempt.grad = g.copy(), g.copy()
        optimizer.update()
        theirs.update()
    np.testing.assert_array_equal(ours.p.grad, g)
    for name in ('p', 'exempt'):
        one, other = getattr(ours, name), getattr(peer, name)
        np.testing.assert_array_equal(one.array, other.array)
        for state in ('m', 'delta'):
            np.testing.assert_array_equal(
                one.update_rule.state[state], other.update_rule.state[state]
            )
    assert np.any(ours.p.array != ours.exempt.array)


def chain_of(rng, **shapes):
    chain = chainer.Chain()
    with chain.init_scope():
        for name, shape in shapes.items():
            setattr(chain, name, chainer.Parameter(rng.standard_normal(shape).astype('float32')))
    return chain


def changed_by(update, n_steps=4, prepare=lambda optimizer, chain: None, **shapes):
    """The optimizer and all arrays after some steps, each of which ends with ``update``."""
    rng = np.random.RandomState(0)
    chain = chain_of(rng, **(shapes or {'a': (), 'b': (0,), 'c': (3, 500), 'd': (70_000,)}))
    optimizer = RMSpropWarmup(0.1, alpha_rmsprop=0.3, weight_decay_rate=0.01).setup(chain)
    prepare(optimizer, chain)
    for _ in range(n_steps):
        for param in chain.params():
            param.grad = np.asarray(rng.standard_normal(param.shape), 'float32')
        update(optimizer)
    arrays = [p.array for p in chain.params()]
    for param in chain.params():
        if param.update_rule.state:
            arrays += [param.update_rule.state['m'], param.update_rule.state['delta']]
    return optimizer, arrays


@pytest.mark.skipif(not kernels.compiled, reason='no C compiler at the installation')
def test_all_parameters_in_one_call_and_one_after_the_other_are_the_same(monkeypatch):
    def prepare(optimizer, chain):
        chain.c.update_rule.hyperparam.weight_decay_rate = 0
        chain.c.update_rule.hyperparam.lr = 0.2
        chain.a.update_rule.hyperparam.weight_decay_rate = 0.5
        chain.a.update_rule.hyperparam.lr = 0.3
        chain.d.update_rule.enabled = False

    calls, in_c = [], kernels.rmsprop_warmup
    monkeypatch.setattr(
        kernels,
        'rmsprop_warmup',
        lambda arrays, *rest: calls.append(len(arrays)) or in_c(arrays, *rest),
    )
    optimizer, together = changed_by(RMSpropWarmup.update, prepare=prepare)
    assert calls == [4] * 3 + [12] * 3  # the first makes the state; d is disabled
    optimizers_t, rules_t = optimizer.t, [p.update_rule.t for p in optimizer.target.params()]
    optimizer, alone = changed_by(chainer.GradientMethod.update, prepare=prepare)
    assert optimizers_t == optimizer.t == 4
    assert rules_t == [p.update_rule.t for p in optimizer.target.params()] == [4, 4, 4, 0]
    for one, other in zip(together, alone):
        np.testing.assert_array_equal(one, other)
    assert len(together) == len(alone) == 4 + 3 * 2


def test_a_gradient_that_is_missing_is_zeros_as_everywhere_in_chainer():
    def clearing(update):
        def clear_one(optimizer):
            optimizer.target.b.cleargrad()
            update(optimizer)

        return clear_one

    _, ours = changed_by(clearing(RMSpropWarmup.update), a=(2,), b=(3,))
    _, chainers = changed_by(clearing(chainer.GradientMethod.update), a=(2,), b=(3,))
    for one, other in zip(ours, chainers):
        np.testing.assert_array_equal(one, other)


def test_parameters_of_two_dtypes_are_updated_in_theirs():
    rng = np.random.RandomState(0)
    chain = chain_of(rng, a=(70,))
    with chain.init_scope():
        chain.double = chainer.Parameter(chain.a.array.astype(np.float64))
    optimizer = RMSpropWarmup(0.1, alpha_rmsprop=0.3).setup(chain)
    for _ in range(3):
        chain.a.grad = rng.standard_normal(70).astype(np.float32)
        chain.double.grad = chain.a.grad.astype(np.float64)
        optimizer.update()
    assert (chain.a.dtype, chain.double.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(chain.a.array, chain.double.array, rtol=1e-4, atol=1e-5)


def test_a_loss_function_gives_the_gradients():
    link = link_of(np.array([1.0, -2.0]))
    optimizer = RMSpropWarmup(0.5).setup(link)
    for _ in range(2):
        optimizer.update(lambda factor: chainer.functions.sum(factor * link.p), 3.0)
    np.testing.assert_allclose(link.p.array, [1 - 0.5 * (3 + 5.7), -2 - 0.5 * (3 + 5.7)])


class OtherRule(RMSpropWarmupRule):
    def update_core_cpu(self, param):
        param.array[...] = self.t


def test_what_a_rule_or_an_optimizer_was_given_still_acts():
    called = []

    def on_a_rule(optimizer, chain):
        chain.a.update_rule.add_hook(lambda rule, param: called.append(param.name), 'of a rule')

    def after_a_rule(optimizer, chain):
        chain.a.update_rule.add_hook(
            lambda rule, param: called.append(param.name), 'after', timing='post'
        )

    def on_the_optimizer(optimizer, chain):
        optimizer.add_hook(lambda optimizer: called.append('optimizer'), 'of the optimizer')

    def after_the_optimizer(optimizer, chain):
        optimizer.add_hook(lambda optimizer: called.append('after'), 'after', timing='post')

    for prepare, expected in (
        (on_a_rule, ['a'] * 3),
        (after_a_rule, ['a'] * 3),
        (on_the_optimizer, ['optimizer'] * 3),
        (after_the_optimizer, ['after'] * 3),
    ):
        called.clear()
        changed_by(RMSpropWarmup.update, 3, prepare, a=(2,), b=(3,))
        assert called == expected

    def another_rule(optimizer, chain):
        chain.b.update_rule = OtherRule(optimizer.hyperparam)

    _, (_, b, *_) = changed_by(RMSpropWarmup.update, 3, another_rule, a=(2,), b=(3,))
    np.testing.assert_array_equal(b, [3, 3, 3])

    def loss_scale(optimizer, chain):
        for param in chain.params():
            param._loss_scale = 8

    _, scaled = changed_by(RMSpropWarmup.update, 3, loss_scale, a=(2,), b=(3,))
    _, expected = changed_by(chainer.GradientMethod.update, 3, loss_scale, a=(2,), b=(3,))
    for one, other in zip(scaled, expected):
        np.testing.assert_array_equal(one, other)

    def dynamic_loss_scaling(optimizer, chain):
        optimizer.loss_scaling()

    optimizer, _ = changed_by(RMSpropWarmup.update, 3, dynamic_loss_scaling, a=(2,))
    assert optimizer._loss_scale == 8  # doubled in every step


def everything_of(optimizer):
    """Copies of the parameters and of the state, and the counts of the updates."""
    arrays, counts = [], [optimizer.t]
    for param in optimizer.target.params():
        arrays.append(np.array(param.array))
        counts.append(param.update_rule.t)
        arrays += [np.array(array) for array in (param.update_rule.state or {}).values()]
    return arrays, counts


def assert_unchanged(optimizer, before):
    arrays, counts = everything_of(optimizer)
    assert counts == before[1]
    for one, other in zip(arrays, before[0]):
        np.testing.assert_array_equal(one, other)


def in_one_call(optimizer):
    optimizer.update()


def in_a_loop(optimizer):
    optimizer.target.a.update_rule.add_hook(lambda rule, param: None, 'hook')
    optimizer.update()


def with_a_loss_function(optimizer):
    optimizer.update(lambda: sum(chainer.functions.sum(p * p) for p in optimizer.target.params()))


UPDATES = [in_one_call, in_a_loop, with_a_loss_function]


@pytest.mark.usefixtures('arithmetic')
@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('name', ['m', 'delta'])
@pytest.mark.parametrize('shape', [(2,), (3, 4), (12,), (2, 4, 3), ()])
def test_state_of_another_shape_is_an_error_and_changes_nothing(update, name, shape):
    optimizer, _ = changed_by(RMSpropWarmup.update, 1, a=(5,), b=(4, 3))
    optimizer.target.b.update_rule.state[name] = np.zeros(shape, np.float32)
    before = everything_of(optimizer)
    message = f"the state '{name}' of the parameter /b has the shape .* the parameter has .4, 3."
    with pytest.raises(ValueError, match=message):
        update(optimizer)
    assert_unchanged(optimizer, before)


@pytest.mark.usefixtures('arithmetic')
@pytest.mark.parametrize('shape', [(1, 3), (3,), (3, 4)])
def test_a_gradient_of_another_shape_is_an_error_and_changes_nothing(shape):
    optimizer, _ = changed_by(RMSpropWarmup.update, 1, a=(5,), b=(4, 3))
    optimizer.target.b._grad = np.ones(shape, np.float32)  # or param.array is set after backward
    before = everything_of(optimizer)
    with pytest.raises(ValueError, match='the gradient of the parameter /b has the shape'):
        optimizer.update()
    assert_unchanged(optimizer, before)


def from_a_buffer(array, folder):
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


def from_a_mapped_file(array, folder):
    np.save(folder / 'array.npy', array)
    return np.load(folder / 'array.npy', mmap_mode='r')


def made_read_only(array, folder):
    array = np.asfortranarray(array)
    array.flags.writeable = False
    return array


READ_ONLY = [from_a_buffer, from_a_mapped_file, made_read_only]


@pytest.mark.usefixtures('arithmetic')
@pytest.mark.parametrize('make', READ_ONLY)
@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('n_before', [0, 2])
def test_a_parameter_that_is_read_only_is_an_error_and_changes_nothing(
    tmp_path, make, update, n_before
):
    optimizer, _ = changed_by(RMSpropWarmup.update, n_before, a=(5,), b=(4, 3))
    optimizer.target.cleargrads()
    link = optimizer.target
    link.b.array = make(link.b.array, tmp_path)
    before = everything_of(optimizer)
    with pytest.raises(ValueError, match='the parameter /b is read-only.* Set a copy'):
        update(optimizer)
    assert_unchanged(optimizer, before)
    link.b.array = link.b.array.copy()  # the remedy
    update = with_a_loss_function
    update(optimizer)
    assert optimizer.t == n_before + 1


@pytest.mark.usefixtures('arithmetic')
@pytest.mark.parametrize('make', READ_ONLY)
@pytest.mark.parametrize('name', ['m', 'delta'])
def test_state_that_is_read_only_is_an_error(tmp_path, make, name):
    optimizer, _ = changed_by(RMSpropWarmup.update, 1, a=(5,), b=(4, 3))
    state = optimizer.target.b.update_rule.state
    state[name] = make(state[name], tmp_path)
    with pytest.raises(ValueError, match=f"the state '{name}' of the parameter /b is read-only"):
        optimizer.update()


@pytest.mark.usefixtures('arithmetic')
@pytest.mark.parametrize('make', READ_ONLY)
def test_gradients_may_be_read_only(tmp_path, make):
    def set_gradient(optimizer, gradient):
        optimizer.target.b.grad = gradient
        optimizer.update()

    gradient = np.random.RandomState(3).standard_normal((4, 3)).astype(np.float32)
    optimizers = [changed_by(RMSpropWarmup.update, 2, a=(5,), b=(4, 3))[0] for _ in range(2)]
    set_gradient(optimizers[0], gradient)
    read_only = make(gradient, tmp_path)
    set_gradient(optimizers[1], read_only)
    assert_unchanged(optimizers[1], everything_of(optimizers[0]))
    np.testing.assert_array_equal(read_only, gradient)


@pytest.mark.usefixtures('arithmetic')
@pytest.mark.parametrize('kind', ['unaligned', 'strided', 'reversed', 'big-endian'])
@pytest.mark.parametrize('what', ['array', 'grad', 'm', 'delta'])
def test_arrays_that_lie_otherwise_in_memory(kind, what):
    def otherwise(array):
        if kind == 'unaligned':
            memory = np.zeros(array.nbytes + 1, np.uint8)
            result = memory[1:].view(array.dtype).reshape(array.shape)
        elif kind == 'strided':
            result = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)[..., ::2]
        elif kind == 'reversed':
            result = np.zeros(array.shape, array.dtype)[::-1]
        else:
            result = np.zeros(array.shape, array.dtype.newbyteorder('>'))
        result[...] = array
        return result

    gradient = np.random.RandomState(3).standard_normal((400, 3)).astype(np.float32)
    plain, other = (changed_by(RMSpropWarmup.update, 2, a=(5,), b=(400, 3))[0] for _ in range(2))
    plain.target.b.grad, other.target.b.grad = gradient, gradient.copy()
    param = other.target.b
    if what == 'array':
        param._data[0] = otherwise(param.array)  # the setter would refuse a big-endian one
    elif what == 'grad':
        param._grad = otherwise(param.grad)
    else:
        param.update_rule.state[what] = otherwise(param.update_rule.state[what])
    for optimizer in (plain, other):
        optimizer.update()
    assert_unchanged(other, everything_of(plain))


@pytest.mark.parametrize('scale', [None, 8])
def test_a_gradient_that_two_parameters_share(scale):
    """As in the same model with gradients of their own; Chainer divides it by the loss scale."""
    link = chainer.Link()
    with link.init_scope():
        link.b1, link.b2, link.w = (
            chainer.Parameter(np.full((1, n), 2, np.float32)) for n in (3, 3, 1)
        )
    optimizer = RMSpropWarmup(0.5, alpha_rmsprop=0.1).setup(link)
    if scale:
        optimizer.set_loss_scale(scale)
    x = np.array([[1, 2, 3]], np.float32)
    for _ in range(3):
        optimizer.update(lambda: chainer.functions.sum((x + link.b1 + link.b2) * link.w.array))
    np.testing.assert_array_equal(link.b1.array, link.b2.array)
    alone = link_of(np.full((1, 3), 2, np.float32))
    its_optimizer = RMSpropWarmup(0.5, alpha_rmsprop=0.1).setup(alone)
    for _ in range(3):
        its_optimizer.update(lambda: chainer.functions.sum(alone.p * 2))
    np.testing.assert_array_equal(link.b1.array, alone.p.array)


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_loss_scales_do_not_change_the_result(dtype):
    results = []
    for scale in (None, 'dynamic', 2**7):
        start, _ = arrays((5, 4), dtype)
        link = link_of(start)
        optimizer = RMSpropWarmup(0.1, alpha_rmsprop=0.1, weight_decay_rate=0.01, eps=1e-3)
        optimizer.use_fp32_update()
        optimizer.setup(link)
        if scale == 'dynamic':
            optimizer.loss_scaling()
        elif scale:
            optimizer.set_loss_scale(scale)
        for _ in range(4):
            optimizer.update(lambda: chainer.functions.sum(link.p * link.p * 2))  # noqa: B023
        assert optimizer.t == link.p.update_rule.t == 4
        results.append(link.p.array)
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)


def test_dynamic_loss_scaling_leaves_out_an_update_that_overflows():
    link = link_of(np.ones(3, np.float32))
    optimizer = RMSpropWarmup(0.1).setup(link)
    optimizer.loss_scaling()
    optimizer._loss_scale = 4.0
    with pytest.warns(UserWarning, match='Non finite'):
        optimizer.update(lambda: chainer.functions.sum(link.p * np.float32(np.inf)))
    np.testing.assert_array_equal(link.p.array, 1)
    assert optimizer._loss_scale == 2


@pytest.mark.skipif(not kernels.compiled, reason='no C compiler at the installation')
def test_a_loss_function_does_not_keep_the_update_from_one_call(monkeypatch):
    calls, in_c = [], kernels.rmsprop_warmup
    monkeypatch.setattr(
        kernels,
        'rmsprop_warmup',
        lambda arrays, *rest: calls.append(len(arrays)) or in_c(arrays, *rest),
    )
    changed_by(with_a_loss_function, 3, a=(2,), b=(3,))
    assert calls == [4, 4, 8, 8]  # the first update makes the state


def test_use_cleargrads_of_chainer_still_acts():
    link = link_of(np.ones(2, np.float32))
    optimizer = RMSpropWarmup(0.1).setup(link)
    with pytest.warns(DeprecationWarning, match='use_cleargrads'):
        optimizer.use_cleargrads(False)
    with pytest.warns(DeprecationWarning, match='zerograds'):
        optimizer.update(lambda: chainer.functions.sum(link.p * 2))


def test_missing_gradient_and_disabled_rule_change_nothing():
    start, _ = arrays((7,), 'float32')
    link = link_of(start)
    with link.init_scope():
        link.uninitialized = chainer.Parameter()
        link.disabled = chainer.Parameter(start.copy())
    optimizer = RMSpropWarmup(0.1).setup(link)
    link.cleargrads()
    link.disabled.update_rule.enabled = False
    link.disabled.grad = start
    optimizer.update()
    np.testing.assert_array_equal(link.disabled.data, start)
    np.testing.assert_array_equal(link.p.data, start)
    assert optimizer.t == 1


def test_a_parameter_that_gets_its_size_later_starts_then():
    link = chainer.links.Linear(None, 1, nobias=True, initialW=np.ones((1, 2)))
    optimizer = RMSpropWarmup(0.5).setup(link)
    link.cleargrads()
    optimizer.update()
    link(np.zeros((1, 2), np.float32))
    link.W.grad = np.full((1, 2), 2, np.float32)
    optimizer.update()
    np.testing.assert_array_equal(link.W.array, [[0, 0]])


def test_float16_with_float32_masters(device):
    start, rng = arrays((100,), 'float16')
    link = link_of(start)
    link.to_device(device)
    optimizer = RMSpropWarmup(1e-4, alpha_rmsprop=0.1)
    optimizer.use_fp32_update()
    optimizer.setup(link)
    theta, m, delta = start.astype(np.float64), 0.0, 0.0
    for _ in range(50):
        g = rng.standard_normal(100).astype('float16')
        link.p.grad = device.send(g)
        optimizer.update()
        theta, m, delta = equations(
            theta, m, delta, g.astype(np.float64), 1e-4, 1.0, 0.1, 0.9, 0.99, 1e-8
        )
    assert link.p.update_rule.state['m'].dtype == np.float32
    # Updates of 1e-4 vanish in float16 itself; from float32 masters the result is the rounded exact
    # one.
    link.to_device('@numpy')
    assert np.mean(link.p.data == theta.astype('float16')) > 0.98


def test_eps_that_vanishes_is_an_error():
    link = link_of(np.ones(3, np.float16))
    optimizer = RMSpropWarmup(0.1).setup(link)
    link.p.grad = np.ones(3, np.float16)
    with pytest.raises(ValueError, match='eps = 1e-08 .* zero in float16'):
        optimizer.update()


def test_state_is_saved_and_loaded(tmp_path):
    start, rng = arrays((5,), 'float32')
    link = link_of(start)
    optimizer = RMSpropWarmup(0.1, alpha_rmsprop=0.3).setup(link)
    gradients = rng.standard_normal((4, 5)).astype('float32')
    for g in gradients[:2]:
        link.p.grad = g
        optimizer.update()
    chainer.serializers.save_npz(tmp_path / 'model.npz', link)
    chainer.serializers.save_npz(tmp_path / 'optimizer.npz', optimizer)
    resumed = link_of(np.zeros(5, np.float32))
    second = RMSpropWarmup(0.1, alpha_rmsprop=0.3).setup(resumed)
    chainer.serializers.load_npz(tmp_path / 'model.npz', resumed)
    chainer.serializers.load_npz(tmp_path / 'optimizer.npz', second)
    for g in gradients[2:]:
        for each, its_link in ((optimizer, link), (second, resumed)):
            its_link.p.grad = g
            each.update()
    np.testing.assert_array_equal(link.p.data, resumed.p.data)
    for name in ('m', 'delta'):
        np.testing.assert_array_equal(
            link.p.update_rule.state[name], resumed.p.update_rule.state[name]
        )
    assert second.t == 4


def test_package_exports_the_public_names():
    for name in extensions.__all__:
        assert hasattr(extensions, name)


C_PROGRAM = """
#include <tgmath.h>
typedef %s T;
void update(long n, const T *grad_, T lr, T alpha_sgd, T alpha_rmsprop, T mu1, T mu2,
            T one_minus_mu2, T eps, T weight_decay_rate, T *param_, T *m_, T *delta_) {
    for (long i = 0; i < n; i++) {
        T grad = grad_[i], param = param_[i], m = m_[i], delta = delta_[i];
        %s
        param_[i] = param, m_[i] = m, delta_[i] = delta;
    }
}
"""


@pytest.mark.parametrize('alpha_rmsprop, weight_decay_rate', [(0.0, 0.02), (0.3, 0.0), (0.3, 0.02)])
@pytest.mark.parametrize('dtype, c_type', [('float32', 'float'), ('float64', 'double')])
def test_body_of_the_cuda_kernel_run_on_the_host(
    tmp_path, dtype, c_type, alpha_rmsprop, weight_decay_rate
):
    """The kernel's text as it stands, through the host's C compiler, against the equations."""
    compiler = shutil.which('cc')
    if compiler is None:
        pytest.skip('no C compiler')
    source, library = tmp_path / 'update.c', tmp_path / 'update.so'
    source.write_text(C_PROGRAM % (c_type, rmsprop_warmup.ELEMENT))
    subprocess.run(
        [compiler, '-O1', '-ffp-contract=off', '-shared', '-fPIC', source, '-o', library, '-lm'],
        check=True,
    )
    scalar = {'float': ctypes.c_float, 'double': ctypes.c_double}[c_type]
    update = ctypes.CDLL(str(library)).update
    rng = np.random.RandomState(0)
    tiny = float(np.finfo(dtype).tiny)
    grad = np.concatenate([rng.standard_normal(997), [0.0, -0.0, tiny / 8, 1e15, -1e15]])
    state = [rng.standard_normal(1002), rng.uniform(size=1002) ** 4, rng.standard_normal(1002)]
    state[1][-5:] = 0
    grad, *state = (np.asarray(array, dtype) for array in (grad, *state))
    scalars = (0.1, 0.7, alpha_rmsprop, 0.9, 0.99, 1 - 0.99, 1e-8, weight_decay_rate)
    theta, m, delta = equations(
        *(a.astype(np.float64) for a in (*state, grad)), *scalars[:5], *scalars[6:]
    )
    pointer = ctypes.POINTER(scalar)
    update(
        ctypes.c_long(len(grad)),
        grad.ctypes.data_as(pointer),
        *map(scalar, scalars),
        *(array.ctypes.data_as(pointer) for array in state),
    )
    for actual, expected in zip(state, (theta, m, delta)):
        scale = np.abs(expected) + (1 if expected is not m else 0)
        assert np.max(np.abs(actual - expected) / (scale + tiny)) < 20 * np.finfo(dtype).eps
