"""A run that is stopped, or killed, and goes on ends with the bits of one that was not."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.usefixtures('leaves_nothing')]
PROGRAMS = Path(__file__).resolve().parent / 'programs'
OPTIONS = (
    '--preset smoke --workers 4 --local-batch-size 32 --epochs 2 --width 4 '
    '--checkpoint-every 0.003m'
).split()


@pytest.fixture(scope='module')
def uninterrupted(start, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    assert start(2, out).wait(100) == 0
    return digests_of(out)


@pytest.fixture(scope='module')
def start(root_of_project, job_environment, mpiexec):
    """``start(n, out, *options)``: a running job, and its output in OUT.txt."""

    def run(n, out, *options, program=(PROGRAMS / 'shallow.py',)):
        with open(f'{out}.txt', 'a') as said:
            return subprocess.Popen(
                [mpiexec, '-n', str(n), sys.executable, *program, str(out), *OPTIONS, *options],
                cwd=root_of_project,
                env={**job_environment, 'REPRODUCE_TEST': os.environ.get('REPRODUCE_TEST', '')},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    return run


def end(job, what, limit=10):
    """Waits for the end of a job, which must come in time; ``pytest -rP`` shows when."""
    start = time.monotonic()
    status = job.wait(2 * limit)
    seconds = time.monotonic() - start
    print(f'{what}: ended after {seconds:.1f} s with status {status}')
    assert seconds < limit
    return status


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
        if (
            bytes(PROGRAMS / 'shallow.py') in words
            and str(out).encode() in words
            and b'-n' not in words
        ):
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
    assert end(job, signum.name) == 128 + signum
    said = Path(f'{out}.txt').read_text()
    message = 'stopped after iteration '
    assert said.count(message) == 1 and 'Traceback' not in said
    iteration = int(said.split(message)[1].split(',')[0])
    newest = max((out / 'checkpoints').glob('checkpoint-*'))
    assert newest.name == f'checkpoint-{iteration:09d}.npz' and iteration < 23
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
        moment = time.monotonic() + rng.uniform(0.5, 3)
        while job.poll() is None and time.monotonic() < moment:
            time.sleep(0.01)
        ranks = ranks_of(out)
        if job.poll() is None and len(ranks) == processes:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            kills += 1
            assert end(job, 'kill -9 of a rank') != 0
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
        ((), 'holds checkpoints of a run, which --resume auto goes on from'),
        (('--resume', 'auto', '--seed', '1'), 'was made with seed 0 (now 1)'),
        (('--resume', 'auto', '--epochs', '3'), 'was made with epochs 2 (now 3)'),
        (('--resume', 'auto', '--width', '8'), 'was made with width 4 (now 8)'),
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
    assert end(job, f'kill -9 of {victim}') != 0
    wait_for(lambda: not ranks_of(out), 10)
    if victim != 'mpiexec':
        said = Path(f'{out}.txt').read_text()
        assert 'error: rank ' in said and 'that loads images ended by SIGKILL' in said
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
    assert end(job, 'images vanish', 20) != 0
    said = Path(f'{out}.txt').read_text()
    assert 'digits/train/3/' in said and 'error: rank ' in said
    (out / 'elsewhere').rename(images)
    assert start(2, out, '--resume', 'auto').wait(100) == 0
    assert digests_of(out) == uninterrupted


@pytest.mark.parametrize('victim', ['rank 0', 'rank 1', 'a loader process'])
def test_what_hangs_is_named_and_nothing_is_lost(start, uninterrupted, tmp_path, victim):
    out = tmp_path / 'out'
    job = start(2, out, '--watchdog', '10')
    wait_for(has_checkpoint(out))
    ranks = {number_of(process): process for process in ranks_of(out)}
    assert sorted(ranks) == [0, 1]
    stopped = loaders_of(ranks[1])[0] if 'loader' in victim else ranks[int(victim[-1])]
    os.kill(stopped, signal.SIGSTOP)
    # The time of the watchdog, and five seconds for a launcher that does not end.
    assert end(job, f'SIGSTOP of {victim}, --watchdog 10', 20) != 0
    said = Path(f'{out}.txt').read_text().replace('\0', '')  # of Open MPI's words about an abort
    named = 'no sign of life.* rank 0 on ' if victim == 'rank 0' else ' rank 1 on '
    if victim == 'rank 1':
        named = 'no sign of life .*: rank 1 on '
    if 'loader' in victim:
        named = r'not arrived, still in .* reproduce/loader.py:.*: rank 1 on '
    assert re.search(f'^error: .*{named}', said, re.MULTILINE), said
    assert start(2, out, '--resume', 'auto').wait(100) == 0
    assert digests_of(out) == uninterrupted


def number_of(process):
    environment = Path(f'/proc/{process}/environ').read_bytes().split(b'\0')
    prefix = b'OMPI_COMM_WORLD_RANK='
    return next(int(line[len(prefix) :]) for line in environment if line.startswith(prefix))


@pytest.mark.parametrize(
    'program',
    [('train_with_inf.py',), ('train_that_fails.py', 'raise'), ('train_that_fails.py', 'segfault')],
    ids=' '.join,
)
def test_a_rank_that_fails_loses_nothing(start, uninterrupted, tmp_path, program):
    """An infinite gradient, an exception, a segmentation fault in an early iteration."""
    out = tmp_path / 'out'
    name, *how = program
    program = (PROGRAMS / name, *how, '--out')
    job = start(2, out, '--checkpoint-every', '0.0001m', program=program)
    assert job.wait(60) != 0
    iterations = [int(p.stem[-9:]) for p in (out / 'checkpoints').glob('checkpoint-*')]
    assert max(iterations, default=0) in (1, 2), Path(f'{out}.txt').read_text()
    assert start(2, out, '--resume', 'auto').wait(100) == 0
    assert digests_of(out) == uninterrupted


def test_a_clock_that_jumps_back_changes_nothing(start, uninterrupted, tmp_path):
    """Neither in a run, nor what is the newest checkpoint."""
    out = tmp_path / 'out'
    program = (PROGRAMS / 'train_with_clock.py',)
    job = start(2, out, '--checkpoint-every', '0.001m', program=program)
    wait_for(lambda: len(list((out / 'checkpoints').glob('checkpoint-*.npz'))) == 2)
    job.send_signal(signal.SIGUSR1)
    assert end(job, 'SIGUSR1 to mpiexec') == 128 + signal.SIGUSR1
    newer = max((out / 'checkpoints').glob('checkpoint-*.npz'))
    os.utime(newer, (0, 0))
    assert start(2, out, '--resume', 'auto').wait(100) == 0
    assert f'goes on from {newer}' in Path(f'{out}.txt').read_text()
    assert digests_of(out) == uninterrupted


def test_a_full_disk_loses_nothing(start, uninterrupted, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'none', str(out)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip('may not mount a tmpfs')
    try:
        job = start(2, out)
        wait_for(has_checkpoint(out))
        filler = out / 'filler'
        with contextlib.suppress(OSError), open(filler, 'wb', buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        assert job.wait(60) != 0  # with the first file that must be written
        filler.unlink()
        said = Path(f'{out}.txt').read_text()
        assert 'was not written: No space left on device' in said
        assert not list((out / 'checkpoints').glob('.*'))
        assert start(2, out, '--resume', 'auto').wait(100) == 0
        assert digests_of(out) == uninterrupted
    finally:
        subprocess.run(['umount', '-l', str(out)], check=True)
