"""n workers on P processes, against the same run on other P, and against the paper's equations in
float64."""

import os
import signal
import sys
import types
import warnings
from pathlib import Path

import chainer
import chainermn
import numpy as np
import pytest

from extensions import (
    AllreduceBatchStatistics,
    CastReport,
    MeanTrainingLoss,
    MovingBatchStatistics,
    NonFiniteGradients,
    RMSpropWarmup,
    TimeReport,
    VirtualWorkersUpdater,
    create_communicator,
)
from extensions.timing import untimed
from extensions.virtual_workers import workers_of

PROGRAMS = Path(__file__).parent / 'programs'
sys.path.insert(0, str(PROGRAMS))
from tests_common import BATCH, IMAGES, VALIDATION, Network, minibatch, validation_set

pytestmark = pytest.mark.mpi

N, STEPS = 6, 7


@pytest.fixture
def train(mpirun, tmp_path_factory):
    def run(processes, communicator='mpi', dtype='float16', kind='mean'):
        out = tmp_path_factory.mktemp('run')
        done = mpirun(processes, PROGRAMS / 'train_small.py', out, N, communicator, dtype, kind)
        assert done.returncode == 0, done.stdout
        return [dict(np.load(out / f'{rank}.npz')) for rank in range(processes)]

    return run


def reference(rounding=np.float16, kind='mean'):
    """The whole run in float64 NumPy: forward, backward, mean of the workers' rounded gradients,
    [W1]-[W5], [L], [N]."""
    network = Network(seed=0)
    p = {name: param.data.astype(np.float64) for name, param in network.namedparams()}
    m = {name: np.zeros_like(a) for name, a in p.items()}
    delta = {name: np.zeros_like(a) for name, a in p.items()}
    losses, results = [], []
    moving_mean, moving_var = 0.0, 1.0
    for step in range(STEPS):
        sums = {name: 0 for name in p}
        means, variances, inputs = [], [], []
        for worker in range(N):
            x, t = minibatch(step, worker)
            h = x.astype(np.float64) @ p['/fc1/W'].T
            mean, var = h.mean(axis=0), h.var(axis=0)
            means.append(mean)
            variances.append(h.var(axis=0, ddof=1))
            inputs.append(h)
            inverse = 1 / np.sqrt(var + 2e-5)
            normalized = (h - mean) * inverse
            a = np.maximum(p['/bn/gamma'] * normalized + p['/bn/beta'], 0)
            loss, gy = cross_entropy(a @ p['/fc2/W'].T + p['/fc2/b'], t)
            losses.append(loss)
            ga = (gy @ p['/fc2/W']) * (a > 0)
            gn = ga * p['/bn/gamma']
            gh = inverse * (gn - gn.mean(axis=0) - normalized * (gn * normalized).mean(axis=0))
            gradients = {
                '/fc1/W': gh.T @ x,
                '/bn/gamma': (ga * normalized).sum(axis=0),
                '/bn/beta': ga.sum(axis=0),
                '/fc2/W': gy.T @ a,
                '/fc2/b': gy.sum(axis=0),
            }
            for name, g in gradients.items():
                sums[name] = sums[name] + g.astype(rounding).astype(np.float64)
        epoch = step * N * BATCH / IMAGES * 90 / 2
        factor = 0.5 if epoch < 40 else 0.075 if epoch < 70 else 0.01 if epoch < 85 else 0.001
        lr = 0.1 * N * BATCH / 256 * factor
        alpha = 0.5 * np.exp(2 * (epoch - 10) / 5) if epoch < 10 else 0.5 + 2 * (epoch - 10) / 5
        alpha = alpha if epoch < 12.5 else 1.0
        for name, total in sums.items():
            g = (total / N).astype(rounding).astype(np.float64)
            m[name] = 0.99 * m[name] + 0.01 * g**2
            rmsprop = max(0, 1 - alpha) * 3e-4 / lr
            delta[name] = 0.9 * delta[name] - (alpha + rmsprop / (np.sqrt(m[name]) + 1e-8)) * g
            p[name] = p[name] + lr * delta[name]
        moving_mean = 0.7 * moving_mean + 0.3 * np.mean(means, axis=0)
        moving_var = 0.7 * moving_var + 0.3 * np.mean(variances, axis=0)
        if (step + 1) * N * BATCH // IMAGES > step * N * BATCH // IMAGES:
            mean, var = {
                'mean': (np.mean(means, axis=0), np.mean(variances, axis=0)),
                'pooled': (np.mean(means, axis=0), np.var(np.concatenate(inputs), axis=0)),
                'moving': (moving_mean, moving_var),
            }[kind]
            x, t = validation_set()
            h = (x @ p['/fc1/W'].T - mean) / np.sqrt(var + 2e-5)
            y = np.maximum(p['/bn/gamma'] * h + p['/bn/beta'], 0) @ p['/fc2/W'].T + p['/fc2/b']
            top5 = np.argsort(-y, axis=1)[:, :5]
            results.append(
                {
                    'loss': np.mean(losses),
                    'validation_loss': cross_entropy(y, t)[0],
                    'accuracy': np.mean(y.argmax(axis=1) == t),
                    'top5': np.mean((top5 == t[:, None]).any(axis=1)),
                    'mean': mean,
                    'var': var,
                }
            )
            losses = []
    return p, m, delta, results


