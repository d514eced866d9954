"""Where the time of real jobs goes: a sleep on one rank, in one part, must be found there."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.mpi
PROGRAMS = Path(__file__).resolve().parent / 'programs'
SLEEP = 0.1
PARTS = ('data', 'forward_backward', 'pack', 'allreduce', 'update', 'extensions')


@pytest.fixture(scope='module')
def runs(job_environment, mpiexec):
    """(where, workers a process) to the rows of the ranks."""
    done = subprocess.run(
        [mpiexec, '-n', '2', sys.executable, PROGRAMS / 'timed.py'],
        check=True,
        env=job_environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    found = collections.defaultdict(dict)
    for line in done.stdout.splitlines():
        where, each, rank, *row = json.loads(line)
        found[where, each][rank] = row
    return found


def test_parts_sum_to_what_the_clock_says_on_every_rank(runs):
    assert len(runs) == 10
    for (where, _), ranks in runs.items():
        for rank, (n, ratio, _) in ranks.items():
            assert n == 4
            if where not in ('nowhere', 'first', 'validation'):  # 0.4 s, or else some ms
                assert ratio == pytest.approx(1, abs=0.02), (where, rank)


@pytest.mark.parametrize('where', PARTS)
def test_a_sleep_on_one_rank_is_found_in_its_part(runs, where):
    (*_, times), (*_, other) = (runs[where, 1][rank] for rank in range(2))
    assert times == other  # the largest of all ranks is every rank's
    sleeps = 2 if where == 'pack' else 1  # before and after the all-reduce
    assert SLEEP * sleeps <= times[f'time/{where}'] < SLEEP * (sleeps + 0.8)
    assert times['time/iteration'] >= SLEEP * sleeps
    for part in PARTS:
        # The other rank waits for it in the next all-reduce.
        if part not in (where, 'allreduce'):
            assert times[f'time/{part}'] < SLEEP / 2, part
    if where not in ('pack', 'allreduce'):
        assert times['time/allreduce'] > 0.7 * SLEEP


def test_workers_of_a_process_add_up(runs):
    *_, times = runs['data', 2][0]
    assert 2 * SLEEP <= times['time/data'] < 2.8 * SLEEP


def test_the_first_iterations_are_not_in_the_means(runs):
    *_, times = runs['first', 1][0]
    assert max(times.values()) < SLEEP


def test_a_validation_is_in_no_iteration(runs):
    """One minibatch in all, and rank 1 is late with it once an epoch."""
    *_, times = runs['validation', 1][0]
    assert SLEEP <= times.pop('time/validation') < 1.8 * SLEEP
    assert max(times.values()) < SLEEP / 2


def test_steps_of_pure_nccl_are_in_their_parts_and_nothing_is_synchronized(on_host):
    done, logs = on_host(2, PROGRAMS / 'nccl_timed.py')
    assert done.returncode == 0, done.stdout
    for rank, calls in enumerate(logs):
        assert f'rank {rank}: whole( pack( ) allreduce( ) pack( ) )' in done.stdout.splitlines()
        first, last = (
            calls.index(f'launch cupy_batched_{kind}_params') for kind in ('pack', 'unpack')
        )
        steps = [call.split()[1] for call in calls[first : last + 1]]
        assert steps[1:-1] == ['allReduce', 'div_by_size']
        assert 'synchronize' not in calls
