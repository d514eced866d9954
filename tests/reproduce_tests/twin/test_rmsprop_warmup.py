"""The twin's update rule against the equations, written out in float64."""

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import numpy as np
import pytest

torch = pytest.importorskip('torch')
from reproduce.twin.rmsprop_warmup import RMSpropWarmup

SHAPES = ((3, 5), (7,), (2, 3, 2))


def equations(theta, gradients, values, decay):
    """theta, m and Delta after these steps."""
    m = np.zeros_like(theta)
    delta = np.zeros_like(theta)
    for g, (lr, a, r, mu1, mu2, eps) in zip(gradients, values):
        g = g + decay * theta
        m = mu2 * m + (1 - mu2) * g**2  # [W1]
        delta = mu1 * delta - (a + r / (np.sqrt(m) + eps)) * g  # [W2]
        theta = theta + lr * delta  # [W3]
    return theta, m, delta


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_sixty_steps_follow_the_equations(dtype):
    rng = np.random.RandomState(0)
    values = [
        (0.1 + 0.01 * i, min(1, 0.02 * i), max(0, 1 - 0.02 * i) * 3e-3, 0.87, 0.93, 2e-4)
        for i in range(60)
    ]
    start = [rng.normal(size=shape) for shape in SHAPES]
    gradients = [[rng.normal(0, 1e-3, shape) for shape in SHAPES] for _ in values]
    kind = getattr(torch, dtype)
    params = [torch.nn.Parameter(torch.tensor(a, dtype=kind)) for a in start]
    optimizer = RMSpropWarmup(
        [{'params': params[:2], 'weight_decay': 0.05}, {'params': params[2:]}], 0.1
    )
    names = ('lr', 'alpha_sgd', 'alpha_rmsprop', 'mu1', 'mu2', 'eps')
    for step, now in enumerate(values):
        for group in optimizer.param_groups:
            group.update(zip(names, now))
        for param, g in zip(params, gradients[step]):
            param.grad = torch.tensor(g, dtype=kind)
        optimizer.step()
    tolerance = {'float32': 3e-6, 'float64': 1e-13}[dtype]
    for i, param in enumerate(params):
        decay = 0.05 if i < 2 else 0
        expected = equations(start[i], [g[i] for g in gradients], values, decay)
        found = (param.detach(), optimizer.state[param]['m'], optimizer.state[param]['delta'])
        for one, other in zip(found, expected):
            assert np.abs(one.numpy() - other).max() < tolerance * np.abs(other).max()


def test_one_step_of_chainers_rule():
    """The same numbers as extensions.RMSpropWarmup, but for the last bit."""
    import chainer

    rng = np.random.RandomState(1)
    start, g = (rng.normal(size=(50, 40)).astype('f') for _ in range(2))
    options = {'alpha_sgd': 0.2, 'alpha_rmsprop': 0.03, 'mu1': 0.8, 'mu2': 0.95, 'eps': 1e-3}
    link = chainer.Link()
    with link.init_scope():
        link.W = chainer.Parameter(start.copy())
    chainers = extensions.RMSpropWarmup(0.1, **options).setup(link)
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    ours = RMSpropWarmup([param], 0.1, **options)
    for _ in range(3):
        link.W.grad, param.grad = g.copy(), torch.from_numpy(g.copy())
        chainers.update()
        ours.step()
    np.testing.assert_allclose(param.detach().numpy(), link.W.array, rtol=1e-6, atol=1e-6)
    state = link.W.update_rule.state
    np.testing.assert_allclose(ours.state[param]['m'].numpy(), state['m'], rtol=1e-6)
    np.testing.assert_allclose(ours.state[param]['delta'].numpy(), state['delta'], rtol=3e-6)


def test_a_closure_and_a_parameter_without_a_gradient():
    one, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = RMSpropWarmup([one, other], 0.5)

    def closure():
        optimizer.zero_grad()
        loss = (3 * one).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6
    assert one.tolist() == [-0.5, -0.5] and other.tolist() == [1, 1]
    assert list(optimizer.state) == [one]


@pytest.mark.parametrize(
    'wrong', [{'mu1': 1}, {'mu2': -0.1}, {'eps': float('nan')}, {'lr': -1}, {'alpha_sgd': -2}]
)
def test_impossible_values_are_errors(wrong):
    param = torch.nn.Parameter(torch.ones(2))
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        RMSpropWarmup([param], **{'lr': 0.1, **wrong})
    if name != 'lr':
        with pytest.raises(ValueError, match=name):
            RMSpropWarmup([{'params': [param], **wrong}], 0.1)
