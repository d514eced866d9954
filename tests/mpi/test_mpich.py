"""Jobs on Debian's MPICH, and under the launcher of another MPI.

mpi4py's wheel can load MPICH, which spares the tests its compilation.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

_LIBRARIES = [*Path('/usr/lib').glob('*/libmpich.so.12')]
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.slow,
    pytest.mark.usefixtures('leaves_nothing'),
    pytest.mark.skipif(
        not (shutil.which('mpiexec.mpich') and _LIBRARIES and sys.prefix != sys.base_prefix),
        reason='needs MPICH (Debian: mpich)',
    ),
]
SHALLOW = Path(__file__).resolve().parent / 'programs' / 'shallow.py'
OPTIONS = '--preset smoke --workers 4 --local-batch-size 32 --epochs 2 --width 4 --shallow'.split()


@pytest.fixture
def mpich(tmp_path, job_environment):
    """The environment in which this Python's mpi4py loads MPICH."""
    (tmp_path / 'libmpi.so.12').symlink_to(_LIBRARIES[0])
    return {
        **job_environment,
        'LD_LIBRARY_PATH': str(tmp_path),
        'MPI4PY_MPIABI': 'mpich',
        'REPRODUCE_TEST': os.environ['REPRODUCE_TEST'],
    }


@pytest.fixture
def start(root_of_project):
    """``start(environment, out, *words)``: a running job; what it says is in OUT.txt."""

    def run(environment, out, *words):
        with open(f'{out}.txt', 'a') as said:
            return subprocess.Popen(
                [*map(str, words)],
                cwd=root_of_project,
                env={**environment, 'REPRODUCE_TEST': os.environ['REPRODUCE_TEST']},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    return run


def on_mpich(out, *options):
    program = [sys.executable, SHALLOW, out, *OPTIONS, *options]
    return ['mpiexec.mpich', '-n', '2', '-hosts', 'localhost:2', *program]


def said_by(out):
    return Path(f'{out}.txt').read_text()


def test_mpich_trains_to_the_same_bits_and_stops_with_a_checkpoint(
    start, mpich, mpiexec, job_environment, tmp_path
):
    one, out = tmp_path / 'one', tmp_path / 'out'
    program = [sys.executable, SHALLOW, one, *OPTIONS]
    assert start(job_environment, one, mpiexec, '-n', 2, *program).wait(200) == 0, said_by(one)
    job = start(mpich, out, *on_mpich(out, '--checkpoint-every', '0.003m'))
    deadline = time.monotonic() + 100
    while not list((out / 'checkpoints').glob('checkpoint-*')):
        assert time.monotonic() < deadline and job.poll() is None, said_by(out)
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) != 0
    assert said_by(out).count('stopped after iteration') == 1, said_by(out)
    assert start(mpich, out, *on_mpich(out, '--resume', 'auto')).wait(200) == 0, said_by(out)
    for folder, name in ((one, r'Open MPI v\S+'), (out, r'MPICH \S+')):
        (versions,) = set(re.findall('^versions .*', said_by(folder), re.MULTILINE))
        assert re.search(f', mpi {name}$', versions), versions
    digests = [json.loads((folder / 'digests.json').read_text()) for folder in (one, out)]
    assert digests[0] == digests[1]


def test_a_launcher_of_another_mpi(start, mpich, mpiexec, job_environment, tmp_path):
    """Each rank would be a job of its own, all in one folder."""
    program = [sys.executable, 'reproduce/train.py', '--preset', 'smoke', '--out']
    # Where Open MPI leaves what no mpiexec removes.
    elsewhere = {'OMPI_MCA_btl_sm_backing_directory': str(tmp_path), 'TMPDIR': str(tmp_path)}
    for environment, launcher, name, library in (
        ({**job_environment, **elsewhere}, 'mpiexec.mpich', "MPICH's", r'Open MPI v\S+'),
        (mpich, mpiexec, "Open MPI's", r'MPICH \S+'),
    ):
        message = (
            f'error: {name} mpiexec started 2 processes, but the MPI of this Python '
            rf'\({library}\) sees 2 jobs of one process: start with \./run_mpi\.sh'
        )
        out = tmp_path / Path(launcher).name
        job = start(environment, out, launcher, '-n', 2, *program, out)
        assert job.wait(100) not in (0, None)
        assert len(re.findall(f'^{message}', said_by(out), re.MULTILINE)) == 1, said_by(out)
        assert not out.exists()
