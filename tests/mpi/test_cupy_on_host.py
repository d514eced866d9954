"""The GPU's paths on tests/cupy_on_host, without a GPU, and how strict that CuPy is."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.mpi
PROGRAMS = Path(__file__).resolve().parent / 'programs'
TRAIN = PROGRAMS / 'shallow.py'
PYTEST = ('-m', 'pytest', '-q', '-p', 'no:cacheprovider')
SMOKE = ('--preset', 'smoke', '--width', 4)


@pytest.fixture
def python(cupy_on_host, root):
    """``python(*words, **variables)`` runs Python where it finds that CuPy."""

    def run(*words, timeout=120, **variables):
        return subprocess.run(
            [sys.executable, *words],
            check=False,
            cwd=root,
            env={**os.environ, **cupy_on_host, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    return run


# --- It refuses what CuPy refuses -----------------------------------------------------------------

REFUSED = {
    'a + host': 'TypeError: Unsupported type',
    'host + a': 'TypeError: Unsupported type',
    'a += host': 'TypeError: Unsupported type',
    'a[:] = host': 'ValueError: non-scalar numpy.ndarray cannot be used for fill',
    'cupy.add(a, host)': 'TypeError: Unsupported type',
    'numpy.asarray(a)': 'TypeError: Implicit conversion to a NumPy array is not allowed',
    'numpy.concatenate([a, a])': 'TypeError: no implementation found',
    'a.set(host.astype("f8"))': 'TypeError',
    'a.get(out=numpy.empty(3))': 'TypeError',
    'a.flags.writeable': 'AttributeError',
    'a.tofile_of_none': 'AttributeError',
    'cupy.nonesuch': 'AttributeError',
    'cupy.cuda.cudnn': 'AttributeError',
    'cupy.linalg.svd(a)': 'AttributeError',
    'cupy.cuda.Graph()': 'NotImplementedError: the CuPy of host memory lacks cupy.cuda.Graph',
    'hash(a)': 'TypeError',
    'bool(a)': 'ValueError: The truth value',
    'cupy.cuda.Device(8).use()': 'CUDARuntimeError: cudaErrorInvalidDevice',
    'with cupy.cuda.Device(1): a + a': 'ValueError: array device must be same as the current',
    'twice(host)': 'TypeError: Unsupported type',
    'twice(a.astype("f8"))': 'TypeError: Type is mismatched',
    'twice(a, cupy.empty(1, "f4"))': 'ValueError: Out shape is mismatched',
    'raw((1,), (4,), (a, numpy.int32(3), a))': 'TypeError: raw takes 2 arguments, not 3',
    'raw((1,), (4,), (host, 3))': 'TypeError: Unsupported type',
    'raw((1,), (4,), (a, numpy.int16(3)))': 'TypeError: raw: argument 2 is smaller than',
    'raw((0,), (4,), (a, 3))': 'CUDARuntimeError: CUDA_ERROR_INVALID_VALUE',
    'raw((1,), (2048,), (a, 3))': 'CUDARuntimeError: CUDA_ERROR_INVALID_VALUE',
    'compiled("<cupy/carray.cuh>", "half")': 'error: ‘half’ was not declared',
    'compiled("<cuda_fp16.h>", "float32")': 'error: ‘float32’ was not declared',
    'in_child(lambda: a + a)': 'CUDARuntimeError: cudaErrorInitializationError',
}
SETUP = """
import multiprocessing
import cupy, numpy
host = numpy.arange(3, dtype='f4')
a = cupy.asarray(host)
twice = cupy.ElementwiseKernel('float32 x', 'float32 y', 'y = 2 * x', 'twice')
raw = cupy.RawKernel('''extern "C" __global__ void raw(float *a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) a[i] *= 10;
}''', 'raw')
def compiled(header, kind):
    code = f'#include {header}\\nextern "C" __global__ void f(float *a) {{ {kind} x(a[0]); }}'
    return cupy.RawKernel(code, 'f')
