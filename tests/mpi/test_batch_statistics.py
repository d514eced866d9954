import sys
from pathlib import Path

import chainer
import chainer.links as L
import chainermn
import numpy as np
import pytest
from chainer.training import extension

from extensions import (
    AllreduceBatchStatistics,
    ExactEvaluator,
    MovingBatchStatistics,
    create_communicator,
)

PROGRAMS = Path(__file__).parent / 'programs'
sys.path.insert(0, str(PROGRAMS))
from tests_common import Network, images_of, validation_set


@pytest.mark.mpi
@pytest.mark.parametrize('pooled', [False, True])
@pytest.mark.parametrize('processes', [1, 2, 3, 5])
def test_average_of_all_ranks_minibatches(mpirun, tmp_path, processes, pooled):
    done = mpirun(
        processes,
        PROGRAMS / 'average_statistics.py',
        tmp_path,
        'pooled' if pooled else 'mean',
        'float32',
    )
    assert done.returncode == 0, done.stdout
    results = [np.load(tmp_path / f'{rank}.npz') for rank in range(processes)]
    for name, channels in (('first', 3), ('second', 5)):
        batches = [images_of(rank, 1, channels).astype(np.float64) for rank in range(processes)]
        axes = (0, 2, 3)
        mean = np.mean([b.mean(axis=axes) for b in batches], axis=0)
        if pooled:
            var = np.concatenate(batches).var(axis=axes)
        else:
            var = np.mean([b.var(axis=axes, ddof=1) for b in batches], axis=0)  # Chainer's
        # The links' statistics are float32 means of 24 numbers: a few roundings of 6e-8.
        np.testing.assert_allclose(results[0][f'{name}_mean'], mean, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(results[0][f'{name}_var'], var, rtol=2e-6)
        for result in results[1:]:
            for key in ('mean', 'var'):
                np.testing.assert_array_equal(result[f'{name}_{key}'], results[0][f'{name}_{key}'])


@pytest.mark.mpi
def test_float16_statistics(mpirun, tmp_path):
    done = mpirun(2, PROGRAMS / 'average_statistics.py', tmp_path, 'mean', 'float16')
    assert done.returncode == 0, done.stdout
    result = np.load(tmp_path / '1.npz')
    expected = np.mean([images_of(r, 1, 5).mean(axis=(0, 2, 3)) for r in range(2)], axis=0)
    assert result['second_mean'].dtype == np.float16
    np.testing.assert_allclose(result['second_mean'], expected, rtol=5e-3, atol=5e-3)


def test_moving_averages_are_refused_by_name():
    model = chainer.Chain(good=L.BatchNormalization(3, decay=0), moving=L.BatchNormalization(3))
    with pytest.raises(ValueError, match=r'/moving \(decay=0.9\)') as raised:
        AllreduceBatchStatistics(model, create_communicator('mpi'))
    assert 'good' not in str(raised.value)


def test_a_link_without_size_is_named():
    model = chainer.Chain(unused=L.BatchNormalization(axis=(0, 2, 3), decay=0))
    with pytest.raises(ValueError, match='/unused has no statistics yet'):
        AllreduceBatchStatistics(model, create_communicator('mpi'))()


@pytest.mark.parametrize('pooled', [False, True])
def test_of_one_worker_nothing_changes_but_the_pooled_variance_is_the_biased_one(device, pooled):
    x = device.send(images_of(0, 0, 5))
    model = chainer.Chain(
        single=L.BatchNormalization(5, decay=0, dtype=np.float32),
        half=L.BatchNormalization(5, decay=0, dtype=np.float16),
        planes=L.BatchNormalization(axis=0, decay=0),  # statistics [5, height, width]
    )
    model.to_device(device)
    statistics = AllreduceBatchStatistics(model, create_communicator('mpi'), pooled)
    model.single(x=x)
    model.half(x.astype(np.float16))
    model.planes(x)
    before = {
        (name, kind): chainer.backends.cuda.to_cpu(getattr(link, kind)).copy()
        for name, link in model.namedlinks(skipself=True)
        for kind in ('avg_mean', 'avg_var')
    }
    for _ in range(2):  # the second call changes nothing either
        statistics()
        for (name, kind), array in before.items():
            m = x.shape[0] if name == '/planes' else x[:, 0].size
            expected = array
            if pooled and kind == 'avg_var':
                expected = (array.astype(np.float64) * (m - 1) / m).astype(array.dtype)
            actual = chainer.backends.cuda.to_cpu(getattr(model[name[1:]], kind))
            assert actual.dtype == array.dtype and actual.shape == array.shape
            if pooled:  # E[x**2] - E[x]**2 in float64
                tolerance = 1e-7 if array.dtype == np.float32 else 1e-3
                np.testing.assert_allclose(actual, expected, rtol=tolerance)
            else:
                np.testing.assert_array_equal(actual, expected)


def test_pooled_variance_of_one_value_per_channel_is_zero():
    model = chainer.Chain(bn=L.BatchNormalization(3, decay=0))
    statistics = AllreduceBatchStatistics(model, create_communicator('mpi'), pooled_variance=True)
    model.bn(np.ones((1, 3), np.float32))
    statistics()
    np.testing.assert_array_equal(model.bn.avg_var, np.zeros(3))


def test_an_evaluation_in_between_changes_nothing():
    model = chainer.Chain(bn=L.BatchNormalization(5, decay=0))
    statistics = AllreduceBatchStatistics(model, create_communicator('mpi'), pooled_variance=True)
    x = images_of(0, 0, 5)
    model.bn(x)
    with chainer.using_config('train', False):
        model.bn(x[:1])
    statistics()
    np.testing.assert_allclose(model.bn.avg_var, x.var(axis=(0, 2, 3)), rtol=1e-5)


def test_statistics_that_were_loaded_or_replaced_since_are_the_ones_that_count(tmp_path):
    model = chainer.Chain(bn=L.BatchNormalization(5, decay=0))
    statistics = AllreduceBatchStatistics(model, create_communicator('mpi'))
    model.bn(images_of(0, 0, 5))
    statistics()
    chainer.serializers.save_npz(tmp_path / 'model.npz', model)
    saved = model.bn.avg_mean.copy()
    model.bn(images_of(0, 1, 5))
    chainer.serializers.load_npz(tmp_path / 'model.npz', model)
    statistics()
    np.testing.assert_array_equal(model.bn.avg_mean, saved)
    model.bn.avg_mean = np.full(5, 2.0, np.float32)  # what moving to another device does
    statistics()
    np.testing.assert_array_equal(model.bn.avg_mean, np.full(5, 2.0))
    for worker in range(2):
        model.bn(images_of(worker, 1, 5))
        statistics.add_worker()
    statistics()
    expected = np.mean([images_of(w, 1, 5).mean(axis=(0, 2, 3)) for w in range(2)], axis=0)
    np.testing.assert_allclose(model.bn.avg_mean, expected, rtol=1e-5)


@pytest.mark.parametrize('pooled', [False, True])
def test_workers_of_one_process(pooled):
    model = chainer.Chain(bn=L.BatchNormalization(5, decay=0))
    statistics = AllreduceBatchStatistics(model, create_communicator('mpi'), pooled)
    batches = [images_of(worker, 0, 5) for worker in range(3)]
    for _ in range(2):
        statistics.clear()
        for batch in batches:
            model.bn(batch)
            statistics.add_worker()
    statistics()
    axes = (0, 2, 3)
    mean = np.mean([b.mean(axis=axes, dtype=float) for b in batches], axis=0)
    var = np.mean([b.var(axis=axes, dtype=float, ddof=1) for b in batches], axis=0)
    if pooled:
        var = np.concatenate(batches).var(axis=axes, dtype=float)
    np.testing.assert_allclose(model.bn.avg_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.bn.avg_var, var, rtol=1e-5)


@pytest.mark.parametrize('n_workers', [1, 3])
def test_moving_averages_are_the_mean_of_what_chainers_own_would_be(n_workers):
    theirs = [L.BatchNormalization(5, decay=0.9) for _ in range(n_workers)]
    model = chainer.Chain(bn=L.BatchNormalization(5, decay=0))
    statistics = MovingBatchStatistics(model, create_communicator('mpi'))
    for step in range(4):
        statistics.clear()
        for worker, their in enumerate(theirs):
            model.bn(images_of(worker, step, 5))
            statistics.add_worker()
            their(images_of(worker, step, 5))
        if step != 1:  # validations, two of them one after the other
            for _ in range(2):
                statistics()
                for name in ('avg_mean', 'avg_var'):
                    expected = np.mean([getattr(their, name) for their in theirs], axis=0)
                    np.testing.assert_allclose(getattr(model.bn, name), expected, rtol=2e-6)


def test_moving_averages_before_the_first_minibatch_and_impossible_decays():
    model = chainer.Chain(bn=L.BatchNormalization(5, decay=0))
    MovingBatchStatistics(model, create_communicator('mpi'))()
    np.testing.assert_array_equal(model.bn.avg_var, np.ones(5))
    for decay in (0, 1, -0.1, float('nan')):
        with pytest.raises(ValueError, match='decay must be above 0 and below 1'):
            MovingBatchStatistics(model, create_communicator('mpi'), decay)


def test_a_model_without_batch_normalization_is_left_alone():
    MovingBatchStatistics(chainer.Chain(fc=L.Linear(2, 2)), create_communicator('mpi'))()
    AllreduceBatchStatistics(chainer.Chain(fc=L.Linear(2, 2)), create_communicator('mpi'))()


def test_it_runs_before_evaluators_and_snapshots():
    snapshot = chainer.training.extensions.snapshot()
    assert AllreduceBatchStatistics.priority > ExactEvaluator.priority > snapshot.priority
    assert AllreduceBatchStatistics.priority > chainer.training.extensions.Evaluator.priority
    assert ExactEvaluator.priority > extension.PRIORITY_READER  # before the log


def test_copies_of_the_model_see_the_averages():
    """As Evaluator(iterator, model.copy()): the copy is made before anything else."""
    model = chainer.Chain(bn=L.BatchNormalization(5, decay=0))
    copy = model.copy()
    statistics = AllreduceBatchStatistics(model, create_communicator('mpi'))
    for step in range(2):
        statistics.clear()
        for worker in range(2):
            model.bn(images_of(worker, step, 5))
            statistics.add_worker()
        statistics()
        expected = np.mean([images_of(w, step, 5).mean(axis=(0, 2, 3)) for w in range(2)], axis=0)
        np.testing.assert_allclose(copy.bn.avg_mean, expected, rtol=1e-5)
        np.testing.assert_array_equal(copy.bn.avg_var, model.bn.avg_var)


def test_a_link_with_two_names_counts_once_and_extensions_share_links():
    bn = L.BatchNormalization(5, decay=0)
    model = chainer.Chain(a=chainer.Sequential(bn), b=bn)
    comm = create_communicator('mpi')
    pooled, again, plain = (
        AllreduceBatchStatistics(model, comm, pooled_variance=kind) for kind in (True, True, False)
    )
    for step in range(2):
        x = images_of(0, step, 5)
        model.b(x)
        for statistics in (plain, pooled, again, plain):
            statistics()
        np.testing.assert_allclose(bn.avg_var, x.var(axis=(0, 2, 3), dtype=float), rtol=1e-5)


def test_pooled_variance_is_never_negative():
    model = chainer.Chain(bn=L.BatchNormalization(2, decay=0, dtype=np.float64))
    statistics = AllreduceBatchStatistics(model, create_communicator('mpi'), pooled_variance=True)
    for value in np.random.RandomState(0).uniform(1e6, 1e8, size=30):
        for _ in range(3):
            model.bn(np.full((3, 2), value))
            statistics.add_worker()
        statistics()
        assert model.bn.avg_var.min() >= 0


def test_other_links_with_statistics_are_refused_by_name():
    comm = create_communicator('mpi')
    for other in (
        L.DecorrelatedBatchNormalization(16, decay=0),
        L.BatchRenormalization(16, decay=0),
        chainermn.links.MultiNodeBatchNormalization(16, comm, decay=0),
    ):
        model = chainer.Chain(good=L.BatchNormalization(3, decay=0), other=other)
        with pytest.raises(TypeError, match=rf'/other \({type(other).__name__}\)') as raised:
            AllreduceBatchStatistics(model, comm)
        assert 'good' not in str(raised.value)


@pytest.mark.parametrize('kind', ['pooled', 'moving'])
def test_after_loading_the_loaded_statistics_count(tmp_path, kind):
    model, comm = chainer.Chain(bn=L.BatchNormalization(5, decay=0)), create_communicator('mpi')
    if kind == 'pooled':
        statistics = AllreduceBatchStatistics(model, comm, pooled_variance=True)
    else:
        statistics = MovingBatchStatistics(model, comm)
    model.bn(images_of(0, 0, 5))
    statistics.add_worker()
    statistics()
    saved = model.bn.avg_mean.copy(), model.bn.avg_var.copy()
    for name, part in (('model', model), ('statistics', statistics)):
        chainer.serializers.save_npz(tmp_path / f'{name}.npz', part)
    model.bn(images_of(1, 1, 5))  # an iteration after the saved one
    statistics.add_worker()
    for name, part in (('model', model), ('statistics', statistics)):
        chainer.serializers.load_npz(tmp_path / f'{name}.npz', part)
    statistics()
    np.testing.assert_allclose(model.bn.avg_mean, saved[0], rtol=1e-6)
    np.testing.assert_allclose(model.bn.avg_var, saved[1], rtol=1e-6)


def test_one_minibatch_that_is_not_finite_does_not_stay():
    model = chainer.Chain(bn=L.BatchNormalization(5, decay=0))
    statistics = AllreduceBatchStatistics(model, create_communicator('mpi'))
    x = images_of(0, 0, 5)
    x[0, 2] = np.nan
    x[0, 3] = np.inf
    with np.errstate(invalid='ignore'):
        model.bn(x)
    statistics.discard()
    np.testing.assert_array_equal(model.bn.avg_var[2:4], [1, 1])  # as in a new link
    y = images_of(0, 1, 5)
    model.bn(y)
    statistics()
    np.testing.assert_allclose(model.bn.avg_mean, y.mean(axis=(0, 2, 3)), rtol=1e-5)


def standard_trainer(model, out):
    iterator = chainer.iterators.SerialIterator(list(zip(*validation_set())), 4)
    updater = chainer.training.StandardUpdater(
        iterator, chainer.optimizers.SGD(0.01).setup(L.Classifier(model))
    )
    return chainer.training.Trainer(updater, (3, 'iteration'), out)


def test_beside_standard_updater(tmp_path):
    model, comm = Network(0), create_communicator('mpi')
    trainer = standard_trainer(model, tmp_path)
    trainer.extend(AllreduceBatchStatistics(model, comm, True), trigger=(1, 'iteration'))
    h = []
    model.fc1.add_hook(Outputs(h))
    trainer.run()
    np.testing.assert_allclose(model.bn.avg_var, h[-1].var(axis=0), rtol=1e-5)
    trainer = standard_trainer(model, tmp_path)
    trainer.extend(MovingBatchStatistics(model, comm))
    with pytest.raises(ValueError, match='MovingBatchStatistics.*StandardUpdater does not pass'):
        trainer.run()
    assert trainer.updater.iteration == 0


class Outputs(chainer.LinkHook):
    def __init__(self, outputs):
        self._outputs = outputs

    def forward_postprocess(self, args):
        self._outputs.append(args.out.array)
