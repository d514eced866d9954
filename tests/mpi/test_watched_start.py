"""A rank that hangs before the first iteration: the watchdog names it, and the part it is in."""

import re
import time

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.mpi
SECONDS = 8  # of a part of the start, on a busy machine
SMOKE = (
    '--preset smoke --width 4 --shallow --local-batch-size 240 --epochs 1 --loader serial'.split()
)


@pytest.fixture
def folders(tmp_path):
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(15):
                pixels = np.full((40, 40, 3), i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{i}.png')
    return (
        '--local-batch-size',
        2,
        '--train-root',
        tmp_path / 'train',
        '--val-root',
        tmp_path / 'val',
    )


@pytest.fixture
def hanging(mpirun, root, tmp_path):
    """``hanging(where, rank, *options)``: the error of a job of 3 ranks in which a rank hangs."""
    program = root / 'tests' / 'mpi' / 'programs' / 'train_that_hangs.py'

    def run(where, rank, *options, run=mpirun, head=(), **keywords):
        options = *head, *SMOKE, '--watchdog', SECONDS, '--out', tmp_path / 'out', *options
        done = run(3, program, where, rank, *options, timeout=60, **keywords)
        ended = time.time()
        (hung,) = re.findall(r'^hangs at (.*)$', done.stdout, re.MULTILINE)
        # The watchdog's time, and five seconds for a launcher that waits for a stopped rank.
        assert SECONDS - 1 < ended - float(hung) < SECONDS + 9
        assert done.returncode not in (0, 2), done.stdout
        lines = re.findall(r'\berror: .*', done.stdout)  # below a line of mpiexec's without an end
        assert lines, done.stdout
        return lines

    return run


PARTS = [
    ('options', 0, 'the options', 'the agreement after the options'),
    ('functions', 1, 'the functions', 'the agreement after the functions'),
    ('model', 1, 'the model', "the model's broadcast"),
    ('trainer', 1, 'the trainer', 'the agreement after the checkpoint'),
    ('checkpoint', 0, 'the checkpoint', 'the agreement after the checkpoint'),
    ('agreement', 2, 'the check of all ranks', 'the agreement after the check of all ranks'),
]


@pytest.mark.parametrize('where, rank, part, others_in', PARTS, ids=[row[0] for row in PARTS])
def test_the_rank_that_others_wait_for_is_named(hanging, where, rank, part, others_in):
    (line,) = hanging(where, rank)
    names(line, rank, f'not arrived, still in {part}', others_in)


def names(line, rank, what, others_in):
    """The rank alone hangs, and the others, in the order of ranks, wait."""
    others = [r for r in range(3) if r != rank]
    assert re.fullmatch(
        rf'error: nothing has moved for {SECONDS} s \(--watchdog\); {re.escape(what)}.*: '
        rf'rank {rank} on \S+; waiting in {re.escape(others_in)}, \S+:\d+ \(\w+\): '
        rf'rank {others[0]} on \S+, rank {others[1]} on \S+',
        line,
    ), line


def test_ranks_that_meet_in_one_part_are_told_apart_by_their_lines(hanging):
    (line,) = hanging('communicator', 2)
    part = r'; in the communicator, \S+:\d+'
    others = rf'{part} \(_agreed\): rank 0 on \S+, rank 1 on \S+'
    assert re.search(rf'{others}{part} \(<lambda>\): rank 2 on \S+$', line), line


@pytest.mark.parametrize('rank', [0, 2])
def test_a_rank_that_never_starts_is_named(hanging, rank):
    lines = hanging('imports', rank)
    expected = r'not started \(.*\): rank 2; waiting in .*rank 0 on \S+.* rank 1 on \S+$'
    if rank == 0:
        expected = rf'^error: no sign of life from rank 0 for {SECONDS} s \(--watchdog\): '
    assert all(re.search(expected, line) for line in lines), lines


@pytest.mark.parametrize(
    'where, rank', [('stopped imports', 1), ('stopped model', 1), ('stopped agreement', 0)]
)
def test_a_stopped_rank_is_named(hanging, where, rank):
    lines = hanging(where, rank)
    expected = rf'no sign of life .*\brank {rank}( on \S+)?\b'
    if where == 'stopped imports':
        expected = r'not started \(.*\): rank 1; waiting'
    assert all(re.search(expected, line) for line in lines), lines


# --- The list of images ---------------------------------------------------------------------------


@pytest.mark.parametrize('head', [(), ('preflight',)], ids=['train', 'preflight'])
def test_a_slow_list_may_take_longer_than_the_watchdog_waits(mpirun, root, tmp_path, folders, head):
    program = root / 'tests' / 'mpi' / 'programs' / 'train_that_hangs.py'
    options = *head, *SMOKE, '--watchdog', SECONDS, '--out', tmp_path / 'out', *folders
    start = time.monotonic()
    done = mpirun(3, program, 'slow list', 0, *options)
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - start > 2 * 15 * 0.6 > 2 * SECONDS


@pytest.mark.parametrize('head', [(), ('preflight',)], ids=['train', 'preflight'])
def test_a_list_that_hangs_is_named(hanging, folders, head):
    (line,) = hanging('list', 0, *folders, head=head)
    waiting = 'the agreement after the list of images'
    names(line, 0, 'not arrived, still in the list of images, ', waiting)
    assert re.search(r' \d+ files and folders seen, reproduce/listing.py:\d+ ', line), line


def test_a_rank_that_stops_in_its_list_is_named(hanging, folders):
    for line in hanging('stopped list', 0, *folders):
        assert 'no sign of life from rank 0 on ' in line


def test_a_plan_that_hangs_is_named(hanging):
    (line,) = hanging('plan', 0, '--dry-run')
    names(line, 0, 'not arrived, still in the list of images, ', 'the agreement after the plan')


# --- NCCL, checkpoints, the preflight -------------------------------------------------------------


def test_a_rank_that_never_enters_nccl_is_named(hanging, on_host):
    def run(*words, **keywords):
        return on_host(*words, **keywords)[0]

    (line,) = hanging('model', 1, run=run)
    names(line, 1, 'not arrived, still in the model', "NCCL's first collective")
    for where in ('NCCL', 'NCCL broadcast'):
        (line,) = hanging(where, 1, '--overwrite', run=run)
        assert line.count("in NCCL's first collective, ") in (1, 2)
        assert all(f'rank {rank} on ' in line for rank in range(3)), line


def test_a_rank_that_hangs_going_on_is_named(hanging, mpirun, root, tmp_path):
    program = root / 'tests' / 'mpi' / 'programs' / 'train_that_hangs.py'
    options = (*SMOKE, '--out', tmp_path / 'out', '--checkpoint-every', '0.0001m')
    done = mpirun(3, program, 'plan', 0, *options)  # which a training does not make
    assert done.returncode == 0, done.stdout
    first, *_ = sorted((tmp_path / 'out' / 'checkpoints').glob('checkpoint-*.npz'))
    (tmp_path / 'out' / 'summary.json').unlink()
    (line,) = hanging('going on', 1, '--resume', first)
    names(
        line,
        1,
        'not arrived, still in going on from the checkpoint',
        'the agreement after going on from the checkpoint',
    )


def test_a_check_of_the_preflight_that_hangs_is_named(hanging):
    (line,) = hanging('clocks', 1, head=('preflight',))
    places = re.findall(r'in the check of clocks, \S+ \((\w+)\): (rank \d) on', line)
    assert sorted(places) == [('_check', 'rank 1'), ('_clocks', 'rank 0'), ('_clocks', 'rank 2')]


# --- What does not hang ---------------------------------------------------------------------------


@pytest.mark.parametrize('value', ['ten', '-1', 'nan', 'inf'])
def test_a_wrong_limit_is_one_line(mpirun, root, tmp_path, value):
    program = root / 'reproduce' / 'train.py'
    done = mpirun(2, program, *SMOKE, '--watchdog', value, '--out', tmp_path / 'out', timeout=30)
    assert done.returncode == 2, done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and '--watchdog' in errors[0], done.stdout
