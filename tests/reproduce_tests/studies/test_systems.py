"""The benchmark of systems: its arithmetic, its refusals, its steps in PyTorch, and real runs."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import extensions  # isort: skip  (makes Chainer importable on NumPy 2)
import numpy as np
import pytest
from mpi4py import MPI
from PIL import Image

from extensions import timing
from reproduce.settings import Settings
from reproduce.studies.speed import iteration_program, systems, systems_program
from reproduce.train import experiment

COMMAND = [sys.executable, '-m', 'reproduce.studies.speed', 'systems']


def result(seconds, losses=(2.0, 1.5, 1.0, 0.5), **others):
    found = {'seconds': seconds, 'losses': list(losses), 'functions': 'f', 'device': 'CPU'}
    return {**found, 'memory': 2**20, 'peak': 2**21, **others}


def options_of(**others):
    values = {'network': 'smoke', 'local_batch_size': 32, 'processes': 2, 'iterations': 2}
    return argparse.Namespace(**{**values, **others})


ROUNDS = {
    # data, forward + backward, pack, all-reduce, update, extensions, iteration, validation
    'ours': [
        result([0.01, 0.5, 0.02, 0.08, 0.1, 0.05, 0.8, 0]),
        result([0.01, 0.6, 0.04, 0.36, 0.3, 0.05, 1.6, 0]),
        result([0.01, 0.4, 0.03, 0.07, 0.2, 0.05, 0.7, 0], memory=3 * 2**20),
    ],
    'twin-compiled': [
        result([0.1, 0.5, 0, 0, 0.1, 0.1, 0.4, 0]),
        result([0.1, 0.5, 0, 0, 0.1, 0.1, 0.4, 0]),
        result([0.1, 0.5, 0, 0, 0.1, 0.1, 1.4, 0], losses=(2.0, 1.5, 1.0, 0.4)),
    ],
}


def test_figures_are_medians_over_the_rounds():
    figures = systems.figures_of(ROUNDS, options_of())
    ours, twin = figures['ours'], figures['twin-compiled']
    assert (ours['iteration'], ours['times_first'], twin['times_first']) == (0.8, 1, 2)
    assert ours['images_per_second'] == 2 * 32 / 0.8
    assert ours['spread'] == pytest.approx((1.2 - 0.75) / 2 / 0.8)
    assert ours['compute'] == 0.5 and ours['update'] == 0.2
    assert ours['allreduce'] == pytest.approx(0.1) and ours['rest'] == pytest.approx(0.06)
    assert twin['allreduce'] is None and twin['rest'] == pytest.approx(0.2)
    assert ours['memory'] == 3 * 2**20 and ours['loss'] == 0.75
    assert (ours['same_bits'], twin['same_bits']) == (True, False)
    assert ours['design'] != twin['design'] == {k: v[2] for k, v in systems.DESIGN.items()}


def test_the_table_has_a_row_per_system_and_what_differs_by_design():
    measured, designed = systems.table(systems.figures_of(ROUNDS, options_of())).split('\n\n')
    heads, ours, twin = measured.splitlines()
    assert 'x ours' in heads
    assert ours.split() == [
        'ours',
        *'80.00 28.1% 1.00 800.0 500.0 100.0 200.0 60.0'.split(),
        *('3 0.7500 same'.split()),
    ]
    assert twin.split()[6] == 'within' and twin.split()[-1] == 'differ'
    assert designed.splitlines()[0].split() == ['by', 'design', 'ours', 'twin']
    assert 'broadcast' not in designed  # which the others do


def test_every_system_says_what_differs_by_design():
    assert list(dict.fromkeys(map(systems.family, systems.SYSTEMS))) == [*systems.FAMILIES]
    for cells in systems.DESIGN.values():
        assert len(cells) == 4 and max(map(len, cells)) < 34  # the width of a column


def test_the_plot_has_a_bar_per_system(tmp_path):
    systems.draw(systems.figures_of(ROUNDS, options_of()), options_of(out=str(tmp_path)))
    assert Image.open(tmp_path / 'systems.png').size == (1650, 675)


@pytest.mark.parametrize(
    'other, message',
    [
        ({'device': 'H100'}, 'error: twin runs on H100, but the first of the systems on CPU'),
        ({'losses': [2.001, 1.0]}, 'its first loss differs by 5.0e-04, more than 1e-04'),
        ({'losses': [float('nan'), 1.0]}, 'its first loss differs by nan'),
    ],
)
def test_systems_that_do_not_do_the_same_are_an_error(other, message):
    first = result([])
    systems.check('twin', result([], losses=(2.00001, 7.0)), first)
    with pytest.raises(SystemExit) as ended:
        systems.check('twin', result([], **{'losses': (2.0, 1.0), **other}), first)
    assert message in ended.value.code


@pytest.mark.parametrize(
    'words, message',
    [
        ('--network paper', 'paper is not one of smoke'),
        ('--systems ours,peer', "--systems has 'peer', which is none of ours,"),
        ('--processes 0', '--processes must be above 0, not 0'),
        ('--local-batch-size 0', '--local-batch-size must be above 0, not 0'),
        ('--rounds two', 'two'),
        ('--iterations -1', '--iterations must be above 0, not -1'),
        ('--out setup.py', 'setup.py'),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(root, words, message):
    done = subprocess.run(
        [*COMMAND, *words.split()], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ''
    (error,) = (line for line in done.stderr.splitlines() if 'error: ' in line)
    assert message in error and 'Traceback' not in done.stderr


def test_the_ranks_get_the_minibatch_that_the_figures_count(tmp_path, monkeypatch):
    given = []

    def job_of(n, arguments, module):
        given.append((n, json.loads(arguments[0])))
        (tmp_path / 'result.json').write_text('{}')
        return ['true'], dict(os.environ)

    monkeypatch.setattr(systems, 'job_of', job_of)
    options = options_of(local_batch_size=3)
    assert systems.turn('ours', options, tmp_path) == {}
    ((n, found),) = given
    assert (n, found['local_batch_size'], found['iterations']) == (2, 3, 5)
    ours = systems.figures_of(ROUNDS, options)['ours']
    assert ours['images_per_second'] == pytest.approx(2 * 3 / 0.8)


# ---------------------------------------------------------------- the systems


def tiny(tmp_path, **others):
    """Options of the rank's program for a small network that this process trains alone."""
    values = {'width': 2, 'stem': 'cifar', 'image_size': 16, 'local_batch_size': 3}
    values.update(n_classes=12, timed=2, iterations=5, repeat=1, functions='chainer')
    values.update(allreduce_grad_dtype='float16', loader='serial', folder=f'{tmp_path}/digits')
    return argparse.Namespace(**{**values, **others})


