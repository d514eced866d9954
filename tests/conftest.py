"""Runs real MPI jobs for the tests."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import extensions  # noqa: F401  isort: skip  (it makes Chainer importable on NumPy 2)
import chainer
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Open MPI 5's component for one-sided transfers sleeps for a second in each MPI_Init where there is
# no fabric; these tests start some thousand processes.
os.environ.setdefault('OMPI_MCA_btl', '^ofi')


def mpi_environment():
    """The environment of a job: one BLAS thread per rank, more ranks than cores allowed, root
    allowed."""
    environment = {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'OMPI_ALLOW_RUN_AS_ROOT': '1',
        'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1',
        'PRTE_MCA_rmaps_default_mapping_policy': ':oversubscribe',
        'OMP_NUM_THREADS': '1',
        'OPENBLAS_NUM_THREADS': '1',
    }
    environment.pop('IMAGENET_ROOT', None)
    return environment


def mpiexec_path():
    beside = Path(sys.executable).parent / 'mpiexec'
    return os.environ.get('MPIEXEC') or (
        str(beside) if beside.exists() else shutil.which('mpiexec')
    )


@pytest.fixture
def mpirun():
    """``mpirun(n, script, *arguments)`` runs a Python script on n ranks and returns the
    CompletedProcess.

    Without mpiexec the test fails: a job of one rank would pass where nothing is communicated.
    """

    def run(n, script, *arguments, timeout=120, **variables):
        mpiexec = mpiexec_path()
        assert mpiexec, 'no mpiexec: install the extra "mpi" or set MPIEXEC'
        return subprocess.run(
            [mpiexec, '-n', str(n), sys.executable, str(script), *map(str, arguments)],
            check=False,
            env={**mpi_environment(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope='session')
def root_of_project():
    return ROOT


@pytest.fixture(scope='session')
def job_environment():
    return mpi_environment()


@pytest.fixture(scope='session')
def mpiexec():
    return mpiexec_path()


@pytest.fixture
def leaves_nothing():
    """After the test, all that its jobs have left on this machine goes within 20 seconds:
    processes, semaphores and shared memory, temporary folders."""
    marker = f'REPRODUCE_TEST={uuid.uuid4().hex}'
    os.environ.update([marker.split('=')])
    before = _left()
    yield
    deadline = time.monotonic() + 20
    files = _left() - before
    while time.monotonic() < deadline:
        files &= _left()  # those of others come and go meanwhile
        left = files, _processes_with(marker)
        if not any(left):
            break
        time.sleep(0.2)
    del os.environ['REPRODUCE_TEST']
    assert not any(left), left


def _left():
    temporary = Path(tempfile.gettempdir())
    return {*Path('/dev/shm').iterdir(), *temporary.glob('ompi.*'), *temporary.glob('pymp-*')}


def _processes_with(marker):
    found = {}
    for process in Path('/proc').glob('[0-9]*'):
        try:
            if int(process.name) != os.getpid() and marker.encode() in (
                process / 'environ'
            ).read_bytes().split(b'\0'):
                found[process.name] = (process / 'cmdline').read_bytes()
        except OSError:
            continue
    return found


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def shallow(monkeypatch):
    """One block in each stage of ResNet-50 instead of 3 to 6, where the network is but a load."""
    from reproduce import resnet50

    monkeypatch.setattr(resnet50, 'BLOCKS', dict.fromkeys(resnet50.BLOCKS, 1))


@pytest.fixture
def gpu():
    """The first GPU, made the current device; without one the test is skipped."""
    cuda = chainer.backends.cuda
    try:
        # cuda.available alone tells only that the CUDA libraries are there.
        found = cuda.available and cuda.cupy.cuda.runtime.getDeviceCount() > 0
    except cuda.cupy.cuda.runtime.CUDARuntimeError:
        found = False
    if not found:
        pytest.skip('needs a GPU')
    device = chainer.get_device('@cupy:0')
    device.use()
    return device


@pytest.fixture(params=['CPU', pytest.param('GPU', marks=pytest.mark.gpu)])
def device(request):
    """The CPU, then the GPU where there is one."""
    return (
        request.getfixturevalue('gpu') if request.param == 'GPU' else chainer.get_device('@numpy')
    )
