"""The option --functions, as users start it."""

import json
import shutil
import sys

import numpy as np
import pytest

from extensions import kernels

pytestmark = pytest.mark.mpi
# Six iterations of 2 x 128 images.
SMOKE = '--preset smoke --workers 2 --local-batch-size 128 --epochs 1 --width 4 --shallow'.split()
PROGRAMS = pytest.mark.parametrize('program, status', [('train.py', 2), ('job/preflight.py', 1)])


@pytest.fixture
def train(mpirun, root):
    def run(n, *options, **keywords):
        return mpirun(n, root / 'reproduce' / 'train.py', *SMOKE, *options, **keywords)

    return run


@pytest.fixture(params=['compiled', 'numpy', 'torch'])
def implementation(request):
    """An implementation beside Chainer's own, and its line of the header."""
    if request.param == 'torch':
        torch = pytest.importorskip('torch')
        return request.param, f'torch {torch.__version__}, float32'
    if request.param == 'numpy':
        return request.param, 'NumPy, channels last, float32'
    if not kernels.functions:
        pytest.skip(kernels.description())
    return request.param, f'compiled C, {next(iter(kernels.functions))}, float32'


def test_a_run_and_its_records(implementation, train, tmp_path):
    """The same bits on one process and on two, and nearly those of Chainer's own functions."""
    name, described = implementation
    models, logs = [], []
    for n, functions in ((2, name), (1, name), (2, 'chainer')):
        out = tmp_path / f'{n}{functions}'
        done = train(n, '--functions', functions, '--out', out)
        assert done.returncode == 0, done.stdout
        models.append(dict(np.load(out / 'model.npz')))
        logs.append(json.loads((out / 'log').read_text())[-1])
        assert json.loads((out / 'settings.json').read_text())['functions'] == functions
        versions = json.loads((out / 'summary.json').read_text())['versions']
        assert ('torch' in versions) == (functions == 'torch')
        own = described if functions == name else "Chainer's own"
        assert f'\nfunctions     {own}' in done.stdout
    two, one, chainers = models
    assert all(np.array_equal(two[name], one[name]) for name in one)
    assert any(not np.array_equal(chainers[name], one[name]) for name in one)
    assert logs[0]['main/loss'] == logs[1]['main/loss']
    assert logs[0]['main/loss'] == pytest.approx(logs[2]['main/loss'], rel=0.02)
    assert logs[0]['validation/main/loss'] == pytest.approx(
        logs[2]['validation/main/loss'], rel=0.05
    )


@pytest.mark.skipif(not kernels.functions, reason=kernels.description())
@pytest.mark.skipif(not kernels.has_fma(), reason='auto is NumPy here')
def test_by_default_a_run_computes_by_the_compiled_functions(train, tmp_path):
    done = train(1, '--out', tmp_path)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / 'settings.json').read_text())['functions'] == 'compiled'


def test_a_run_goes_on_with_the_same_functions_only(train, tmp_path):
    done = train(2, '--functions', 'chainer', '--out', tmp_path)
    assert done.returncode == 0, done.stdout
    (checkpoint,) = (tmp_path / 'checkpoints').glob('checkpoint-*.npz')
    done = train(2, '--functions', 'numpy', '--resume', checkpoint, '--out', tmp_path / 'other')
    assert done.returncode == 2
    assert f'error: {checkpoint} was made with functions chainer (now numpy); ' in done.stdout
    assert 'to go on, give --functions chainer\n' in done.stdout
    assert 'total batch' not in done.stdout


@pytest.fixture
def without_library(mpirun, root, tmp_path):
    """Starts a program of a copy of the project in which nothing was compiled, on two processes."""

    def run(program, *options):
        for name in 'extensions', 'reproduce':
            ignored = shutil.ignore_patterns('__pycache__', 'results', '*.so', '*.log')
            shutil.copytree(root / name, tmp_path / 'copy' / name, ignore=ignored)
        program = tmp_path / 'copy' / 'reproduce' / program
        path = str(tmp_path / 'copy')
        return mpirun(2, program, *SMOKE, *options, '--out', tmp_path / 'out', PYTHONPATH=path)

    return run