def in_child(function):
    def call(queue):
        try:
            function()
        except Exception as error:
            queue.put(error)
    fork = multiprocessing.get_context('fork')
    queue = fork.Queue()
    fork.Process(target=call, args=(queue,)).start()
    raise queue.get(timeout=20)
"""
ALLOWED = """
assert (a + 1).get().tolist() == [1, 2, 3] and (numpy.float32(2) * a).get().tolist() == [0, 2, 4]
assert isinstance(a.sum(), cupy.ndarray) and a.sum().shape == () and float(a.max()) == 2
assert isinstance(a[1], cupy.ndarray) and cupy.allclose(a, a).shape == ()
a[1] = numpy.float32(7)
a[a > 5] = 5
assert twice(a).get().tolist() == [0, 10, 4] and twice(a[::-1]).get().tolist() == [4, 10, 0]
raw((2,), (2,), (a, 3))
assert a.get().tolist() == [0, 50, 20]
compiled('<cuda_fp16.h>', 'half')
values = numpy.random.RandomState(0).randint(0, 1 << 32, 20000, numpy.uint32).view('f4')
edges = [65519, 65520, 6e-8, 2.9e-8, 3e-8, -0.0, 1 + 2**-11]
values = numpy.concatenate([values, edges], dtype='f4')
with numpy.errstate(all='ignore'):
    expected = values.astype('f2').view('u2')
cast = cupy.ElementwiseKernel('T x', 'float16 y', 'y = x', 'cast')
for kind in ('f4', 'f8'):
    found = cast(cupy.asarray(values.astype(kind))).get()
    numpy.testing.assert_array_equal(found.view('u2')[~numpy.isnan(values)],
                                     expected[~numpy.isnan(values)])
back = cupy.ElementwiseKernel('float16 x', 'float32 y', 'y = x', 'back')
every = numpy.arange(1 << 16).astype('u2').view('f2')
numpy.testing.assert_array_equal(back(cupy.asarray(every)).get(), every.astype('f4'))
reduce = cupy.ReductionKernel('T x, float32 f', 'T y', 'x * f', 'a * b', 'y = a + 1', '1')
assert reduce(cupy.asarray(host) + 1, 2).get() == 2 * 4 * 6 + 1
total = a.sum()
total += 1
assert total.get() == 71 and (1. / total).dtype == 'f4' and (1. / total).shape == ()
assert (a.astype('f2') + total).dtype == 'f4' and (a * numpy.float64(2)).dtype == 'f8'
images = cupy.zeros((2, 4, 5, 3), 'f4').transpose(0, 3, 1, 2)
means = cupy.zeros((1, 3, 1, 1), 'f4')
assert (images + means).flags.c_contiguous
less = cupy.ElementwiseKernel('T x, U mean, float32 f, raw T r', 'T y', 'y = x - mean', 'less')
import host_calls, json
for x in (images, images.copy(), images[:, :, :, ::2]):
    host_calls.kernels.clear()
    less(x, means, 0, x)
    [kernel] = map(json.loads, host_calls.kernels)
    n_axes = 4 if x.shape[3] == 3 else 3  # rows and columns of an image are one
    contiguous = x.flags.c_contiguous
    assert kernel['arguments'] == [
        ['float32', n_axes, contiguous], ['float32', n_axes, False], None,
        ['float32', 4, contiguous], ['float32', n_axes, True]]
    assert kernel['class'] == 'ElementwiseKernel' and kernel['made with']['name'] == 'less'
