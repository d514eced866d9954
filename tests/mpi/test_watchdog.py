"""The watchdog on real ranks: whom it names, and when it keeps still."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.mpi


@pytest.fixture
def watched(mpirun, root):
    return lambda how: mpirun(3, root / 'tests' / 'mpi' / 'programs' / 'watched.py', how)


@pytest.mark.parametrize('how', ['slow', 'late', 'off'])
def test_it_keeps_still_while_any_rank_moves_or_when_it_is_off(watched, how):
    done = watched(how)
    assert done.returncode == 0, done.stdout
    assert all(f'rank {rank} ended' in done.stdout for rank in range(3))
    assert 'error' not in done.stdout


def test_it_names_the_rank_that_the_others_wait_for(watched):
    done = watched('behind')
    ended = time.time()
    started = max(map(float, re.findall(r'^started (.*)$', done.stdout, re.MULTILINE)))
    assert done.returncode == 1, done.stdout
    assert re.search(
        r'^error: nothing has moved for 2 s \(--watchdog\); not arrived, still in iteration 0, .*: '
        r'rank 1 on \S+; waiting in iteration 1, .*: rank 0 on \S+, rank 2 on \S+$',
        done.stdout,
        re.MULTILINE,
    ), done.stdout
    assert 2 < ended - started < 10


@pytest.mark.parametrize('rank', [0, 1])
def test_a_silent_rank_alone_ends_the_job_although_others_move(watched, rank):
    done = watched(f'silent {rank}')
    ended = time.time()
    started = max(map(float, re.findall(r'^started (.*)$', done.stdout, re.MULTILINE)))
    assert done.returncode not in (0, None), done.stdout
    named = rf'^error: .*no sign of life .*\brank {rank} on '
    assert re.search(named, done.stdout, re.MULTILINE), done.stdout
    assert 'ended' not in done.stdout
    # The watchdog's two seconds, and five for a launcher that waits for a stopped rank.
    assert 2 < ended - started < 12


def test_an_ending_that_all_agreed_on_is_not_held_up(watched):
    done = watched('agreed')
    assert done.returncode == 3, done.stdout
    assert 'nothing has moved' not in done.stdout


def test_the_end_of_a_run_does_not_wait_for_the_next_look(watched):
    """Those of a running job are half a second apart: with them 20 ends took a minute."""
    done = watched('often')
    assert done.returncode == 0, done.stdout
    assert max(map(float, re.findall('^20 took (.*)$', done.stdout, re.MULTILINE))) < 15


def test_a_job_that_is_suspended_as_a_whole_goes_on(root, mpiexec, job_environment):
    program = root / 'tests' / 'mpi' / 'programs' / 'watched.py'
    job = subprocess.Popen(
        [mpiexec, '-n', '3', sys.executable, program, 'pause'],
        env=job_environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        assert 'started' in job.stdout.readline()
    children = subprocess.run(
        ['pgrep', '-P', str(job.pid)], check=True, capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 3
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for child in children:
            os.kill(int(child), signum)
        time.sleep(5)
    assert job.wait(20) == 0
    assert job.stdout.read().count('ended') == 3


@pytest.mark.parametrize('how', ['hidden', 'seen'])
def test_it_ends_a_job_whose_launcher_it_cannot_see(root, job_environment, how):
    """Many clusters hide other users' processes (hidepid), of which srun's daemon is one."""
    program = root / 'tests' / 'mpi' / 'programs' / 'watched.py'
    # A shell as the launcher, in a /proc in which it is number 1, and an empty folder over it.
    hide = 'mount -t tmpfs none /proc/1' if how == 'hidden' else 'true'
    script = f'{hide} || exit 99; "$@"; exit $?'
    space = 'unshare --mount --pid --fork --mount-proc --kill-child sh -c'.split()
    try:
        done = subprocess.run(
            [*space, script, 'sh', sys.executable, program, 'stands still'],
            env=job_environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=40,
        )
    except FileNotFoundError:
        pytest.skip('needs unshare')
    if 'started' not in done.stdout:
        pytest.skip(f'may not make namespaces: {done.stderr}')
    assert done.returncode not in (0, 99)
    assert 'error: nothing has moved for 2 s' in done.stderr and 'Traceback' not in done.stderr


def test_a_watchdog_that_fails_ends_the_job(watched):
    done = watched('position')
    assert done.returncode == 1, done.stdout
    assert 'error: the watchdog of rank 1 on ' in done.stdout