def test_all_systems_get_the_images_of_the_experiment(shallow, tmp_path):
    options = tiny(tmp_path)
    train, val = systems_program.images_of(options, MPI.COMM_SELF)
    assert (len(train), len(val), len(train.classes)) == (15, 3, 12)
    settings = iteration_program.settings_of(options, 1)
    assert isinstance(settings, Settings)
    comm = extensions.create_communicator('naive', 'float32', mpi_comm=MPI.COMM_SELF)
    _, expected = experiment(settings, comm, train, val)
    with expected, iteration_program.loader_of(settings, train, val, 0) as found:
        for iteration in range(4):
            for one, other in zip(
                expected.train_batch(iteration, 0), found.train_batch(iteration, 0)
            ):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('name', ['ours', 'chainermn'])
def test_losses_of_each_iteration_are_kept(shallow, tmp_path, monkeypatch, name):
    """They are the losses that the updaters have, one per iteration, in both runs of a job."""
    # The clock of this thread's work, which does not run while another process has the processor.
    monkeypatch.setattr(time, 'perf_counter', time.thread_time)
    monkeypatch.setattr(timing._HostClock, 'now', staticmethod(time.thread_time))
    options = tiny(tmp_path, system=name)
    found = systems_program.measure(options, MPI.COMM_SELF)
    assert len(found['losses']) == 4 and min(found['seconds'][:7]) >= 0
    assert found['functions'] == 'chainer' and found['device'] == 'CPU'
    assert found['peak'] >= found['memory'] >= 0  # 0: this process has had as much before
    parts = sum(found['seconds'][:6])
    assert parts == pytest.approx(found['seconds'][6], rel=0.05)
    again = systems_program.measure(tiny(tmp_path, system=name), MPI.COMM_SELF)
    assert again['losses'] == found['losses'] and len(set(found['losses'])) == 4


