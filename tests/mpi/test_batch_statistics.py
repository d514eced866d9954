import sys
from pathlib import Path

import chainer
import chainer.links as L
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
from tests_common import images_of


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
