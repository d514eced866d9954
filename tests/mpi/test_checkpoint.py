"""A run that is stopped, or killed, and goes on ends with the bits of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
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
    rank = ranks_of(out)[-1]
    os.kill(rank, signum)
    if signum != signal.SIGINT:
        os.kill(rank, signum)
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
    """20 times, on 1, 2 and 4 processes: at the start, in training, while a checkpoint is written.
    A run that reached its end is followed by another."""
    rng, kills, finished = random.Random(0), 0, 0
    while kills < 20:
        out = tmp_path / str(finished)
        processes = rng.choice((1, 2, 4))
        job = start(processes, out, '--resume', 'auto', '--checkpoint-every', '0.002m')
        moment = time.monotonic() + rng.uniform(1, 5)
        while job.poll() is None and time.monotonic() < moment:
            time.sleep(0.01)
        ranks = ranks_of(out)
        if job.poll() is None and len(ranks) == processes:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            kills += 1
            assert job.wait(10) != 0
            # Killed after its last result: nothing is left to go on with.
            finished += (out / 'summary.json').exists()
        else:
            assert job.wait(60) == 0, Path(f'{out}.txt').read_text()
            assert digests_of(out) == uninterrupted
            finished += 1
    out = tmp_path / str(finished)
    assert start(2, out, '--resume', 'auto').wait(60) == 0
    assert digests_of(out) == uninterrupted
    log = json.loads((out / 'log').read_text())
    assert [entry['epoch'] for entry in log] == [1, 2]
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


def test_the_best_is_kept(start, tmp_path):
    out = tmp_path / 'out'
    every = ('--checkpoint-every', '1', '--keep-checkpoints', '1', '--epochs', '6', '--width', '8')
    assert start(2, out, *every).wait(100) == 0
    log = json.loads((out / 'log').read_text())
    top1 = [entry['validation/main/accuracy'] for entry in log]
    best = np.load(out / 'checkpoints' / 'best.npz')
    assert best['updater/iteration'] == log[int(np.argmax(top1))]['iteration']
    assert [path.name for path in sorted((out / 'checkpoints').iterdir())] == [
        'best.npz',
        f'checkpoint-{log[-1]["iteration"]:09d}.npz',
    ]


@pytest.mark.parametrize('victim', ['loader process', 'mpiexec'])
def test_a_killed_helper_ends_the_job_and_loses_nothing(start, uninterrupted, tmp_path, victim):
    out = tmp_path / 'out'
    job = start(2, out)
    wait_for(has_checkpoint(out))
    ranks = ranks_of(out)
    assert len(ranks) == 2
    os.kill(job.pid if victim == 'mpiexec' else loaders_of(ranks[1])[0], signal.SIGKILL)
    assert job.wait(10) != 0
    wait_for(lambda: not ranks_of(out), 10)
    if victim != 'mpiexec':
        said = Path(f'{out}.txt').read_text()
        assert 'error: rank ' in said and 'a process that loads images died' in said
    assert start(2, out, '--resume', 'auto').wait(100) == 0
    assert digests_of(out) == uninterrupted


def loaders_of(rank):
    """The loader processes of a rank: children of its fork server."""
    children = {}
    for process in Path('/proc').glob('[0-9]*'):
        try:
            fields = (process / 'stat').read_text().rpartition(')')[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(process.name))
    return sorted(
        grandchild for child in children.get(rank, []) for grandchild in children.get(child, [])
    )


def test_an_image_that_vanishes_ends_the_job_and_loses_nothing(start, uninterrupted, tmp_path):
    out = tmp_path / 'out'
    job = start(2, out)
    wait_for(has_checkpoint(out))
    images = out / 'digits' / 'train' / '3'
    images.rename(out / 'elsewhere')
    assert job.wait(20) != 0
    said = Path(f'{out}.txt').read_text()
    assert 'digits/train/3/' in said and 'error: rank ' in said
    (out / 'elsewhere').rename(images)
    assert start(2, out, '--resume', 'auto').wait(100) == 0
    assert digests_of(out) == uninterrupted