def test_what_is_the_same_as_ours_has_no_row_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(
        systems_program.functions,
        'resolve',
        lambda name, device: 'numpy' if name == 'auto' else name,
    )
    options = tiny(tmp_path, system='ours-numpy')
    assert systems_program.measure(options, MPI.COMM_SELF) == {'left_out': 'it is the same as ours'}
    assert not systems_program.why_not(tiny(tmp_path, system='ours-chainer'), MPI.COMM_SELF)


@pytest.fixture
def alone():
    """A job of torch.distributed that is this process."""
    torch = pytest.importorskip('torch')
    dist = torch.distributed
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield argparse.Namespace(rank=0, size=1, device=torch.device('cpu'))
    dist.destroy_process_group()


def test_torchvisions_step_follows_its_equations(shallow, tmp_path, alone, monkeypatch):
    """v = 0.9 v + g + 1e-4 theta, theta -= lr v, for all parameters; moving averages of BN."""
    import torch

    from reproduce.studies.speed import systems_in_pytorch

    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # the recipe sets it
    options = tiny(tmp_path)
    train, val = systems_program.images_of(options, MPI.COMM_SELF)
    settings = iteration_program.settings_of(options, 1)
    training = systems_in_pytorch.Torchvision(settings, alone, train, val)
    other = systems_in_pytorch.Torchvision(settings, alone, train, val)
    params = list(other.model.parameters())
    theta = [param.detach().double().clone() for param in params]
    v = [torch.zeros_like(array) for array in theta]
    for iteration in range(3):
        training.update()
        x, t = other.convert(other.batches.train_batch(iteration, 0))
        for param, array in zip(params, theta):
            param.data, param.grad = array.float(), None
        loss = torch.nn.functional.cross_entropy(other.model(x), t)
        loss.backward()
        assert float(training.losses[-1]) == pytest.approx(loss.item(), rel=1e-5)
        v = [0.9 * old + p.grad.double() + 1e-4 * a for old, p, a in zip(v, params, theta)]
        theta = [array - 0.1 * 3 / 256 * step for array, step in zip(theta, v)]
        for param, array, step in zip(training.model.parameters(), theta, v):
            torch.testing.assert_close(param.detach().double(), array, rtol=1e-4, atol=1e-6)
            own = training.optimizer.state[param]['momentum_buffer'].double()
            torch.testing.assert_close(own, step, rtol=1e-4, atol=1e-5)  # the decay is up to 1e-4
    for own, buffer in zip(training.model.buffers(), other.model.buffers()):
        torch.testing.assert_close(own, buffer, rtol=1e-3, atol=1e-4)
    mean = training.model.bn1.running_mean
    assert training.model.bn1.momentum == 0.1 and float(mean.abs().max()) > 0
    assert training.metrics[0] == pytest.approx(float(training.losses[-1]))
    assert 0 <= training.metrics[1] <= training.metrics[2] <= 3
    for each in (training, other):
        each.batches.close()


