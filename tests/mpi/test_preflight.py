"""The preflight on real ranks: what it finds, and that it writes nothing."""

import re
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture
def folders(tmp_path):
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(7):
                pixels = np.full((40, 50, 3), i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{i}.png')
    return '--train-root', tmp_path / 'train', '--val-root', tmp_path / 'val'


def cells_of(done):
    """The row of the host, by the titles of its columns, and the lines below."""
    assert done.returncode == 0, done.stdout
    head, row, *rest = done.stdout[done.stdout.index('host  ranks') :].splitlines()
    return dict(zip(re.split(r'\s{2,}', head.strip()), re.split(r'\s{2,}', row.strip()))), rest


@pytest.fixture
def dead():
    """A file in /dev/shm, of no process, that could still take 1 TiB: Open MPI leaves such ones."""
    path = Path('/dev/shm/sm_segment.test.0.dead')
    with path.open('w') as file:
        file.truncate(1 << 40)
    yield
    path.unlink()


def test_all_is_well(preflight, folders, tmp_path, dead):
    options = (*folders, '--local-batch-size', 2, '--workers', 6)
    cells, rest = cells_of(preflight(3, 'nothing', *options))
    assert cells['ranks'] == '3' and cells['GPUs'] == '0' and cells['MPI'].startswith('v')
    assert 0 < float(cells['GiB needed']) < 3 and float(cells['loading s']) > 0
    assert rest[0].startswith('versions: python ') and 'chainer 7.8.1' in rest[0]
    assert rest[1].startswith('all-reduce in float16: right, ')
    assert ' of 2 minibatches per rank; 18 iterations in ' in rest[2] and 'measured' in rest[2]
    assert rest[3] == 'ready' and len(rest) == 4
    assert not (tmp_path / 'out').exists()
    alone, _ = cells_of(preflight(1, 'nothing', *options))
    # The three share a host.
    assert 2 < float(cells['GiB needed']) / float(alone['GiB needed']) < 4
    assert 1 <= float(cells['shm MiB needed']) < 1000


def test_images_are_listed_once_and_may_take_longer_than_the_watchdog_waits(preflight, folders):
    done = preflight(2, 'slow listing', *folders, '--local-batch-size', 2, '--watchdog', 8)
    assert done.returncode == 0, done.stdout
    assert re.findall('^lists (.*)$', done.stdout, re.MULTILINE) == ['train', 'val']


@pytest.fixture
def with_limit(mpiexec, job_environment, root):
    """``with_limit(n, limit, *words)``: Python on n ranks, connected by TCP, of limited files."""

    def run(n, limit, *words):
        shell = ('sh', '-c', f'ulimit {limit}; exec "$@"', 'sh')
        return subprocess.run(
            [mpiexec, '-n', str(n), *shell, sys.executable, *map(str, words)],
            env={**job_environment, 'OMPI_MCA_btl': 'tcp,self'},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )

    return run


CONNECTED = """
from reproduce.job import start
start.before_mpi()
from mpi4py import MPI
MPI.COMM_WORLD.alltoall([0] * MPI.COMM_WORLD.size)
print(f'rank {MPI.COMM_WORLD.rank} is connected')
"""


def test_a_soft_limit_of_open_files_does_not_let_the_ranks_hang(with_limit):
    done = with_limit(12, '-Sn 22', '-c', CONNECTED)
    assert done.returncode == 0 and done.stdout.count('is connected') == 12, done.stdout


def test_too_few_open_files_are_found_before_the_ranks_hang(with_limit, root, tmp_path):
    words = ('-m', 'reproduce.job.preflight', '--preset', 'smoke', '--out', tmp_path)
    done = with_limit(2, '-n 60', *words)
    assert done.returncode == 1, done.stdout
    # Apart, as mpiexec may print its own lines between two lines of a rank.
    problem = (
        r'^problem: a rank may open 60 files, but 2 ranks need 66 .*: raise the hard limit .* '
        r'\(rank 0 on .*\)$'
    )
    assert re.search(problem, done.stdout, re.MULTILINE), done.stdout
    assert re.search('^not ready: 1 problem$', done.stdout, re.MULTILINE), done.stdout
    done = with_limit(2, '-n 60', root / 'reproduce' / 'train.py', '--dry-run')
    assert done.returncode == 0 and 'note: a rank may open 60 files' in done.stdout


def test_a_small_dev_shm_is_found(mpiexec, job_environment, root, tmp_path):
    program = (root / 'reproduce' / 'job' / 'preflight.py', '--preset', 'smoke', '--width', '4')
    small = 'mount -t tmpfs -o size=20m tmpfs /dev/shm || exit 99; exec "$@"'
    try:
        done = subprocess.run(
            ['unshare', '--mount', 'sh', '-c', small, 'sh', mpiexec, '-n', '2', sys.executable]
            + [*map(str, program), '--out', str(tmp_path / 'out')],
            env=job_environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    except FileNotFoundError:
        pytest.skip('needs unshare')
    if 'checking' not in done.stdout:
        pytest.skip('may not mount')
    assert done.returncode == 1 and 'problem: /dev/shm is too small (see' in done.stdout


@pytest.mark.parametrize(
    'what, options, problem',
    [
        ('version', (), 'numpy is 1.0, but '),
        ('clock', (), "its clock is +5.0 s off rank 0's"),
        ('sum', (), 'the all-reduce is wrong: /fc/W is 0.01 off'),
        ('memory', ('--loader', 'processes:1'), '--loader processes:1 does not work: DataError('),
    ],
)
def test_what_one_rank_has_wrong_is_found(preflight, tmp_path, what, options, problem):
    done = preflight(2, what, *options)
    assert done.returncode == 1, done.stdout
    (found,) = problems_of(done)
    assert found.startswith(problem) and '(rank 1 on ' in found
    assert 'not ready: 1 problem\n' in done.stdout
    assert not (tmp_path / 'out').exists()


def test_plots_that_cannot_be_drawn_are_found(preflight):
    done = preflight(1, 'plots')
    assert done.returncode == 1, done.stdout
    assert problems_of(done)[0].startswith("curves.png cannot be drawn: OSError(28, 'No space left")


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
