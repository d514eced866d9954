"""The fixture itself: it fails for what its own test left, and for nothing that another job has."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.mpi, pytest.mark.slow]
# As a rank does with loader processes, but without a janitor.
JOB = """
import _multiprocessing, os, time
from mpi4py import MPI
lock = _multiprocessing.SemLock(1, 1, 1, f'/reproduce-{os.getpid()}-test', False)
MPI.COMM_WORLD.barrier()
print(os.getpid(), flush=True)
time.sleep(100)
"""
LEAVING = """
import os, signal, subprocess, sys

def test_it(leaves_nothing, job_environment, mpiexec):
    job = subprocess.Popen(
        [mpiexec, '-n', '2', sys.executable, '-c', {job!r}],
        env=job_environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )
    ranks = [int(job.stdout.readline()) for _ in range(2)]
    print('ranks', *ranks)
    for process in (job.pid, ranks[0]):
        os.kill(process, signal.SIGKILL)
"""
PATIENT = """
import pathlib, time

def test_it(leaves_nothing):
    pathlib.Path('begun').touch()
    while not pathlib.Path('running').exists():
        time.sleep(0.05)
"""


@pytest.fixture
def pytest_on(root, tmp_path):
    """``pytest_on(text)``: pytest, running on a file of its own with the fixtures of conftest."""

    def start(text):
        (tmp_path / 'conftest.py').write_text('from tests.conftest import *\n')
        (tmp_path / 'test_it.py').write_text(text)
        return subprocess.Popen(
            [sys.executable, '-m', 'pytest', '-q', '-rP', 'test_it.py'],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': str(root)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def test_it_fails_for_what_a_killed_job_leaves(pytest_on):
    said, _ = pytest_on(LEAVING.format(job=JOB)).communicate(timeout=120)
    ranks = list(map(int, re.search(r'^ranks (\d+) (\d+)$', said, re.MULTILINE).groups()))
    semaphores = [Path(f'/dev/shm/sem.reproduce-{rank}-test') for rank in ranks]
    try:
        assert '1 passed, 1 error' in said, said
        left = '\n'.join(line for line in said.splitlines() if line.startswith('E '))
        for what in (*map(str, semaphores), 'sm_segment.', '/ompi.'):
            assert what in left, (what, said)
        os.kill(ranks[1], signal.SIGKILL)  # is there still
        assert f"('{ranks[1]}', " in left
    finally:
        for semaphore in semaphores:
            semaphore.unlink(missing_ok=True)


def test_it_does_not_count_a_job_that_runs_beside(pytest_on, mpiexec, job_environment, tmp_path):
    tests = pytest_on(PATIENT)
    while not (tmp_path / 'begun').exists():
        assert tests.poll() is None, tests.stdout.read()
        time.sleep(0.05)
    job = subprocess.Popen(
        [mpiexec, '-n', '2', sys.executable, '-c', JOB],
        env=job_environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    ranks = [int(job.stdout.readline()) for _ in range(2)]
    (tmp_path / 'running').touch()
    try:
        said, _ = tests.communicate(timeout=60)
        assert job.poll() is None
        assert tests.returncode == 0, said
        assert all(Path(f'/dev/shm/sem.reproduce-{rank}-test').exists() for rank in ranks)
    finally:
        job.terminate()
        job.wait(20)
        for rank in ranks:
            Path(f'/dev/shm/sem.reproduce-{rank}-test').unlink(missing_ok=True)