before = len(host_calls.calls)
float((a.reshape(3, 1) + a[None])[0, 0])
a.get()
assert host_calls.calls[before:] == ['launch add', 'wait get', 'wait get']
"""


def test_it_refuses_what_cupy_refuses(python):
    program = f'{SETUP}\nimport traceback\nfor line in {list(REFUSED)}:\n'
    program += '    try:\n        exec(line)\n        print(line, "=> accepted")\n'
    program += '    except Exception as e: print(line, "=>", f"{type(e).__name__}: {e}"[:3000])\n'
    done = python('-c', program, LC_ALL='C.UTF-8')
    assert done.returncode == 0, done.stdout
    for line, message in REFUSED.items():
        found = done.stdout.split(f'{line} => ')[1].split(' => ')[0]
        assert message in found, (line, found)


def test_what_it_accepts_is_right(python):
    done = python('-c', SETUP + ALLOWED)
    assert done.returncode == 0, done.stdout


NAMES = """
import types
import cupy, cupyx
from cupy._names import NAMES
for owner, names in NAMES.items():
    own = {
        name
        for name, value in vars(eval(owner)).items()
        if not name.startswith('_')
        and not isinstance(value, types.ModuleType)
        and getattr(value, '__module__', 'cupy').startswith('cupy')
    }
    print(owner, len(own) > 2, sorted(own - set(names)))
"""


def test_it_has_no_name_that_cupy_14_lacks(python):
    done = python('-c', NAMES)
    assert done.returncode == 0, done.stdout
    rows = done.stdout.splitlines()
    assert len(rows) == 10 and all(row.endswith(' True []') for row in rows), done.stdout


# --- The GPU's paths ------------------------------------------------------------------------------


@pytest.fixture
def images(image_folders):
    """Options for an epoch of 16 training and 10 validation images of 2 classes."""
    options = '--preset cifar10 --width 4 --epochs 1 --local-batch-size 2 --loader serial'.split()
    options += ['--functions', 'chainer']  # GPUs have no others here
    train, val = image_folders / 'train', image_folders / 'val'
    return [*options, '--train-root', train, '--val-root', val]


def trained(done, out):
    """The parameters and statistics at the end, the log, and the digests."""
    assert done.returncode == 0, done.stdout
    files = [json.loads((out / name).read_text()) for name in ('log', 'digests.json')]
    return dict(np.load(out / 'model.npz')), *files


@pytest.fixture(scope='module')
def runs():
    return {}


@pytest.fixture
def on_cpus(mpirun, images, tmp_path, runs):
    """``on_cpus(options)``: what a training ends with, the same on any number of processes."""

    def run(options):
        key = ' '.join(options)
        if key not in runs:
            runs[key] = trained(
                mpirun(2, TRAIN, tmp_path / 'cpu', *images, *options), tmp_path / 'cpu'
            )
        return runs[key]

    return run


@pytest.fixture
def on_gpus(on_host, images, tmp_path, runs):
    """``on_gpus(processes, options)``: the CompletedProcess of a training on GPUs, each rank's
    calls of the device, and what the training ends with."""

    def run(processes, options):
        if (processes, options) not in runs:
            out = tmp_path / f'gpu-{len(runs)}'
            words = [*images, *options.split(), '--checkpoint-every', '0.0001m']
            done, calls = on_host(processes, TRAIN, out, *words)
            runs[processes, options] = done, calls, trained(done, out)
        return runs[processes, options]

    return run


# Together, they launch every kernel of a training.
TRAININGS = (
    (1, '--workers 2'),
    (2, '--workers 2 --allreduce-grad-dtype float32 --gradient-scale 16 --bn-decay 0.5'),
    (2, '--workers 2 --allreduce-grad-dtype float64 --pooled-variance --stem imagenet'),
)


@pytest.mark.parametrize('processes, options', [*TRAININGS, (2, '--workers 2 --communicator mpi')])
def test_a_training_is_the_cpus(on_cpus, on_gpus, processes, options):
    """Workers, validation, statistics and checkpoints, and float16 as it is on the wire. With the
    communicator mpi, the GPUs are not used. Another order of float32's sums is all that differs."""
    done, calls, (actual, its_log, its_digests) = on_gpus(processes, options)
    options = options.split()
    expected, log, digests = on_cpus([o for o in options if o not in ('--communicator', 'mpi')])
    if 'mpi' in options:
        assert its_digests == digests and 'HalfPrecisionMpiCommunicator; asked for' in done.stdout
        return
    assert 'HalfPrecisionNcclCommunicator; auto: every rank has a GPU' in done.stdout
    assert all('use GPU' in calls[0] for calls in calls)
    for entry, its in zip(log, its_log):
        for key in ('main/loss', 'validation/main/loss', 'validation/main/accuracy'):
            assert its[key] == pytest.approx(entry[key], rel=1e-4), key
    assert its_log[-1]['time/iteration'] > its_log[-1]['time/update'] > 0
    for name in expected:
        difference = np.linalg.norm(actual[name] - expected[name])
        assert difference <= 1e-3 * np.linalg.norm(expected[name]) + 1e-5, name


