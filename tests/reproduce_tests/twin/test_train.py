"""The twin as a job: torchrun and mpiexec start it, and an error on one process ends it."""

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)
import json
import re
import subprocess
import sys
from pathlib import Path

import chainer
import numpy as np
import pytest

torch = pytest.importorskip('torch')
from reproduce.resnet50 import ResNet50
from reproduce.settings import InputError, Settings
from reproduce.studies.gpu_check import checks, right
from reproduce.twin import __main__ as command
from reproduce.twin import records
from reproduce.twin import train as twin

PROGRAMS = Path(__file__).parent / 'programs'
SMALL = '--preset smoke --workers 4 --local-batch-size 8 --epochs 1 --width 2 --loader serial'


@pytest.fixture(scope='module')
def train_py(root_of_project):
    return root_of_project / 'reproduce' / 'twin' / 'train.py'


def small(image_folders, out, *options):
    """Two iterations of 8 images; 10 images for validation."""
    folders = ('--train-root', image_folders / 'train', '--val-root', image_folders / 'val')
    words = '--local-batch-size 2 --validation-batch-size 3 --no-horizontal-flip'.split()
    return [*SMALL.split(), *words, *map(str, folders), '--out', str(out), *options]


@pytest.mark.slow
@pytest.mark.mpi
def test_one_two_and_four_processes_of_both_launchers(
    root_of_project, train_py, image_folders, tmp_path, torchrun, mpirun, job_environment
):
    """With the exact sum, the same bits: 4 virtual workers, 2 x 2, and DDP with a hook on 4."""
    outs = {n: tmp_path / f'{n}' for n in (1, 2, 4)}
    for n, out in outs.items():
        start = torchrun if n == 2 else mpirun
        done = start(n, train_py, *small(image_folders, out))
        assert done.returncode == 0, done.stdout
        assert re.search(r'^ +1 +\d.* \d+\.\d\d% +- +\d', done.stdout, re.MULTILINE), done.stdout
        assert ('hook of DDP' in done.stdout) == (n == 4)
        assert ('Warning' in done.stdout) is False, done.stdout
    one = dict(np.load(outs[1] / 'model.npz'))
    logs = {n: json.loads((out / 'log').read_text()) for n, out in outs.items()}
    for n in (2, 4):
        other = dict(np.load(outs[n] / 'model.npz'))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one), n
        for entry, same in zip(logs[1], logs[n]):
            entry, same = ({**e, 'elapsed_time': 0} for e in (entry, same))
            assert entry == same
    assert logs[1][-1]['validation/images'] == 10 and logs[1][-1]['iteration'] == 2
    for name in ('settings.json', 'summary.json', 'curves.png'):
        assert (outs[4] / name).exists()
    # Chainer reads the model, under its own names, and finds the same of it.
    model = ResNet50(2, 2)
    chainer.serializers.load_npz(outs[1] / 'model.npz', model)
    assert np.array_equal(model.res3[1].conv2.W.array, one['res3/1/conv2/W'])
    assert np.array_equal(model.bn1.avg_var, one['bn1/avg_var'])
    words = small(image_folders, outs[1], '--evaluate', str(outs[1] / 'model.npz'))
    done = mpirun(1, root_of_project / 'reproduce' / 'train.py', *words)
    top1 = logs[1][-1]['validation/main/accuracy']
    assert done.returncode == 0 and f'top-1 {top1:.2%}' in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize('launcher', ['mpiexec', 'torchrun'])
def test_an_error_on_one_process_ends_all(launcher, image_folders, tmp_path, torchrun, mpirun):
    start = mpirun if launcher == 'mpiexec' else torchrun
    words = small(image_folders, tmp_path / 'out')
    done = start(2, PROGRAMS / 'one_fails.py', *words, timeout=100)
    assert done.returncode == 1, done.stdout
    line = r"^error: rank 1 on \S+ failed: RuntimeError\('on purpose'\)$"
    assert len(re.findall(line, done.stdout, re.MULTILINE)) == 1, done.stdout
    assert not (tmp_path / 'out' / 'summary.json').exists()


@pytest.mark.slow
@pytest.mark.mpi
def test_an_infinite_gradient_ends_all_with_one_line(train_py, image_folders, tmp_path, mpirun):
    words = small(image_folders, tmp_path / 'out', '--lr-rmsprop', '1e20')
    done = mpirun(2, train_py, *words)
    assert done.returncode == 1, done.stdout
    (line,) = re.findall(r'^error: .*', done.stdout, re.MULTILINE)
    assert line.startswith('error: iteration 2: the mean gradient is infinite or NaN'), line
    assert 'Traceback' not in done.stdout


@pytest.mark.slow
@pytest.mark.mpi
def test_a_process_that_hangs_ends_the_job(image_folders, tmp_path, torchrun):
    words = small(image_folders, tmp_path / 'out', '--watchdog', '5')
    done = torchrun(2, PROGRAMS / 'one_hangs.py', *words, timeout=120)
    assert done.returncode == 1, done.stdout
    assert 'error: rank 0' in done.stdout and 'imed out' in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_no_thread_of_gloo_outlives_the_job(image_folders, tmp_path, torchrun):
    """Else a process may abort at its end. Two workers on two processes are averaged by DDP."""
    words = small(image_folders, tmp_path / 'out', '--workers', '2')
    done = torchrun(2, PROGRAMS / 'threads_at_end.py', *words)
    assert done.returncode == 0 and 'hook of DDP' in done.stdout, done.stdout
    threads = re.findall(r'^threads: (.*)$', done.stdout, re.MULTILINE)
    assert len(threads) == 2 and 'gloo' not in ''.join(threads), done.stdout


