import functools
import sys
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from extensions import CommunicatorError, HalfPrecisionMpiCommunicator, create_communicator

PROGRAMS = Path(__file__).parent / 'programs'
sys.path.insert(0, str(PROGRAMS))
from tests_common import gradients, model_of

pytestmark = pytest.mark.mpi


def mean_of(n_workers, dtype):
    """[H]: the mean of the gradients as they are on the wire, in float64, rounded once."""
    result = {}
    for name, first in gradients(0).items():
        if first is not None:
            with np.errstate(over='ignore'):
                sent = [
                    gradients(w)[name].astype(dtype).astype(np.float64) for w in range(n_workers)
                ]
            # Not np.sum: in older NumPy it starts from 0, and loses the sign of negative zeros.
            total = functools.reduce(np.add, sent)
            result[name] = (total / n_workers).astype(dtype).astype(np.float32)
    return result


@pytest.mark.parametrize(
    'processes, each, dtype, order',
    [
        (1, 1, 'float16', 'forward'),
        (2, 1, 'float16', 'forward'),
        (3, 1, 'float16', 'forward'),
        (3, 1, 'float16', 'reversed'),
        (4, 1, 'float16', 'forward'),
        (7, 1, 'float16', 'forward'),
        (1, 6, 'float16', 'forward'),
        (2, 3, 'float16', 'forward'),
        (3, 2, 'float16', 'forward'),
        (3, 1, 'float64', 'forward'),
    ],
)
def test_mean_equals_float64_reference(mpirun, tmp_path, processes, each, dtype, order):
    done = mpirun(processes, PROGRAMS / 'allreduce.py', tmp_path, dtype, each, order)
    assert done.returncode == 0, done.stdout
    expected = mean_of(processes * each, dtype)
    for rank in range(processes):
        actual = np.load(tmp_path / f'{rank}.npz')
        assert set(actual.files) == set(expected)
        for name in expected:
            assert actual[name].dtype == np.float32
            if dtype == 'float16':  # exact: no tolerance
                np.testing.assert_array_equal(actual[name], expected[name])
                # array_equal takes -0 for 0; a sum of negative zeros and one worker's -0 keep their
                # sign.
                np.testing.assert_array_equal(np.signbit(actual[name]), np.signbit(expected[name]))
            else:  # the order of the additions is free
                np.testing.assert_allclose(actual[name], expected[name], rtol=1e-7)


def test_float32_differs_from_float16(mpirun, tmp_path):
    assert mpirun(2, PROGRAMS / 'allreduce.py', tmp_path, 'float32', 1, 'forward').returncode == 0
    actual = np.load(tmp_path / '0.npz')['/conv']
    np.testing.assert_allclose(actual, mean_of(2, 'float32')['/conv'], rtol=1e-6)
    assert np.mean(actual != mean_of(2, 'float16')['/conv']) > 0.9


@pytest.mark.parametrize(
    'what, message',
    [
        ('missing', 'ranks 0 and 1 differ in which gradients they have: /scalar;'),
        ('workers', 'gradients they have: none; and have 1 and 2 workers'),
    ],
)
def test_ranks_that_do_not_fit_together_are_named_on_every_rank(mpirun, what, message):
    done = mpirun(2, PROGRAMS / 'different_gradients.py', what, timeout=60)
    assert done.returncode == 3, done.stdout
    for rank in range(2):
        assert any(
            line.startswith(f'rank {rank}: ') and message in line
            for line in done.stdout.splitlines()
        ), done.stdout


def test_zero_fill_counts_a_missing_gradient_as_zeros(mpirun):
    done = mpirun(2, PROGRAMS / 'different_gradients.py', 'zero_fill', timeout=60)
    assert done.returncode == 0, done.stdout
    half = np.float32(gradients(0)['/scalar'].astype(np.float16) / np.float16(2))
    expected = f'{np.array(half)!r} {np.zeros(3, np.float32)!r}'
    for rank in range(2):
        assert f'rank {rank}: {expected}' in done.stdout.splitlines()


def test_workers_of_one_process_with_different_gradients_are_an_error():
    comm = create_communicator('mpi')
    model = model_of(gradients(0))
    for name, param in model.namedparams():
        param.grad = gradients(0)[name]
    comm.add_grad(model)
    model.conv.cleargrad()
    with pytest.raises(ValueError, match='worker 1 of rank 0 .*: /conv'):
        comm.add_grad(model)


def test_a_mean_without_workers_is_an_error():
    with pytest.raises(RuntimeError, match='add_grad before it'):
        create_communicator('mpi').mean_grad(model_of(gradients(0)))


@pytest.mark.parametrize('dtype', [None, 'float15', 'int32', object])
def test_other_dtypes_are_an_error_that_names_the_possible_ones(dtype):
    comm = create_communicator('mpi')
    message = 'one of float16, float32, float64, not'
    with pytest.raises(CommunicatorError, match=message):
        create_communicator('mpi', dtype)
    with pytest.raises(CommunicatorError, match=message):
        comm.set_config('allreduce_grad_dtype', dtype)


def test_a_process_outside_of_the_communicator_is_told_so():
    with pytest.raises(CommunicatorError, match='COMM_NULL'):
        create_communicator('mpi', mpi_comm=MPI.COMM_NULL)


def test_configuration_is_of_one_communicator_and_split_keeps_it():
    first, second = create_communicator('mpi', 'float16'), create_communicator('mpi', 'float32')
    assert first.get_config('allreduce_grad_dtype') == np.float16
    second.set_config('allreduce_grad_dtype', np.float64)
    assert first.get_config('allreduce_grad_dtype') == np.float16
    part = second.split(0, 0)
    assert type(part) is HalfPrecisionMpiCommunicator
    assert part.get_config('allreduce_grad_dtype') == np.float64
    assert part.get_config('batched_copy') is False
