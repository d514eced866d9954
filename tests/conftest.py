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
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def _count_gpus():
    """The GPUs that CUDA shows this process. CUDA reads CUDA_VISIBLE_DEVICES once, at this call."""
    cuda = chainer.backends.cuda
    if not cuda.available:  # which alone tells only that the CUDA libraries are there
        return 0
    try:
        return cuda.cupy.cuda.runtime.getDeviceCount()
    except cuda.cupy.cuda.runtime.CUDARuntimeError:
        return 0


# Only tests marked gpu see the GPUs, see hide_gpus. What a session or module starts is for CPUs.
N_GPUS = _count_gpus()
VISIBLE_GPUS = os.environ.get('CUDA_VISIBLE_DEVICES')
os.environ['CUDA_VISIBLE_DEVICES'] = ''

# Open MPI 5's component for one-sided transfers sleeps for a second in each MPI_Init where there is
# no fabric; these tests start some thousand processes.
os.environ.setdefault('OMPI_MCA_btl', '^ofi')


def mpi_environment():
    """The environment of a job: one BLAS thread per rank, more ranks than cores allowed, root
    allowed."""
    inherited = [os.environ['PYTHONPATH']] if os.environ.get('PYTHONPATH') else []
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(ROOT), *inherited]),
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
    CompletedProcess, without the byte of zero that Open MPI writes after its words about an abort.

    Without mpiexec the test fails: a job of one rank would pass where nothing is communicated.
    """

    def run(n, script, *arguments, timeout=120, **variables):
        mpiexec = mpiexec_path()
        assert mpiexec, 'no mpiexec: install the extra "mpi" or set MPIEXEC'
        done = subprocess.run(
            [mpiexec, '-n', str(n), sys.executable, str(script), *map(str, arguments)],
            check=False,
            env={**mpi_environment(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        done.stdout = done.stdout.replace('\0', '')
        return done

    return run


@pytest.fixture(scope='session')
def cupy_on_host(tmp_path_factory):
    """Variables of a process that is to find tests/cupy_on_host and its eight GPUs."""
    if shutil.which('g++') is None:
        pytest.skip('needs g++, which compiles the kernels for the host')
    return {
        'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests' / 'cupy_on_host')]),
        'HOST_KERNELS': str(tmp_path_factory.mktemp('kernels')),
        'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7',
    }


@pytest.fixture
def on_host(mpirun, cupy_on_host, tmp_path):
    """``on_host(n, script, *arguments)`` is mpirun on GPUs that tests/cupy_on_host stands for.

    Returns the CompletedProcess, and each rank's calls of the device, see host_calls.py.
    """

    def run(n, script, *arguments, **keywords):
        keywords = {**cupy_on_host, 'HOST_CALLS': str(tmp_path / 'calls'), **keywords}
        done = mpirun(n, script, *arguments, **keywords)
        logs = [tmp_path / f'calls.{rank}' for rank in range(n)]
        return done, [log.read_text().splitlines() if log.exists() else [] for log in logs]

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
def leaves_nothing(job_environment, monkeypatch):
    """After the test, all that its jobs have left on this machine goes within 20 seconds:
    processes, semaphores and shared memory, temporary folders.

    Those of other jobs do not count. The processes carry a marker in their environment. Temporary
    folders and the shared memory of Open MPI lie in folders of their own, whose paths are short,
    since those of sockets are limited. A semaphore that another process has open is not the test's.
    """
    folder = Path(tempfile.mkdtemp(prefix='t'))
    shared = Path('/dev/shm', folder.name)
    shared.mkdir()
    own = {
        'REPRODUCE_TEST': uuid.uuid4().hex,
        'TMPDIR': str(folder),
        'OMPI_MCA_btl_sm_backing_directory': str(shared),
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(job_environment, name, value)
    before = _of_python()
    yield
    deadline = time.monotonic() + 20
    semaphores = _of_python() - before
    while True:
        mine, others = _processes(own['REPRODUCE_TEST'])
        used = _mapped_by(others)
        semaphores = {s for s in semaphores & _of_python() if s[0] not in used}
        left = [*folder.iterdir(), *shared.iterdir(), *semaphores, *mine.items()]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    shutil.rmtree(folder)
    shutil.rmtree(shared)
    assert not left, '\n'.join(map(str, left))


def _of_python():
    """Inodes and paths of this user's named semaphores and shared memory of multiprocessing."""
    with os.scandir('/dev/shm') as entries:
        return {
            (entry.inode(), entry.path)
            for entry in entries
            if entry.name.startswith(('sem.', 'psm_')) and os.access(entry.path, os.R_OK)
        }


def _processes(marker):
    """The processes of this test by number, with their command lines; the numbers of all others."""
    mine, others = {}, []
    for process in Path('/proc').glob('[0-9]*'):
        try:
            environment = (process / 'environ').read_bytes().split(b'\0')
            if f'REPRODUCE_TEST={marker}'.encode() not in environment:
                others.append(process.name)
            elif int(process.name) != os.getpid():
                mine[process.name] = (process / 'cmdline').read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
    return mine, others


def _mapped_by(processes):
    """Inodes in /dev/shm that any of these processes uses. A semaphore is mapped by another path
    than its final one."""
    found = set()
    for process in processes:
        try:
            maps = Path('/proc', process, 'maps').read_text()
        except OSError:
            continue
        found |= {int(line.split()[4]) for line in maps.splitlines() if '/dev/shm/' in line}
    return found


@pytest.fixture(scope='session')
def image_folders(tmp_path_factory):
    """Small PNG folders: TRAIN with 2 classes x 8 images, VAL with 2 x 5."""
    top = tmp_path_factory.mktemp('images')
    rng = np.random.RandomState(0)
    for split, count in (('train', 8), ('val', 5)):
        for name in ('cat', 'dog'):
            (top / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(top / split / name / f'{i}.png')
    return top


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def shallow(monkeypatch):
    """One block in each stage of ResNet-50 instead of 3 to 6, where the network is but a load."""
    from reproduce import resnet50

    monkeypatch.setattr(resnet50, 'BLOCKS', dict.fromkeys(resnet50.BLOCKS, 1))


@pytest.fixture(autouse=True)
def hide_gpus(request, monkeypatch):
    """A test for CPUs finds no GPU, and neither do its jobs; one marked ``gpu`` finds all."""
    if request.node.get_closest_marker('gpu') is None:
        if N_GPUS:
            monkeypatch.setattr('cupy.cuda.runtime.getDeviceCount', lambda: 0)
    elif VISIBLE_GPUS is None:
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    else:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', VISIBLE_GPUS)


@pytest.fixture
def gpu():
    """The first GPU, made the current device; without one the test is skipped."""
    if not N_GPUS:
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