def test_what_gpu_check_asks_of_the_twin(monkeypatch):
    """On a second CPU instead of a GPU."""
    assert right.twin(device='cpu') == {'loss': 0, 'gradient': 0}
    seeds = iter([0, 1])
    model = twin.ResNet50
    monkeypatch.setattr(twin, 'ResNet50', lambda *args: model(*args[:3], next(seeds), *args[4:]))
    with pytest.raises(checks.Failed, match='loss: '):
        right.twin(device='cpu')


def test_options_that_the_twin_does_not_have():
    words = {
        **{name: ['1'] for name in ('checkpoint_every', 'keep_checkpoints', 'gradient_scale')},
        'resume': ['auto'],
        'communicator': ['auto'],
        'functions': ['chainer'],
        'bn_decay': ['0.9'],
        'pooled_variance': [],
        'stop_on_nonfinite': [],
    }
    assert set(words) == set(records.ABSENT) < set(Settings.__dataclass_fields__)
    for name, values in words.items():
        flag = '--' + name.replace('_', '-')
        for given in ([flag, *values], [f'{flag}={values[0]}'] if values else [f'--no-{flag[2:]}']):
            with pytest.raises(InputError, match=f'^{flag}: the twin has no '):
                records.parse(['--preset', 'smoke', *given], 2)
    assert records.parse(['--preset', 'smoke', '--seed', '3'], 2).workers == 2


def test_every_other_option_reaches_the_training():
    """Each setting is read by the twin's code, or by what it shares: images, output."""
    source = ''.join(path.read_text() for path in Path(records.__file__).parent.glob('*.py'))
    shared = {
        *('preset', 'train_root', 'val_root', 'n_train_images', 'manifests', 'overwrite'),
        *('image_size', 'resize', 'min_crop_area', 'horizontal_flip', 'resize_filter'),
        *('lr_schedule', 'lr_per_256', 'alpha_form', 'beta_center', 'beta_period', 'watchdog'),
    }
    other_verbs = {'evaluate'}
    for name in set(Settings.__dataclass_fields__) - set(records.ABSENT) - shared - other_verbs:
        assert re.search(rf'\b(settings|s|_settings)\.{name}\b', source), name


@pytest.mark.parametrize(
    'words, message',
    [
        ('train -n 0', 'error: -n must be at least 1, not 0'),
        ('train --preset smoke --resume auto', 'error: --resume: the twin has no checkpoints'),
        (
            'train --evaluate m.npz',
            'error: --evaluate: the twin only trains; ./run_mpi.sh train val',
        ),
        ('train --epoch 3', 'error: there is no option --epoch; did you mean --epochs?'),
        ('compare --iterations 0', 'error: --iterations must be at least 1, not 0'),
        ('compare --workers 0', 'error: --workers must be at least 1, not 0'),
        ('comp', 'error: argument NAME: comp is not one of train, compare; did you mean compare?'),
    ],
)
def test_a_wrong_command_line_gets_one_line(capsys, monkeypatch, words, message):
    monkeypatch.setattr(command.os, 'execv', lambda *words: pytest.fail('started'))
    with pytest.raises(SystemExit) as ended:
        command.main(words.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(message)
    assert not torch.distributed.is_initialized()


def test_the_verb_starts_torchrun(monkeypatch, train_py):
    started = []
    monkeypatch.setattr(command.os, 'execv', lambda *words: started.append(words))
    command.train('-n 3 --preset smoke --seed 2'.split())
    ((program, words),) = started
    assert program == sys.executable
    assert words[1:5] == ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node']
    assert words[5:] == ['3', str(train_py), *'--preset smoke --seed 2'.split()]


@pytest.mark.parametrize('number', [None, '3'])
def test_one_thread_unless_said(root_of_project, job_environment, number):
    environment = {**job_environment, 'PYTHONPATH': str(root_of_project)}
    del environment['OMP_NUM_THREADS']
    if number:
        environment['OMP_NUM_THREADS'] = number
    program = (
        'from reproduce.twin import processes; processes.before_mpi(); '
        "import os, torch; print(os.environ['OMP_NUM_THREADS'], torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=True
    )
    said, threads = done.stdout.split()
    assert said == (number or '1') and (number or threads == '1')


def test_without_torch_it_says_what_to_do(root_of_project, tmp_path):
    """By a Python that has everything but PyTorch."""
    hide = (
        'import importlib.util, sys; found = importlib.util.find_spec; '
        "importlib.util.find_spec = lambda name, *p: None if name == 'torch' else found(name, *p); "
        f'sys.path.insert(0, {str(root_of_project)!r}); '
    )
    for program in (
        'from reproduce.twin import processes; processes.before_mpi()',
        "from reproduce.twin import __main__; __main__.main(['train'])",
    ):
        done = subprocess.run(
            [sys.executable, '-c', hide + program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        (line,) = done.stderr.splitlines()
        assert done.returncode in (1, 2)
        assert line.startswith('error: ') and 'no package torch' in line and 'EXTRAS=twin' in line
