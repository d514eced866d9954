"""The two trainings compute the same numbers, and a mistake on either side is seen."""

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import json

import chainer
import numpy as np
import pytest

torch = pytest.importorskip('torch')
import reproduce.settings
from extensions import exact_mpi, kernels, rmsprop_warmup, schedules
from reproduce import dataset
from reproduce.twin import compare, records
from reproduce.twin import resnet50 as twin_resnet50
from reproduce.twin import train as twin
from reproduce.twin.virtual_workers import VirtualWorkers, rounded_once

SMALL = '--preset smoke --workers 4 --loader serial --width 4 --local-batch-size 8'


@pytest.fixture(autouse=True)
def one_thread_and_group(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture
def small(shallow, monkeypatch):
    """Both networks with one block in each stage."""
    monkeypatch.setattr(twin_resnet50, 'BLOCKS', dict.fromkeys(twin_resnet50.BLOCKS, 1))


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp('digits') / 'digits'
    dataset.write_digits(root)
    return f'--train-root {root}/train --val-root {root}/val'


@pytest.fixture
def compared(tmp_path, digits):
    def run(words='', n_iterations=3, restart=True):
        settings = records.parse(f'{SMALL} {digits} {words}'.split(), 1)
        return compare.run(settings, n_iterations, restart, tmp_path / 'out')

    return run


@pytest.mark.slow
@pytest.mark.parametrize('form', ['printed', 'continuous'])
@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_fifty_iterations_agree_one_by_one(small, compared, form, dtype):
    """Through the whole transition. Beside single ReLUs, which make the limits fluctuate, the
    twin is as far from Chainer as Chainer's own functions are."""
    words = f'--alpha-form {form} --allreduce-grad-dtype {dtype} --epochs 6'
    result = compared(words, 50)
    rows = result['iterations']
    assert result['parted'] is None, compare.verdict(result)
    alphas = [row['alpha_sgd'] for row in rows]
    assert alphas[0] < 0.01 and alphas[-1] == 1 and len(set(alphas)) > 35
    for name in rows[0]['distance']:
        distances = [row['distance'][name] for row in rows]
        ratios = [compare.LIMIT * row['distance'][name] / row['limit'][name] for row in rows]
        assert np.median(ratios) < 2, name
        # Far below what any mistake changes.
        most = {'losses': 1e-6, 'BN mean': 1e-5, 'BN variance': 1e-5}.get(name, 1e-2)
        assert np.median(distances) < most, name


@pytest.mark.slow
def test_a_free_run_parts_as_fast_as_another_order_of_sums(compared, tmp_path, capsys):
    """With all blocks. The first iteration agrees to rounding; after some, nothing is left."""
    result = compared('', 12, restart=False)
    first, *_, last = result['iterations']
    assert result['parted'] is None, compare.verdict(result)
    assert first['distance']['losses'] < 1e-6 and first['distance']['gradient'] < 1e-2
    assert last['distance']['gradient'] > 0.1 and last['rounding']['gradient'] > 0.1
    judged = [row['limit']['gradient'] is not None for row in result['iterations']]
    assert judged[0] and not judged[-1]
    assert 'iterations can be compared' in compare.verdict(result)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = next(line for line in lines if line[0] == '12')
    assert [float(x) for x in shown[1:3]] == [round(last[k], 6) for k in ('loss', 'twin loss')]
    assert float(shown[5]) == pytest.approx(last['alpha_rmsprop'], rel=1e-3)
    assert float(shown[8]) == pytest.approx(last['largest']['parameters'], rel=0.06)
    shown = compare.distances(result['iterations']).splitlines()[-1].split()
    assert shown[1] == f'{last["distance"]["losses"]:.1e}'
    written = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    assert written['iterations'] == result['iterations']
    assert (tmp_path / 'out' / 'compare.png').stat().st_size > 10_000


# ---------------------------------------------------------------- mistakes on one side


def rule_in_numpy(step):
    """A mistaken rule for Chainer: ``step(g, p, m, delta, values)`` changes the arrays in place."""

    def update_all(arrays, values):
        for i, one in enumerate(values):
            lr, a, r, mu1, mu2, _, eps, decay = one
            g, p, m, delta = arrays[4 * i : 4 * i + 4]
            step(g + np.float32(decay) * p, p, m, delta, lr, a, r, mu1, mu2, eps)
        return True

    return update_all


def rule_in_torch(step):
    class Mistaken(twin.RMSpropWarmup):
        def _update(self, params, lr, alpha_sgd, alpha_rmsprop, mu1, mu2, eps, weight_decay):
            for p in params:
                if not self.state[p]:
                    self.state[p].update(m=torch.zeros_like(p), delta=torch.zeros_like(p))
                m, delta = self.state[p]['m'], self.state[p]['delta']
                g = p.grad + weight_decay * p
                step(g, p, m, delta, lr, alpha_sgd, alpha_rmsprop, mu1, mu2, eps)

    return Mistaken


def right(g, p, m, delta, lr, a, r, mu1, mu2, eps):
    m[...] = mu2 * m + (1 - mu2) * g**2
    delta[...] = mu1 * delta - (a + r / (m**0.5 + eps)) * g
    p[...] = p + lr * delta


def swapped(g, p, m, delta, lr, a, r, mu1, mu2, eps):
    right(g, p, m, delta, lr, a, r, mu2, mu1, eps)


def eps_inside_the_root(g, p, m, delta, lr, a, r, mu1, mu2, eps):
    m[...] = mu2 * m + (1 - mu2) * g**2
    delta[...] = mu1 * delta - (a + r / (m + eps) ** 0.5) * g
    p[...] = p + lr * delta


def lr_inside_the_momentum(g, p, m, delta, lr, a, r, mu1, mu2, eps):
    m[...] = mu2 * m + (1 - mu2) * g**2
    delta[...] = mu1 * delta - lr * (a + r / (m**0.5 + eps)) * g
    p[...] = p + delta


RULES = {
    'mu1 and mu2 swapped': swapped,
    'eps inside the root': eps_inside_the_root,
    'lr inside the momentum': lr_inside_the_momentum,
}


def put_rule(step, side, monkeypatch):
    if side == 'Chainer':
        monkeypatch.setattr(rmsprop_warmup, '_update_all', rule_in_numpy(step))
    else:
        monkeypatch.setattr(twin, 'RMSpropWarmup', rule_in_torch(step))


@pytest.mark.parametrize('side', ['Chainer', 'PyTorch'])
def test_the_rule_put_in_without_a_mistake_agrees(small, compared, monkeypatch, side):
    put_rule(right, side, monkeypatch)
    assert compared(n_iterations=8)['parted'] is None


@pytest.mark.parametrize('mistake', RULES)
@pytest.mark.parametrize('side', ['Chainer', 'PyTorch'])
def test_a_mistake_in_the_rule_is_seen(small, compared, monkeypatch, side, mistake):
    put_rule(RULES[mistake], side, monkeypatch)
    parted = compared()['parted']
    # In the first iteration Chainer's rule runs parameter by parameter, without the mistake.
    assert parted['iteration'] <= 2 and parted['quantity'] in ('parameters', 'm', 'Delta'), parted


@pytest.mark.parametrize('side', ['Chainer', 'PyTorch'])
def test_the_missing_half_of_alpha_is_seen(small, compared, monkeypatch, side):
    module = schedules if side == 'Chainer' else reproduce.settings
    alpha_sgd = schedules.alpha_sgd
    monkeypatch.setattr(module, 'alpha_sgd', lambda *words: 2 * alpha_sgd(*words))
    parted = compared()['parted']
    assert parted == {'iteration': 1, 'quantity': 'lr or alpha', 'beyond': 3}


@pytest.mark.parametrize('side', ['Chainer', 'PyTorch'])
def test_biased_variances_are_seen(small, compared, monkeypatch, side):
    if side == 'Chainer':
        forward = chainer.links.BatchNormalization.forward

        def biased(self, x):
            y = forward(self, x)
            m = x.size // x.shape[1]
            self.avg_var *= (m - 1) / m
            return y

        monkeypatch.setattr(chainer.links.BatchNormalization, 'forward', biased)
    else:
        forward = torch.nn.BatchNorm2d.forward

        def biased(self, x):
            y = forward(self, x)
            if self.training:
                m = x.numel() // x.shape[1]
                self.running_var.data *= (m - 1) / m
            return y

        monkeypatch.setattr(torch.nn.BatchNorm2d, 'forward', biased)
    parted = compared()['parted']
    assert (parted['iteration'], parted['quantity']) == (1, 'BN variance'), parted


@pytest.mark.parametrize('side', ['Chainer', 'PyTorch'])
def test_a_division_before_the_sum_is_seen(small, compared, monkeypatch, side):
    """In float16: the smallest gradients become zero before they are added."""
    if side == 'Chainer':
        add, mean = exact_mpi.HalfPrecisionMpiCommunicator.add_grad, kernels.mean

        def add_fourth(self, model, zero_fill=False):
            for param in model.params():
                param.grad = param.grad / np.float32(4)
            add(self, model, zero_fill)

        monkeypatch.setattr(exact_mpi.HalfPrecisionMpiCommunicator, 'add_grad', add_fourth)
        monkeypatch.setattr(
            kernels, 'mean', lambda rows, n, target, *own: mean(rows, 1, target, *own)
        )
    else:

        class Early(VirtualWorkers):
            def add_worker(self):
                for param in self._params:
                    param.grad /= 4
                super().add_worker()

            def mean_grad(self):
                self._sum *= 4  # undoes the division after the sum
                super().mean_grad()

        monkeypatch.setattr(twin, 'VirtualWorkers', Early)
    result = compared()
    assert result['parted'] is not None
    for row in result['iterations'][1:]:
        assert row['distance']['elements'] > 2 * row['limit']['elements']


# ---------------------------------------------------------------- the limits, and the command


def row_of(distance, rounding, alpha=True):
    names = ('losses', *compare.QUANTITIES, 'elements')
    return {
        'equal schedules': alpha,
        'distance': dict.fromkeys(names, distance),
        'rounding': dict.fromkeys(names, rounding),
    }


def found(rows, restart):
    rows = [{'iteration': k + 1, **row} for k, row in enumerate(rows)]
    compare.add_limits(rows, restart)
    return compare.parted(rows)


def test_limits():
    level = compare.ROUNDING
    near, far = row_of(9e-5, 1e-5), row_of(11e-5, 1e-5)
    assert found([row_of(9 * level, 0)], True) is None
    assert found([row_of(11 * level, 0)], True)['iteration'] == 1
    # With restarts, the same iteration counts, and a quarter may be beyond.
    assert found([near, row_of(9e-3, 1e-3)], True) is None
    assert found([row_of(1e-3, 1e-3), far], True)['iteration'] == 2
    assert found([near, far, near, near], True) is None
    parted = found([near, far, near, near, far], True)
    assert (parted['iteration'], parted['beyond']) == (2, 2)
    assert (parted['distance'], parted['limit']) == (11e-5, pytest.approx(1e-4))
    assert found([row_of(float('nan'), 1e-5)], True)['iteration'] == 1
    # Without, the twin may be twice as fast, and nothing is judged after Chainer has parted.
    rows = [row_of(1e-6, 1e-6), row_of(9e-3, 1e-5), row_of(5e-3, 1e-3), row_of(2, 0.2)]
    assert found(rows, False) is None
    assert found([rows[0], row_of(2e-2, 1e-5), *rows[2:]], False)['iteration'] == 2
    assert found([row_of(2e-5, 1e-6), *rows[1:]], False)['iteration'] == 1
    assert found([row_of(3, 0.2), row_of(2, 0.2)], False)['iteration'] == 1
    # lr and the alphas are equal in each iteration, whether it is judged or not.
    assert found([*rows, row_of(2, 0.2, alpha=False)], False)['quantity'] == 'lr or alpha'


def test_other_initial_values_are_an_error(small, compared, monkeypatch):
    monkeypatch.setattr(twin_resnet50.ResNet50, '_initialize', lambda self, rng: None)
    with pytest.raises(ValueError, match='initial values'):
        compared()


def test_images_are_normalized_to_the_same_bits():
    from types import SimpleNamespace

    from reproduce import images

    pixels = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    training = SimpleNamespace(device=torch.device('cpu'))
    x, t = twin.Training.convert(training, (pixels, np.arange(3, dtype=np.int32)))
    assert np.array_equal(x.numpy(), images.normalize(pixels)) and t.tolist() == [0, 1, 2]


def test_exact_means_are_those_of_the_communicator():
    """By add_grad and mean_grad of both, for gradients of all sizes."""
    from mpi4py import MPI

    comm = extensions.create_communicator('mpi', mpi_comm=MPI.COMM_SELF)
    rng = np.random.RandomState(0)
    link, model = chainer.Link(), torch.nn.Module()
    with link.init_scope():
        link.W = chainer.Parameter(np.zeros(100_000, 'f'))
    model.W = torch.nn.Parameter(torch.zeros(100_000))
    workers = VirtualWorkers(model, 5)
    for _ in workers:
        g = (10 ** rng.uniform(-9, 4, 100_000) * rng.choice([-1, 1], 100_000)).astype('f')
        link.W.grad, model.W.grad = g, torch.from_numpy(g.copy())
        comm.add_grad(link)
        workers.add_worker()
    comm.mean_grad(link)
    workers.mean_grad()
    assert np.array_equal(model.W.grad.numpy(), link.W.grad)
    assert rounded_once(torch.ones(2), torch.float16).dtype == torch.float16