@PROGRAMS
def test_ranks_without_a_library(without_library, tmp_path, program, status):
    done = without_library(program, '--functions', 'compiled')
    assert done.returncode == status, done.stdout
    assert 'Traceback' not in done.stdout and 'total batch' not in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if '--functions compiled: ' in line)
    assert line.startswith('error: ' if status == 2 else 'problem: ')
    assert 'rank 0 on ' in line or status == 1
    assert f'{sys.executable} has no compiled library (there is no {tmp_path}/copy/ext' in line
    assert 'take --functions numpy' in line


def test_without_a_library_a_run_computes_in_numpy(without_library, tmp_path):
    done = without_library('train.py')
    assert done.returncode == 0, done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith('functions '))
    assert 'NumPy, channels last, float32, since ' in line and 'there is no ' in line
    assert line.endswith('the bits are not those of compiled C')
    assert json.loads((tmp_path / 'out' / 'settings.json').read_text())['functions'] == 'numpy'


# In a folder before all others. The ranks without Torch fail as a build for CUDA without its
# libraries does; the others go on to the installed one.
TORCH = """
import os, sys
rank = os.environ.get('OMPI_COMM_WORLD_RANK') or os.environ['PMI_RANK']
if rank in os.environ['WITHOUT'].split():
    raise OSError('libcudart.so.13: cannot open\\nshared object file')
sys.path.remove(os.path.dirname(__file__))
del sys.modules['torch']
import torch
if rank in os.environ['BROKEN'].split():
    def conv2d(*arguments):
        raise RuntimeError('no kernel image\\nis available')
    torch.conv2d = conv2d
"""


@pytest.fixture
def run(mpirun, root, tmp_path):
    (tmp_path / 'torch.py').write_text(TORCH)

    def run(program, without='', broken=''):
        return mpirun(
            2,
            root / 'reproduce' / program,
            *SMOKE,
            *('--functions', 'torch', '--out', tmp_path / 'out'),
            PYTHONPATH=f'{tmp_path}:{root}',
            WITHOUT=without,
            BROKEN=broken,
        )

    return run


def line_of(done, status):
    """The only line with an error of the option."""
    assert done.returncode == status, done.stdout
    assert 'Traceback' not in done.stdout and 'total batch' not in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if '--functions torch: ' in line)
    assert line.startswith('error: ' if status == 2 else 'problem: ')
    return line


@pytest.mark.parametrize('without', ['1', '0 1'])
@PROGRAMS
def test_ranks_that_cannot_import_torch(run, without, program, status):
    if without == '1':
        pytest.importorskip('torch')
    done = run(program, without=without)
    line = line_of(done, status)
    assert 'cannot import PyTorch: libcudart.so.13: cannot open shared object file; ' in line
    if status == 1:
        ranks = [f'rank {rank} on ' in line for rank in (0, 1)]
        assert ranks == [without == '0 1', True]
        assert ('problem: torch is None, but ' in done.stdout) == (without == '1')


@PROGRAMS
def test_a_rank_whose_torch_cannot_compute(run, program, status):
    """As on a GPU that this build of Torch has no kernels for."""
    torch = pytest.importorskip('torch')
    line = line_of(run(program, broken='1'), status)
    assert f'torch {torch.__version__} cannot compute on @numpy: no kernel image; ' in line


def test_functions_that_do_not_exist(train, tmp_path):
    done = train(2, '--functions', 'cudnn', '--out', tmp_path)
    assert done.returncode == 2
    assert done.stdout.count('\nerror: ') + done.stdout.startswith('error: ') == 1
    assert 'cudnn is not one of auto, compiled, numpy, chainer, torch; ' in done.stdout
