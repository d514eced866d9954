"""A run that is stopped, or killed, and goes on ends with the bits of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.mpi, pytest.mark.slow]
OPTIONS = (
    '--preset smoke --workers 4 --local-batch-size 8 --epochs 2 --width 4 --checkpoint-every 0.01m'
).split()


@pytest.fixture(scope='module')
def uninterrupted(start, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    assert start(2, out).wait(100) == 0
    return digests_of(out)


@pytest.fixture(scope='module')
def start(root_of_project, job_environment, mpiexec):
    """``start(n, out, *options)``: a running job, and its output in OUT.txt."""

    def run(n, out, *options):
        with open(f'{out}.txt', 'a') as said:
            return subprocess.Popen(
                [mpiexec, '-n', str(n), sys.executable, '-m', 'reproduce.invariance', str(out)]
                + [*OPTIONS, *options],
                cwd=root_of_project,
                env=job_environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    return run


def digests_of(out):
    return json.loads((out / 'digests.json').read_text())


def ranks_of(out):
    """Process numbers of the job's ranks, from the command lines of all processes."""
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        try:
            words = (process / 'cmdline').read_bytes().split(b'\0')
        except OSError:
            continue
        if b'reproduce.invariance' in words and str(out).encode() in words and b'-n' not in words:
            found.append(int(process.name))
    return sorted(found)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_checkpoint(out):
    return lambda: any((out / 'checkpoints').glob('checkpoint-*.npz'))


@pytest.mark.parametrize('signum', [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(start, uninterrupted, tmp_path, signum):
    out = tmp_path / 'out'
    job = start(2, out)
    wait_for(has_checkpoint(out))
    os.kill(ranks_of(out)[-1], signum)
    assert job.wait(20) == 128 + signum
    said = Path(f'{out}.txt').read_text()
    message = f'error: stopped by {signum.name} after iteration '
    assert said.count(message) == 1 and 'Traceback' not in said
    iteration = int(said.split(message)[1].split(';')[0])
    newest = max((out / 'checkpoints').iterdir())
    assert newest.name == f'checkpoint-{iteration:09d}.npz' and iteration < 90
    assert start(4, out, '--resume', 'auto').wait(100) == 0
    assert digests_of(out) == uninterrupted
    log = json.loads((out / 'log').read_text())
    assert [entry['epoch'] for entry in log] == [1, 2]


def test_mpiexec_passes_slurms_signal_on(start, tmp_path):
    out = tmp_path / 'out'
    job = start(2, out)
    wait_for(has_checkpoint(out))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 128 + signal.SIGUSR1


@pytest.mark.timeout(600)
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(start, uninterrupted, tmp_path):
    """Many times in one run, on 1, 2 and 4 processes, while a checkpoint is written too."""
    out, rng, kills = tmp_path / 'out', random.Random(0), 0

    def newest():
        return max((out / 'checkpoints').glob('checkpoint-*'), default=None)

    while True:
        before = newest()
        job = start(rng.choice((1, 2, 4)), out, '--resume', 'auto')
        deadline = time.monotonic() + 60
        while job.poll() is None and newest() == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0))
        ranks = ranks_of(out)
        if job.poll() is not None or not ranks or kills == 8:
            break
        os.kill(rng.choice(ranks), signal.SIGKILL)
        kills += 1
        assert job.wait(10) != 0
    assert job.wait(100) == 0, Path(f'{out}.txt').read_text()
    assert kills >= 3
    assert digests_of(out) == uninterrupted
    assert ranks_of(out) == []
    assert not list((out / 'checkpoints').glob('.*'))


def test_a_folder_belongs_to_one_run(start, uninterrupted, tmp_path):
    out = tmp_path / 'out'
    job = start(1, out)
    wait_for(has_checkpoint(out))
    assert start(1, out).wait(30) == 2
    assert f'--out {out} is in use by another run' in Path(f'{out}.txt').read_text()
    job.send_signal(signal.SIGUSR1)
    job.wait(20)
    for options, message in (
        ((), 'holds checkpoints of a run, which --resume auto takes'),
        (('--resume', 'auto', '--seed', '1'), 'was made with seed 0 and now 1'),
        (('--resume', 'auto', '--epochs', '3'), 'was made with epochs 2 and now 3'),
        (('--resume', str(tmp_path / 'nowhere')), 'nowhere'),
    ):
        assert start(1, out, *options).wait(30) == 2
        assert message in Path(f'{out}.txt').read_text()
    assert start(1, out, '--resume', 'auto').wait(100) == 0
    assert digests_of(out) == uninterrupted
    assert start(1, out).wait(30) == 2
    assert 'holds a finished run' in Path(f'{out}.txt').read_text()
    assert start(1, out, '--overwrite', '--seed', '1').wait(100) == 0
    assert digests_of(out) != uninterrupted