@pytest.mark.slow
def test_the_rule_by_torch_compile_is_the_twins(monkeypatch):
    """With other lr and alphas in every step, and without compiling again."""
    torch = pytest.importorskip('torch')
    from reproduce.studies.speed import systems_in_pytorch
    from reproduce.twin.rmsprop_warmup import RMSpropWarmup

    why_not = systems_in_pytorch.why_not(argparse.Namespace(system='twin-compiled'))
    if why_not:
        pytest.skip(why_not)
    generator = torch.Generator().manual_seed(0)
    shapes = [(70_000,), (40, 50, 40), (3, 3), (65_536,)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    groups = []
    for _ in range(2):
        params = [torch.nn.Parameter(array.clone()) for array in start]
        groups.append([{'params': params[:3], 'weight_decay': 0.05}, {'params': params[3:]}])
    twins, compiled = RMSpropWarmup(groups[0], 0.1), systems_in_pytorch.CompiledRule(groups[1], 0.1)
    for step in range(5):
        values = {
            'lr': 0.1 + 0.01 * step,
            'alpha_sgd': 0.3 * step,
            'alpha_rmsprop': 1e-3 / (1 + step),
        }
        gradients = [1e-3 * torch.randn(shape, generator=generator) for shape in shapes]
        for optimizer in (twins, compiled):
            params = [p for group in optimizer.param_groups for p in group['params']]
            for param, gradient in zip(params, gradients):
                param.grad = gradient.clone()
            for group in optimizer.param_groups:
                group.update(values)
            optimizer.step()
        if step == 1:
            monkeypatch.setattr(torch._dynamo.config, 'error_on_recompile', True)
    for groups in zip(twins.param_groups, compiled.param_groups):
        for one, other in zip(*(group['params'] for group in groups)):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
            for name, least in (('m', 1e-12), ('delta', 1e-7)):
                a, b = twins.state[one][name], compiled.state[other][name]
                torch.testing.assert_close(a, b, rtol=1e-5, atol=least)
                assert a.abs().max() > 0


# ---------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.timeout(900)
def test_a_run_on_two_processes_and_its_files(root, tmp_path, job_environment):
    pytest.importorskip('torch')
    words = '--systems ours,chainermn,twin,torchvision --rounds 2 --iterations 2 --out'
    done = subprocess.run(
        [*COMMAND, *words.split(), tmp_path],
        cwd=root,
        env=job_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / 'systems.json').read_text())
    figures = content['figures']
    assert list(figures) == ['ours', 'chainermn', 'twin', 'torchvision']
    assert content['device'] == 'CPU' and content['settings']['processes'] == 2
    for name, row in figures.items():
        rounds = row['iteration'] * np.array([1 - 2 * row['spread'], 1 + 2 * row['spread']])
        assert row['images_per_second'] == pytest.approx(np.mean(64 / rounds))
        assert len(row['losses']) == 4 and row['loss'] == np.mean(row['losses'][2:])
        assert row['losses'][0] == pytest.approx(figures['ours']['losses'][0], rel=1e-4)
        assert row['peak'] > row['memory'] > 2**20
        parts = [row[part] or 0 for part in ('compute', 'allreduce', 'update', 'rest')]
        assert sum(parts) == pytest.approx(row['iteration'], rel=0.3)  # medians of two
        assert (row['allreduce'] is None) == (name in ('twin', 'torchvision'))
        assert name in done.stdout
    losses = {name: np.array(row['losses']) for name, row in figures.items()}
    distance = {name: np.linalg.norm(own - losses['ours']) for name, own in losses.items()}
    assert 0 < 10 * distance['twin'] < min(distance['chainermn'], distance['torchvision'])
    assert figures['ours']['same_bits']
    text = (tmp_path / 'systems.txt').read_text()
    assert text in done.stdout and 'by design' in text
    assert Image.open(tmp_path / 'systems.png').size == (1650, 675)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