def cross_entropy(y, t):
    z = y - y.max(axis=1, keepdims=True)
    q = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    one_hot = np.eye(y.shape[1])[t]
    return -np.mean(np.log(q[np.arange(len(t)), t])), (q - one_hot) / len(t)


def assert_follows_the_equations(result, kind='mean'):
    p, m, delta, log = reference(kind=kind)
    # A gradient that float32 puts on the other side of a rounding border differs by one float16
    # step, 1e-3 of its value, and RMSprop enlarges that where m is small: the tolerance is that of
    # float16, far below any missing term.
    for name in p:
        np.testing.assert_allclose(result[name], p[name], rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(result['m' + name], m[name], rtol=2e-3, atol=1e-7)
        np.testing.assert_allclose(result['delta' + name], delta[name], rtol=2e-3, atol=2e-3)
    assert len(log) == 2
    assert list(result['epochs']) == [1, 2] and list(result['iterations']) == [3, 6]
    assert result['t'] == STEPS
    assert list(result['images']) == [VALIDATION] * 2
    for key in ('loss', 'validation_loss', 'accuracy', 'top5'):
        np.testing.assert_allclose(result[key], [entry[key] for entry in log], rtol=2e-3)


@pytest.mark.parametrize(
    'processes, kind',
    [(1, 'mean'), (3, 'mean'), (1, 'pooled'), (3, 'pooled'), (1, 'moving'), (3, 'moving')]
    + [(6, 'moving')],
)
def test_run_equals_the_equations_in_float64(train, processes, kind):
    assert_follows_the_equations(train(processes, kind=kind)[0], kind)


@pytest.mark.parametrize('processes', [1, 3, 6])
def test_run_on_gpus_of_host_memory_equals_the_equations_in_float64(on_host, tmp_path, processes):
    """ChainerMN's pure_nccl as it is: updater, communicator and their order."""
    program = PROGRAMS / 'train_small.py'
    done, logs = on_host(processes, program, tmp_path, N, 'pure_nccl', 'float16', 'mean')
    assert done.returncode == 0, done.stdout
    for rank, calls in enumerate(logs):
        assert_follows_the_equations(dict(np.load(tmp_path / f'{rank}.npz')))
        calls = [call for call in calls if call.startswith('nccl')]
        assert calls[1].startswith('nccl bcast') and calls[1].endswith(' float32 from 0')
        assert [call.split()[1] for call in calls[2:]] == ['allReduce'] * STEPS


@pytest.mark.gpu
@pytest.mark.parametrize('kind', ['mean', 'pooled', 'moving'])
def test_run_on_a_gpu_equals_the_equations_in_float64(train, gpu, kind):
    assert_follows_the_equations(train(1, communicator='pure_nccl', kind=kind)[0], kind)


def updater_of(model, comm, n_workers=2, loss=None):
    return VirtualWorkersUpdater(
        lambda iteration, worker: (iteration, worker),
        RMSpropWarmup(0.1).setup(model),
        loss,
        comm,
        n_workers,
        (8, 20),
    )


def test_a_parameter_without_size_is_named():
    model = chainer.Chain(lazy=chainer.links.Linear(None, 3), fixed=chainer.links.Linear(2, 3))
    with pytest.raises(ValueError, match='every process would initialize its own.*: /lazy/W$'):
        updater_of(model, create_communicator('mpi'))


@pytest.mark.parametrize('name, dtype', [('mpi', 'float16'), ('naive', 'float32')])
def test_a_gradient_that_one_worker_lacks_is_named(name, dtype):
    model = chainer.Chain(a=chainer.links.Linear(1, 1), b=chainer.links.Linear(1, 1))
    x = np.ones((1, 1), np.float32)

    def loss(iteration, worker):
        return chainer.functions.sum(model.a(x) + (model.b(x) if worker == 0 else 0))

    updater = updater_of(model, create_communicator(name, dtype), loss=loss)
    with pytest.raises(ValueError, match='gradients of different parameters: /b/W, /b/b'):
        updater.update()


@pytest.mark.parametrize('scale', [1, 2**12])
def test_with_chainermns_communicator_each_workers_gradient_is_rounded_on_its_own(scale):
    class Pretended:
        """pure_nccl of one rank, as far as the sum over a process's own workers goes."""

        rank, size, allreduce_grad_dtype, gradient_scale = 0, 1, np.dtype(np.float16), scale

        def multi_node_mean_grad(self, model):
            pass

    x = np.random.RandomState(0).standard_normal((3, 1, 50)).astype(np.float32) / scale
    model = chainer.Chain(a=chainer.links.Linear(50, 1, nobias=True))
    updater = updater_of(
        model, Pretended(), 3, lambda iteration, worker: chainer.functions.sum(model.a(x[worker]))
    )
    updater.update()
    expected = (x * scale).astype(np.float16).astype(np.float64).mean(axis=0) / scale
    np.testing.assert_allclose(model.a.W.grad, expected, rtol=1e-6, atol=1e-7 / scale)
    assert np.max(np.abs(model.a.W.grad - x.mean(axis=0))) > 1e-5 / scale


def test_a_gradient_that_is_not_finite_leaves_the_model_as_it_was():
    model = chainer.Chain(a=chainer.links.Linear(1, 1, nobias=True))
    x = np.ones((1, 1), np.float32)

    def loss(iteration, worker):
        return chainer.functions.sum(model.a(x)) * (np.inf if iteration == 1 else 1)

    updater = updater_of(model, create_communicator('mpi'), 1, loss)
    updater.update()
    optimizer = updater.get_optimizer('main')
    before = [model.a.W.data, *model.a.W.update_rule.state.values()]
    copies = [array.copy() for array in before]
    with pytest.raises(NonFiniteGradients, match=r'^iteration 2: .*/a/W \(1 inf and 0 NaN from'):
        updater.update()
    for array, copy in zip(before, copies):
        np.testing.assert_array_equal(array, copy)
    assert (updater.iteration, optimizer.t) == (1, 1)


def test_the_optimizer_counts_epochs():
    model = chainer.Chain(a=chainer.links.Linear(1, 1))
    x = np.ones((1, 1), np.float32)
    updater = updater_of(
        model,
        create_communicator('mpi'),
        loss=lambda iteration, worker: chainer.functions.sum(model.a(x)),
    )
    epochs, details = [], []
    for _ in range(6):  # 8 of 20 images each
        updater.update()
        epochs.append(updater.get_optimizer('main').epoch)
        details.append((updater.previous_epoch_detail, updater.epoch_detail))
    assert epochs == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(details, [(0.4 * i, 0.4 * (i + 1)) for i in range(6)])


@pytest.mark.parametrize('rank, size, n', [(0, 1, 4), (1, 2, 8), (3, 4, 1024), (6, 7, 7)])
def test_a_process_plays_neighbouring_workers(rank, size, n):
    assert list(workers_of(rank, size, n)) == [w for w in range(n) if w * size // n == rank]


def test_statistics_are_those_of_the_last_minibatches(train):
    """After the last validation one more iteration has been run: the links hold this process's last
    worker, unaveraged."""
    np.testing.assert_array_equal(train(1)[0]['mean'], train(6)[5]['mean'])


@pytest.mark.parametrize('processes', [2, 3, 6])
def test_same_bits_however_the_workers_are_spread(train, processes):
    alone = train(1)[0]
    for result in train(processes):
        for name in alone:
            if name not in ('mean', 'var'):
                np.testing.assert_array_equal(result[name], alone[name], err_msg=name)


@pytest.mark.parametrize('stop', [3, 5])
def test_same_bits_when_it_goes_on_with_another_number_of_processes(mpirun, train, tmp_path, stop):
    """Stopped at the end of an epoch and in the middle of one."""
    whole = train(1)[0]
    run, small = (N, 'mpi', 'float16', 'mean'), PROGRAMS / 'train_small.py'
    done = mpirun(2, small, tmp_path, *run, stop)
    assert done.returncode == 0, done.stdout
    for processes in (1, 3, 6):
        out = tmp_path / str(processes)
        out.mkdir()
        done = mpirun(processes, small, out, *run, STEPS, tmp_path / 'state.npz')
        assert done.returncode == 0, done.stdout
        for rank in range(processes):
            result = np.load(out / f'{rank}.npz')
            for name in whole:
                if name not in ('mean', 'var'):
                    np.testing.assert_array_equal(result[name], whole[name], err_msg=name)


def test_moving_averages_go_on_with_another_number_of_processes(mpirun, train, tmp_path):
    whole = train(1, kind='moving')[0]
    run, small = (N, 'mpi', 'float16', 'moving'), PROGRAMS / 'train_small.py'
    done = mpirun(3, small, tmp_path, *run, 4)  # in the middle of an epoch
    assert done.returncode == 0, done.stdout
    done = mpirun(2, small, tmp_path, *run, STEPS, tmp_path / 'state.npz')
    assert done.returncode == 0, done.stdout
    result = np.load(tmp_path / '1.npz')
    # Averages of averages: float64 rounds them otherwise, which is below float32's last bit.
    np.testing.assert_allclose(result['validation_loss'][1:], whole['validation_loss'][1:], 1e-6)


@pytest.mark.parametrize('processes', [1, 2, 6])
def test_chainermns_own_communicator_gives_the_same_numbers(train, processes):
    ours = train(1, dtype='float32')[0]
    theirs = train(processes, communicator='naive', dtype='float32')[0]
    for name in ours:
        if name not in ('mean', 'var'):
            np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-3, atol=1e-5, err_msg=name)


class Failure(Exception):
    pass


def small_training(comm, kind=AllreduceBatchStatistics, actions=None):
    """Four workers. ``actions`` maps a place, worker and iteration to what happens there once."""
    model = Network(seed=0)
    current = []

    def at(place):
        action = (actions or {}).pop((place, current[-1], updater.iteration), None)
        if action:
            action()

    def batches(iteration, worker):
        current.append(worker)
        at('batches')
        return minibatch(iteration, worker)

    def loss(x, t):
        y = model(x)
        at('loss')
        return chainer.functions.softmax_cross_entropy(y, t)

    statistics = kind(model, comm)
    updater = VirtualWorkersUpdater(
        batches,
        RMSpropWarmup(0.1, alpha_rmsprop=1e-3).setup(model),
        loss,
        comm,
        4,
        (4 * BATCH, IMAGES),
        batch_statistics=statistics,
    )
    updater.after_worker = lambda: at('after')
    updater.losses = []
    return updater, statistics


def everything(updater, statistics):
    """All that a training has: parameters, states, losses, counts and averaged statistics."""
    statistics()
    model = updater.get_optimizer('main').target
    arrays = {name: param.array for name, param in model.namedparams()}
    for name, param in model.namedparams():
        arrays.update({f'{name} {kind}': a for kind, a in param.update_rule.state.items()})
    arrays.update(mean=model.bn.avg_mean, var=model.bn.avg_var, losses=updater.losses)
    optimizer = updater.get_optimizer('main')
    return arrays, (updater.iteration, updater.images_done, optimizer.t, optimizer.epoch)


def assert_equal(one, other):
    assert one[1] == other[1]
    for name, array in one[0].items():
        np.testing.assert_array_equal(array, other[0][name], err_msg=name)


@pytest.mark.parametrize('error', [Failure, KeyboardInterrupt])
@pytest.mark.parametrize('where', ['batches', 'loss', 'after'])
@pytest.mark.parametrize('kind', [AllreduceBatchStatistics, MovingBatchStatistics])
@pytest.mark.parametrize(
    'name, dtype, options',
    [
        ('mpi', 'float16', {}),
        ('mpi', 'float16', {'accumulate': 'ring'}),
        ('naive', 'float32', {}),
    ],
)
def test_a_failed_iteration_leaves_no_trace(name, dtype, options, kind, where, error):
    def fail():
        chainer.config.enable_backprop = False  # as Ctrl-C at the border of a using_config
        raise error

    comm = create_communicator(name, dtype, **options)
    updater, statistics = small_training(comm, kind, {(where, 2, 1): fail})
    updater.update()
    with pytest.raises(error):
        updater.update()
    assert updater.images_done == 4 * BATCH
    for _ in range(2):
        updater.update()
    without, its_statistics = small_training(create_communicator(name, dtype, **options), kind)
    for _ in range(3):
        without.update()
    assert_equal(everything(updater, statistics), everything(without, its_statistics))


@pytest.mark.parametrize('n_workers', [1, 2])
def test_statistics_that_are_not_finite_do_not_outlive_their_iteration(n_workers):
    model, comm = Network(0), create_communicator('mpi')
    statistics = AllreduceBatchStatistics(model, comm)

    def batches(iteration, worker):
        x, t = minibatch(iteration, worker)
        return x * np.float32(np.nan if iteration == updater.iteration == bad else 1), t

    updater = VirtualWorkersUpdater(
        batches,
        RMSpropWarmup(0.1).setup(model),
        lambda x, t: chainer.functions.softmax_cross_entropy(model(x), t),
        comm,
        n_workers,
        (8, 20),
        batch_statistics=statistics,
    )
    for bad in (0, None):  # the first minibatch, then the same again
        try:
            updater.update()
        except NonFiniteGradients:
            assert bad == 0
        else:
            assert bad is None
    statistics()
    means = [minibatch(0, worker)[0] @ Network(0).fc1.W.array.T for worker in range(n_workers)]
    np.testing.assert_allclose(model.bn.avg_mean, np.mean(means, axis=(0, 1)), rtol=1e-4, atol=1e-6)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_waits_for_the_parameters_update():
    """A real signal, before and after the parameters are written."""
    updater, statistics = small_training(create_communicator('mpi'))
    optimizer = updater.get_optimizer('main')
    for timing in ('pre', 'post'):
        optimizer.add_hook(lambda _: ctrl_c(), 'ctrl-c', timing)
        with pytest.raises(KeyboardInterrupt):
            updater.update()
        optimizer.remove_hook('ctrl-c')
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    updater.update()
    without, its_statistics = small_training(create_communicator('mpi'))
    for _ in range(3):
        without.update()
    assert_equal(everything(updater, statistics), everything(without, its_statistics))


def test_a_trainer_that_was_interrupted_runs_again(tmp_path):
    """As a cell of a notebook: Ctrl-C in iteration 3 of 6, then the cell again."""
    logs = []
    for interrupted in (True, False):
        comm = create_communicator('mpi')
        actions = {('loss', 1, 2): ctrl_c} if interrupted else {}
        updater, statistics = small_training(comm, actions=actions)
        updater.losses = None
        trainer = chainer.training.Trainer(updater, (6, 'iteration'), tmp_path)
        log = chainer.training.extensions.LogReport(trigger=(6, 'iteration'), filename=None)
        trainer.extend(log)
        trainer.extend(statistics, trigger=(2, 'iteration'))
        trainer.extend(MeanTrainingLoss(comm), trigger=(6, 'iteration'))
        trainer.extend(TimeReport(comm, None, skip=0), trigger=(6, 'iteration'))
        trainer.extend(CastReport(comm), trigger=(6, 'iteration'))
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                trainer.run()
            assert updater.timer is comm.timer is untimed
        trainer.run()
        (entry,) = log.log
        logs.append({k: v for k, v in entry.items() if not k.startswith(('time/', 'elapsed'))})
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_losses_of_iterations_after_the_loaded_snapshot_do_not_count(tmp_path):
    comm = create_communicator('mpi')
    updater, _ = small_training(comm)
    loss, cast = MeanTrainingLoss(comm), CastReport(comm)
    loss.initialize(types.SimpleNamespace(updater=updater))
    updater.update()
    for report in (loss, cast):
        report.gather()
        chainer.serializers.save_npz(tmp_path / f'{type(report).__name__}.npz', report)
    updater.update()
    assert len(updater.losses) == 1 and comm.cast_counts.any()
    for report in (loss, cast):
        chainer.serializers.load_npz(tmp_path / f'{type(report).__name__}.npz', report)
    assert loss._losses.shape == (1, 4) and not updater.losses
    assert not comm.cast_counts.any()


@pytest.mark.parametrize('scale', [None, 2.0**20])
@pytest.mark.parametrize('name, dtype', [('mpi', 'float16'), ('naive', 'float32')])
def test_the_loss_scale_is_honoured(name, dtype, scale):
    """Gradients of 2**-30 are zero in float16 unless they are scaled."""
    model = chainer.Chain(a=chainer.links.Linear(1, 1, nobias=True, initialW=0))
    x = np.full((1, 1), 2.0**-30, np.float32)
    updater = updater_of(
        model,
        create_communicator(name, dtype),
        loss=lambda iteration, worker: chainer.functions.sum(model.a(x)),
    )
    optimizer = updater.get_optimizer('main')
    if scale:
        optimizer.set_loss_scale(scale)
    updater.losses = []
    for _ in range(2):
        updater.update()
    kept = scale or dtype == 'float32'
    # lr 0.1 times the sum of the momenta 1 and 1.9
    assert model.a.W.array[0, 0] == pytest.approx(-0.1 * 2.9 * 2.0**-30 if kept else 0, rel=1e-6)
    assert np.abs(updater.losses).max() < 1e-15  # not scaled


def test_a_dynamic_loss_scale_skips_updates_or_is_refused():
    model = chainer.Chain(a=chainer.links.Linear(1, 1, nobias=True, initialW=0))
    x = np.ones((1, 1), np.float32)
    optimizer = RMSpropWarmup(0.1).setup(model)
    optimizer.loss_scaling()
    optimizer._loss_scale = 2.0**17  # above float16's largest

    def loss(iteration, worker):
        return chainer.functions.sum(model.a(x))

    def updater(**options):
        comm = create_communicator('mpi', **options)
        return VirtualWorkersUpdater(lambda *which: which, optimizer, loss, comm, 2, (8, 20))

    with pytest.raises(ValueError, match='dynamic loss scale.*stop_on_nonfinite=False'):
        updater()
    permissive = updater(stop_on_nonfinite=False)
    written = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            permissive.update()
        written.append(float(model.a.W.array[0, 0]))
    assert written == [0, pytest.approx(-0.1)]


def test_optimizers_that_would_not_do_are_refused():
    comm = create_communicator('mpi')
    model = Network(0)
    several = chainermn.create_multi_node_optimizer(RMSpropWarmup(0.1).setup(model), comm)
    for optimizer in (several, RMSpropWarmup(0.1)):
        with pytest.raises(TypeError, match='needs a plain Chainer optimizer that is set up'):
            VirtualWorkersUpdater(minibatch, optimizer, model, comm, 2, (8, 20))
    for sizes in ((0, 20), (8, 0), (8, -1)):
        with pytest.raises(ValueError, match='epoch_size must be above 0'):
            VirtualWorkersUpdater(minibatch, RMSpropWarmup(0.1).setup(model), model, comm, 2, sizes)


@pytest.mark.parametrize('form', ['tuple', 'dict', 'array', 'concat_examples'])
def test_minibatches_reach_the_loss_function_as_from_standard_updater(form):
    model, comm = Network(0), create_communicator('mpi')
    x, t = minibatch(0, 0)
    seen = []

    def loss(x, t=t):
        seen.append((x, t))
        return chainer.functions.softmax_cross_entropy(model(x), t)

    converter = {
        'tuple': lambda batch: batch,
        'dict': lambda batch: {'t': batch[1], 'x': batch[0]},
        'array': lambda batch: batch[0],
        'concat_examples': lambda batch: chainer.dataset.concat_examples(list(zip(*batch))),
    }[form]
    VirtualWorkersUpdater(
        minibatch, RMSpropWarmup(0.1).setup(model), loss, comm, 1, (4, 20), converter
    ).update()
    np.testing.assert_array_equal(seen[0][0], x)
    np.testing.assert_array_equal(seen[0][1], t)


def test_reports_that_need_the_updater_say_so_before_the_first_iteration(tmp_path):
    comm = create_communicator('mpi')
    x, t = validation_set()
    for report, name in ((MeanTrainingLoss(comm), 'Mean'), (TimeReport(comm, None), 'Time')):
        updater = chainer.training.StandardUpdater(
            chainer.iterators.SerialIterator(list(zip(x, t)), 4),
            RMSpropWarmup(0.1).setup(chainer.links.Classifier(Network(0))),
        )
        trainer = chainer.training.Trainer(updater, (3, 'iteration'), tmp_path)
        trainer.extend(report, trigger=(1, 'iteration'))
        with pytest.raises(TypeError, match=f'^{name}.*VirtualWorkersUpdater: StandardUpdater'):
            trainer.run()
        assert updater.iteration == 0
    with pytest.raises(TypeError, match='CastReport needs the communicator mpi: NaiveComm'):
        CastReport(create_communicator('naive', 'float32'))
    evaluator = chainer.training.extensions.Evaluator(updater.get_iterator('main'), Network(0))
    with pytest.raises(TypeError, match='TimeReport needs ExactEvaluator.*: Evaluator does not'):
        TimeReport(comm, evaluator)


def test_losses_that_train_nothing_are_refused():
    x, t = minibatch(0, 0)
    losses = {
        'one number as a Variable, not 1.0': lambda model: 1.0,
        'one number as a Variable, not variable': lambda model: model(x),
        'does loss_function use another model': lambda model: (
            chainer.functions.softmax_cross_entropy(Network(0)(x), t)
        ),
    }
    for message, loss in losses.items():
        model = Network(0)
        updater = updater_of(
            model,
            create_communicator('mpi'),
            loss=lambda *_, loss=loss, model=model: loss(model),
        )
        with pytest.raises((TypeError, ValueError), match=message):
            updater.update()
    updater, _ = small_training(create_communicator('mpi'))
    with chainer.using_config('train', False), pytest.raises(RuntimeError, match='config.train'):
        updater.update()


def test_statistics_of_several_workers_need_the_updater(tmp_path):
    updater, _ = small_training(create_communicator('mpi'))
    trainer = chainer.training.Trainer(updater, (1, 'iteration'), tmp_path)
    trainer.extend(AllreduceBatchStatistics(updater.get_optimizer('main').target, updater._comm))
    with pytest.raises(ValueError, match='every worker in every iteration.*batch_statistics'):
        trainer.run()
    assert updater.iteration == 0


def test_dropout_that_is_seeded_by_the_worker_gives_the_same_bits(mpirun, tmp_path):
    digests = set()
    for processes in (1, 2, 4):
        done = mpirun(processes, PROGRAMS / 'dropout.py')
        assert done.returncode == 0, done.stdout
        digests.update(line for line in done.stdout.splitlines() if line.startswith('digest'))
    assert len(digests) == 1
