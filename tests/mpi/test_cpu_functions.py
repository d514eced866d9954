"""The option --functions on CPUs, as users start it."""

import json
import shutil
import sys

import numpy as np
import pytest

from extensions import kernels

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not kernels.functions, reason=kernels.description()),
]
# Six iterations of 2 x 128 images.
SMOKE = '--preset smoke --workers 2 --local-batch-size 128 --epochs 1 --width 4'.split()


@pytest.fixture
def train(mpirun, root):
    def run(n, *options, **keywords):
        return mpirun(n, root / 'reproduce' / 'train.py', *SMOKE, *options, **keywords)

    return run


def test_a_run_and_its_records(train, tmp_path):
    """The same bits on one process and on two, and nearly those of Chainer's own functions."""
    models, logs = [], []
    by_default = [] if kernels.has_fma() else ['--functions', 'compiled']
    for n, functions, options in (
        (2, 'compiled', by_default),
        (1, 'compiled', ['--functions', 'compiled']),
        (2, 'chainer', ['--functions', 'chainer']),
    ):
        out = tmp_path / f'{n}{functions}'
        done = train(n, *options, '--out', out)
        assert done.returncode == 0, done.stdout
        models.append(dict(np.load(out / 'model.npz')))
        logs.append(json.loads((out / 'log').read_text())[-1])
        assert json.loads((out / 'settings.json').read_text())['functions'] == functions
        fastest = next(iter(kernels.functions))
        own = f'compiled C, {fastest}, float32' if functions == 'compiled' else "Chainer's own"
        assert f'\nfunctions     {own}\n' in done.stdout
    one, two, chainers = models
    assert all(np.array_equal(two[name], one[name]) for name in one)
    assert any(not np.array_equal(chainers[name], one[name]) for name in one)
    assert logs[0]['main/loss'] == logs[1]['main/loss']
    assert logs[0]['main/loss'] == pytest.approx(logs[2]['main/loss'], rel=0.02)
    assert logs[0]['validation/main/loss'] == pytest.approx(
        logs[2]['validation/main/loss'], rel=0.05
    )


def test_a_run_goes_on_with_the_same_functions_only(train, tmp_path):
    done = train(2, '--functions', 'chainer', '--out', tmp_path)
    assert done.returncode == 0, done.stdout
    (checkpoint,) = (tmp_path / 'checkpoints').glob('checkpoint-*.npz')
    done = train(2, '--functions', 'compiled', '--resume', checkpoint, '--out', tmp_path / 'other')
    assert done.returncode == 2
    assert f'error: {checkpoint} was made with functions chainer (now compiled); ' in done.stdout
    assert 'to go on, give --functions chainer\n' in done.stdout


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


@pytest.mark.parametrize('program, status', [('train.py', 2), ('job/preflight.py', 1)])
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
