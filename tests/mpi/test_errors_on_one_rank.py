"""An error on one rank reaches all ranks: none is left waiting."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.mpi
PROGRAM = Path(__file__).parent / 'programs' / 'one_rank_fails.py'


@pytest.mark.parametrize(
    'where, error',
    [
        ('images', 'RuntimeError: rank 1 evaluated 4 images of its 8'),
        ('label', 'ValueError: label -'),
        ('predictor', 'MemoryError: too much'),
        ('statistics', 'ValueError: /bn has no statistics yet'),
    ],
)
def test_all_ranks_raise(mpirun, where, error):
    done = mpirun(3, PROGRAM, where, timeout=60)
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if ' raises ' in line]
    for rank in (0, 1, 2):
        # Ranks 1 and 2 have no statistics.
        own = rank == 1 or (where == 'statistics' and rank == 2)
        expected = error if own else f'RuntimeError: rank 1 failed: {error}'
        assert sum(line.startswith(f'rank {rank} raises {expected}') for line in lines) == 1, lines


def test_an_uncaught_exception_ends_all_ranks(mpirun):
    done = mpirun(2, PROGRAM, 'training', timeout=60)
    assert done.returncode != 0
    assert 'OSError: cannot read' in done.stdout and 'Uncaught exception on rank 1' in done.stdout