def test_the_recorded_kernels_are_those_of_trainings(on_gpus, root, tmp_path):
    """They are what tests/extensions_tests/test_cuda.py compiles."""
    ranks = [calls for training in TRAININGS for calls in on_gpus(*training)[1]]
    lines = {line for calls in ranks for line in calls if line.startswith('kernel ')}
    now = tmp_path / 'kernels_of_trainings.jsonl'
    now.write_text(''.join(line.replace('kernel ', '', 1) + '\n' for line in sorted(lines)))
    recorded = root / 'tests' / 'cupy_on_host' / now.name
    assert now.read_text() == recorded.read_text(), (
        f'trainings launch other kernels than are recorded; if they are right: cp {now} {recorded}'
    )


def test_a_training_goes_on_from_a_checkpoint_to_the_same_bits(on_host, images, root, tmp_path):
    """And its model is validated to the same loss."""
    whole, again = tmp_path / 'whole', tmp_path / 'again'
    options = [*images, *'--workers 2 --checkpoint-every 0.0001m --keep-checkpoints 99'.split()]
    *_, expected = trained(on_host(2, TRAIN, whole, *options)[0], whole)
    first, *later = sorted((whole / 'checkpoints').glob('checkpoint-*.npz'))
    assert len(later) >= 2
    (again / 'checkpoints').mkdir(parents=True)
    shutil.copy(first, again / 'checkpoints')
    shutil.copy(whole / 'settings.json', again)
    done, _ = on_host(2, TRAIN, again, *options, '--resume', 'auto')
    assert first.name in done.stdout, done.stdout
    *_, actual = trained(done, again)
    assert actual == expected
    words = [*images, '--shallow', '--out', again, '--evaluate', whole / 'model.npz']
    done, calls = on_host(2, root / 'reproduce' / 'train.py', *words)
    assert done.returncode == 0, done.stdout
    last = json.loads((whole / 'log').read_text())[-1]
    assert f'loss {last["validation/main/loss"]}\n' in done.stdout, done.stdout
    assert all('use GPU' in calls_of_rank[0] for calls_of_rank in calls)


def test_an_infinite_gradient_ends_the_job_before_the_update(on_host, tmp_path):
    program = PROGRAMS / 'train_with_inf.py'
    options = (*SMOKE, '--local-batch-size', 8, '--epochs', 50, '--out', tmp_path / 'out')
    done, _ = on_host(2, program, *options, timeout=60)
    assert done.returncode == 1, done.stdout
    message = 'error: iteration 3: the mean gradient is infinite or NaN, and nothing was updated: '
    assert message + '/fc/W (1 inf and 0 NaN from rank 1 on ' in done.stdout
    for rank in range(2):
        assert f'rank {rank}: parameters kept: True, 3 iterations' in done.stdout


def test_the_preflight_is_ready(on_host, root, tmp_path):
    program = root / 'reproduce' / 'job' / 'preflight.py'
    options = (*SMOKE, '--local-batch-size', 4, '--out', tmp_path / 'out')
    done, _ = on_host(2, program, *options)
    assert done.returncode == 0, done.stdout
    assert 'all-reduce in float16: right, ' in done.stdout and 'ready' in done.stdout
    shared, _ = on_host(2, program, *options, CUDA_VISIBLE_DEVICES='3')
    assert shared.returncode == 1
    assert 'would share the GPU on PCI bus 0000:3E:00.0' in shared.stdout, shared.stdout


