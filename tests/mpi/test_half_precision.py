import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAMS = Path(__file__).parent / 'programs'
sys.path.insert(0, str(PROGRAMS))
from tests_common import gradients

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
            result[name] = (np.sum(sent, axis=0) / n_workers).astype(dtype).astype(np.float32)
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
