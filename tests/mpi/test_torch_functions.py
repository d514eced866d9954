"""The option --functions torch, as users start it."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.mpi
# Six iterations of 2 x 128 images.
SMOKE = '--preset smoke --workers 2 --local-batch-size 128 --epochs 1 --width 4'.split()


@pytest.fixture
def train(mpirun, root):
    def run(n, *options, **keywords):
        return mpirun(n, root / 'reproduce' / 'train.py', *SMOKE, *options, **keywords)

    return run


def test_a_run_and_its_records(train, tmp_path):
    """The same bits on one process and on two, and nearly those of Chainer's own functions."""
    torch = pytest.importorskip('torch')
    models, logs = [], []
    for n, functions in ((2, 'torch'), (1, 'torch'), (2, 'chainer')):
        out = tmp_path / f'{n}{functions}'
        done = train(n, '--functions', functions, '--out', out)
        assert done.returncode == 0, done.stdout
        models.append(dict(np.load(out / 'model.npz')))
        logs.append(json.loads((out / 'log').read_text())[-1])
        summary = json.loads((out / 'summary.json').read_text())
        settings = json.loads((out / 'settings.json').read_text())
        assert settings['functions'] == functions
        is_torch = functions == 'torch'
        assert summary['versions'].get('torch') == (torch.__version__ if is_torch else None)
        own = f'torch {torch.__version__}, float32' if is_torch else "Chainer's own"
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
    pytest.importorskip('torch')
    done = train(2, '--functions', 'chainer', '--out', tmp_path)
    assert done.returncode == 0, done.stdout
    (checkpoint,) = (tmp_path / 'checkpoints').glob('checkpoint-*.npz')
    out = tmp_path / 'other'
    done = train(2, '--functions', 'torch', '--resume', checkpoint, '--out', out)
    assert done.returncode == 2
    assert f'error: {checkpoint} was made with functions chainer (now torch); ' in done.stdout
    assert 'total batch' not in done.stdout


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


PROGRAMS = pytest.mark.parametrize('program, status', [('train.py', 2), ('job/preflight.py', 1)])


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