@pytest.mark.parametrize(
    'gpus, variables, message',
    [
        (('0', '', ''), {}, r'rank 0 on \S+ can, but rank 1 on \S+ sees no GPU'),
        (('2', '1,2', '2'), {}, r'rank 0 on \S+ and rank 1 on \S+ would share the GPU on PCI bus'),
        (('0', '1', '2'), {'HOST_NCCL_VERSION': '1304'}, r'rank 0 on \S+ has NCCL 1\.3\.4, but'),
    ],
)
def test_gpus_that_do_not_fit_together_end_the_job_at_once(
    on_host, root, tmp_path, gpus, variables, message
):
    program = [sys.executable, root / 'reproduce' / 'train.py', *SMOKE, '--out', tmp_path / 'out']
    ranks = [['env', f'CUDA_VISIBLE_DEVICES={visible}', *program] for visible in gpus]
    first, *others = ranks
    words = [word for rank in others for word in (':', '-n', 1, *rank)]
    first = ('-c', 'import os, sys; os.execvp("env", sys.argv[1:])', *first)
    done, _ = on_host(1, *first, *words, timeout=40, **variables)
    assert done.returncode == 2, done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and re.search(message, errors[0]), done.stdout
    assert not (tmp_path / 'out').exists()


# Launches and waits of the host in an iteration of ResNet-50, which has 161 parameters, by part.
CALLS = {
    1: {
        'data': [1, 0],
        'pack': [2, 0],
        'allreduce': [3, 1],
        'update': [1, 0],
        'rest': [0, 0],
    },
    4: {
        'data': [4, 0],
        'pack': [17, 0],
        'allreduce': [4, 1],
        'update': [1, 0],
        'rest': [11, 0],
    },
}


@pytest.mark.parametrize('processes, workers', [(1, 1), (2, 1), (1, 4)])
def test_launches_and_waits_of_an_iteration(on_host, processes, workers):
    done, _ = on_host(processes, PROGRAMS / 'count_calls.py', workers)
    assert done.returncode == 0, done.stdout
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"')))
    launches, waits = found.pop('forward_backward')
    assert found == CALLS[workers]
    assert waits == 0 and launches < 1200 * workers


def test_what_is_marked_gpu_passes(python):
    """On two of its GPUs."""
    done = python(*PYTEST, '-m', 'gpu', 'tests', timeout=280, CUDA_VISIBLE_DEVICES='0,1')
    assert done.returncode == 0, done.stdout
    assert int(re.search(r'(\d+) passed', done.stdout).group(1)) >= 15


def test_every_name_of_cupy_that_the_code_uses_exists(python):
    done = python(*PYTEST, 'tests/extensions_tests/test_cupy_names.py')
    assert done.returncode == 0, done.stdout
    assert int(re.search(r'(\d+) passed', done.stdout).group(1)) >= 60


HIDING = """
import os
import subprocess
import sys

import pytest
from extensions import nccl

LOOK = [sys.executable, '-c', 'from extensions import nccl; print(len(nccl.inspect(0).bus_ids))']


def test_for_cpus():
    assert nccl.inspect(0).obstacle.startswith('sees no GPU')
    assert subprocess.check_output(LOOK) == b'0\\n'


@pytest.mark.gpu
def test_for_gpus(gpu):
    assert len(nccl.inspect(0).bus_ids) == 2
    assert subprocess.check_output(LOOK) == b'2\\n'


def test_for_cpus_afterwards():
    test_for_cpus()
"""


def test_tests_that_are_not_marked_gpu_find_none(python, root, tmp_path):
    (tmp_path / 'test_hiding.py').write_text(HIDING)
    (tmp_path / 'conftest.py').write_text((root / 'tests' / 'conftest.py').read_text())
    (tmp_path / 'pytest.ini').write_text('[pytest]\nmarkers =\n    gpu')
    done = python(*PYTEST, tmp_path, CUDA_VISIBLE_DEVICES='0,1')
    assert done.returncode == 0 and '3 passed' in done.stdout, done.stdout


def test_other_tests_and_their_jobs_do_not_find_it(job_environment):
    paths = [*sys.path, *job_environment['PYTHONPATH'].split(os.pathsep)]
    assert not [path for path in paths if 'cupy_on_host' in path]
