"""What ranks send each other at the start."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.mpi
PROGRAMS = Path(__file__).resolve().parent / 'programs'


@pytest.mark.parametrize('n', [1, 3])
def test_arrays_of_a_checkpoint_reach_all_ranks(mpirun, n):
    done = mpirun(n, PROGRAMS / 'bcast_arrays.py')
    assert done.returncode == 0, done.stdout
