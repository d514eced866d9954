"""The preflight on real ranks: what it finds, and that it writes nothing."""

import re

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.mpi


@pytest.fixture
def preflight(mpirun, root, tmp_path):
    """``preflight(n, what, *options)``: what the last rank has wrong, and train.py's options."""
    program = root / 'tests' / 'mpi' / 'programs' / 'preflight_that_finds.py'
    options = '--preset smoke --width 4 --out'.split()
    return lambda n, what, *more: mpirun(n, program, what, *options, tmp_path / 'out', *more)


def problems_of(done):
    return re.findall(r'^problem: (.*)$', done.stdout, re.MULTILINE)


def test_all_is_well(preflight, tmp_path):
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(7):
                pixels = np.full((40, 50, 3), i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{i}.png')
    folders = ('--train-root', tmp_path / 'train', '--val-root', tmp_path / 'val')
    done = preflight(3, 'nothing', *folders, '--local-batch-size', 2, '--workers', 6)
    assert done.returncode == 0, done.stdout
    head, row, *rest = done.stdout[done.stdout.index('host  ranks') :].splitlines()
    cells = dict(zip(re.split(r'\s{2,}', head.strip()), re.split(r'\s{2,}', row.strip())))
    assert cells['ranks'] == '3' and cells['GPUs'] == '0' and cells['MPI'].startswith('v')
    assert 0 < float(cells['GiB needed']) < 3 and float(cells['loading s']) > 0
    assert rest[0].startswith('all-reduce in float16: right, ')
    assert ' of 2 minibatches per rank; 18 iterations in ' in rest[1] and 'measured' in rest[1]
    assert rest[2] == 'ready' and not problems_of(done)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'what, options, problem',
    [
        ('version', (), 'numpy is 1.0, but '),
        ('clock', (), "its clock is +5.0 s off rank 0's"),
        ('sum', (), 'the all-reduce is wrong: /fc/W is 0.01 off'),
        ('shared memory', (), '/dev/shm is too small'),
    ],
)
def test_what_one_rank_has_wrong_is_found(preflight, tmp_path, what, options, problem):
    done = preflight(2, what, *options)
    assert done.returncode == 1, done.stdout
    (found,) = problems_of(done)
    assert found.startswith(problem) and '(rank 1 on ' in found
    assert 'not ready: 1 problem\n' in done.stdout
    assert not (tmp_path / 'out').exists()


def test_all_problems_are_found_at_once(preflight, tmp_path):
    (tmp_path / 'out').write_text('a file')
    nowhere = ('--train-root', tmp_path / 'none', '--val-root', tmp_path / 'none')
    done = preflight(2, 'clock', *nowhere, '--local-batch-size', 10**7)
    assert done.returncode == 1, done.stdout
    found = '\n'.join(problems_of(done))
    for message in ('cannot be written', 'none: No such file', '+5.0 s off', 'not enough memory'):
        assert message in found
    assert 'not ready: 4 problems\n' in done.stdout


@pytest.mark.parametrize(
    'options, message',
    [
        (('--workers', '3'), '3 workers cannot be spread evenly over 2 processes'),
        (('--communicator', 'pure_nccl'), 'needs a GPU'),
    ],
)
def test_without_a_communicator_the_rest_is_still_checked(preflight, options, message):
    done = preflight(2, 'clock', *options)
    assert done.returncode == 1, done.stdout
    assert [message in problem for problem in problems_of(done)].count(True) == 1
    assert 'not ready: 2 problems\n' in done.stdout