@pytest.mark.mpi
def test_systems_on_other_devices_are_an_error(root, tmp_path, job_environment, cupy_on_host):
    """Ours on a GPU, which tests/cupy_on_host stands for, and PyTorch's on the CPU."""
    pytest.importorskip('torch')
    words = '--systems ours,chainermn,ours-chainer,twin --rounds 1 --iterations 1 --processes 1'
    done = subprocess.run(
        [*COMMAND, *words.split(), '--out', tmp_path],
        cwd=root,
        env={**job_environment, **cupy_on_host},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'left out: ours-chainer: it is the same as ours' in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith('error: twin runs on CPU, but the first of the systems on ')


@pytest.mark.slow
@pytest.mark.mpi
def test_without_pytorch_its_systems_are_left_out(root, tmp_path, job_environment):
    (tmp_path / 'torch.py').write_text("raise ImportError('No module named torch')\n")
    environment = {
        **job_environment,
        'PYTHONPATH': f'{tmp_path}{os.pathsep}{job_environment["PYTHONPATH"]}',
    }

    def run(systems):
        words = ['--systems', systems, '--rounds', '1', '--iterations', '1']
        return subprocess.run(
            [*COMMAND, *words, '--out', tmp_path / 'out'],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run('ours-torch,ours,twin,torchvision')
    assert done.returncode == 0, done.stdout + done.stderr
    left_out = [line for line in done.stdout.splitlines() if line.startswith('left out: ')]
    assert [line.split()[2] for line in left_out] == ['ours-torch:', 'twin:', 'torchvision:']
    assert all('No module named torch; ' in line for line in left_out)
    assert 'EXTRAS=twin' in left_out[1]
    assert list(json.loads((tmp_path / 'out/systems.json').read_text())['figures']) == ['ours']
    done = run('twin')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == 'error: none of the systems can run here'


@pytest.fixture
def started(root, tmp_path, job_environment, leaves_nothing):
    """A run whose first job trains, and would train for long."""
    words = '--systems ours --rounds 1 --iterations 5000 --out'
    process = subprocess.Popen(
        [*COMMAND, *words.split(), tmp_path],
        cwd=root,
        env=job_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob('*/digits')):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    yield process
    process.kill()
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize(
    'kill, number, status', [(os.killpg, signal.SIGINT, 130), (os.kill, signal.SIGTERM, 143)]
)
def test_ctrl_c_and_kill_end_it_and_leave_nothing(started, tmp_path, kill, number, status):
    """Ctrl-C of a terminal reaches all processes of the group."""
    kill(started.pid, number)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == status
    last = output.splitlines()[-1]
    assert (last == 'stopped') == (number == signal.SIGINT)
    assert 'Traceback' not in output and 'mpiexec' not in output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.mpi
def test_a_rank_that_dies_ends_it(started):
    marker = f'REPRODUCE_TEST={os.environ["REPRODUCE_TEST"]}'.encode()
    *_, rank = _ranks(marker)
    os.kill(rank, signal.SIGKILL)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 1
    assert 'error: the job of ours' in output.splitlines()[-1]


def _ranks(marker):
    for process in Path('/proc').glob('[0-9]*'):
        try:
            words = (process / 'cmdline').read_bytes().split(b'\0')
            environment = (process / 'environ').read_bytes()
        except OSError:
            continue
        program = b'reproduce.studies.speed.systems_program'
        if marker in environment and words[1:3] == [b'-m', program]:
            yield int(process.name)


@pytest.mark.parametrize(
    'mpiexec, message',
    [('no-such-mpiexec', 'error: mpiexec does not run'), ('false', 'error: the job of ours ended')],
)
def test_an_mpiexec_that_does_not_run_is_one_line(root, tmp_path, mpiexec, message):
    done = subprocess.run(
        [*COMMAND, '--out', tmp_path],
        cwd=root,
        env={**os.environ, 'MPIEXEC': mpiexec},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert message in line
