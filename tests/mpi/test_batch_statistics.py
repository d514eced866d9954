import sys
from pathlib import Path

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer.training import extension

from extensions import AllreduceBatchStatistics, ExactEvaluator, create_communicator

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


def test_a_link_that_saw_nothing_is_named():
    model = chainer.Chain(unused=L.BatchNormalization(axis=(0, 2, 3), decay=0))
    with pytest.raises(ValueError, match='/unused has no statistics yet'):
        AllreduceBatchStatistics(model, create_communicator('mpi'))()


def test_a_model_without_batch_normalization_is_left_alone():
    AllreduceBatchStatistics(chainer.Chain(fc=L.Linear(2, 2)), create_communicator('mpi'))()


def test_it_runs_before_evaluators_and_snapshots():
    snapshot = chainer.training.extensions.snapshot()
    assert AllreduceBatchStatistics.priority > ExactEvaluator.priority > snapshot.priority
    assert AllreduceBatchStatistics.priority > chainer.training.extensions.Evaluator.priority
    assert ExactEvaluator.priority > extension.PRIORITY_READER  # before the log
