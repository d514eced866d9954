"""The benchmark of forward and backward: its arithmetic, its refusals, and real runs."""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import extensions  # noqa: F401  isort: skip  (makes Chainer importable on NumPy 2)
import numpy as np
import pytest

from extensions import kernels
from reproduce.studies.speed import functions

COMMAND = [sys.executable, '-m', 'reproduce.studies.speed', 'functions']
OPENBLAS = [*Path(np.__file__).resolve().parents[1].glob('numpy.libs/*openblas*')]
TINY = functions.Network(4, 'cifar', 16, 4, 10)


def operations(network):
    """Multiplications and additions of forward and backward, by the shapes in ResNet50's text.

    Each convolution has three products, but the first has no gradient by the images.
    """
    n, width, size = network.batch_size, network.width, network.image_size
    kernel, stride = (7, 2) if network.stem == 'imagenet' else (3, 1)
    side = -(-size // stride)
    total = 2 * side**2 * 3 * width * kernel**2
    if network.stem == 'imagenet':
        side = -(-side // 2)
    channels = width
    for i, n_blocks in enumerate((3, 4, 6, 3)):
        inside = width * 2**i
        for block in range(n_blocks):
            before, side = side, -(-side // 2) if i and not block else side
            total += 3 * before**2 * channels * inside
            total += 3 * side**2 * (9 * inside**2 + 4 * inside**2)
            total += 3 * side**2 * channels * 4 * inside * (not block)
            channels = 4 * inside
    return 2 * n * (total + 3 * channels * network.n_classes)


@pytest.mark.parametrize(
    'network',
    [TINY, functions.Network(4, 'imagenet', 64, 2, 7)],
    ids=['cifar', 'imagenet'],
)
def test_layers_are_those_of_the_network(network):
    """A function that another one calls in its backward pass is no row of its own."""
    rows = functions.Training(network).layers()
    assert rows['all'][3] == operations(network)
    convolutions = [row for layer, row in rows.items() if layer.startswith('convolution')]
    assert sum(row[0] for row in convolutions) == rows['BatchNormalization'][0] == 53
    assert (rows['ReLU'][0], rows['_ + _'][0], rows['LinearFunction'][0]) == (49, 16, 1)
    others = {'BatchNormalization', 'ReLU', '_ + _', 'LinearFunction', 'Mean'}
    others |= {'SoftmaxCrossEntropy', 'between the functions', 'all'}
    others |= {'MaxPoolingND'} if network.stem == 'imagenet' else set()
    assert len(rows) == len(convolutions) + len(others) and others < set(rows)
    parts = np.sum([row for layer, row in rows.items() if layer != 'all'], axis=0)
    np.testing.assert_allclose(parts, rows['all'])
    assert min(min(row[1:3]) for row in rows.values()) > 0


def test_a_layer_is_named_by_its_shapes():
    rows = functions.Training(functions.Network(4, 'imagenet', 64, 1, 7)).layers()
    assert rows['convolution 7x7/2, 3 to 4, side 64'][0] == 1
    assert rows['convolution 3x3/2, 8 to 8, side 16'][0] == 1
    assert rows['convolution 3x3, 8 to 8, side 8'][0] == 3
    assert rows['convolution 1x1/2, 16 to 32, side 16'][0] == 1


def test_224_pixels_take_as_many_operations_as_is_known():
    """4.09 G multiplications and additions forward, three times as many in all but the first."""
    found = operations(functions.NETWORKS['224px']) / functions.NETWORKS['224px'].batch_size
    assert found == pytest.approx(24.3e9, rel=0.01)


def test_figures_are_medians_over_the_rounds():
    flop = functions._SGEMM_FLOP
    seconds = {
        'sgemm': [1.0, 2.0, 1.0, 2.0, 1.0],
        'chainer': [4.0, 8.0, 12.0, 16.0, 20.0],
        'ours': [2.0, 4.0, 2.0, 6.0, 9.0],
        'two ours': [2.0, 4.0, 4.0, 12.0, 12.0],
    }
    assert functions._speed(seconds, 'ours', 8, flop) == {
        'median_seconds': 4.0,
        'images_per_second': 2.0,
        'spread': 0.5,
        'times_chainer': pytest.approx(20 / 9),
        'gflop_per_second': flop / 4e9,
        'share_of_sgemm': pytest.approx(0.5),
        'two_at_once': 1.5,
    }
    assert functions._speed(seconds, 'chainer', 8, flop)['two_at_once'] is None


@pytest.mark.skipif(not OPENBLAS, reason="NumPy's BLAS is another one")
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='the names are of x86-64')
@pytest.mark.parametrize(
    'core, names',
    [('Prescott', ['Prescott', 'Katmai']), ('Haswell', ['Haswell'])],  # Katmai's are Prescott's
)
def test_the_kernels_of_blas_are_named(root, core, names):
    program = 'from reproduce.studies.speed import functions; print(functions.blas())'
    environment = {**os.environ, 'OPENBLAS_CORETYPE': core}
    command = [sys.executable, '-c', program]
    found = subprocess.check_output(command, cwd=root, env=environment, text=True).strip()
    assert found in [f'OpenBLAS for {name}' for name in names]


def gradients():
    rng = np.random.RandomState(0)
    return 2.5, {name: rng.standard_normal(1000) * s for name, s in (('W', 1), ('b', 0.01))}


def test_a_difference_within_the_limits_is_told():
    loss, grads = gradients()
    found = loss * (1 + 9e-6), {'W': grads['W'] * 1.009, 'b': grads['b'] * 0.91}
    assert functions.difference((loss, grads), found) == pytest.approx(0.009, rel=0.01)


@pytest.mark.parametrize(
    'factors, message',
    [
        ((1 + 2e-5, 1, 1), "loss differs from Chainer's by 2.0e-05, more than 1e-05"),
        ((1, 1.02, 1), "gradient differs from Chainer's by 2.0e-02, more than 1e-02"),
        ((1, 1, 0.8), "gradient of b differs from Chainer's by 2.0e-01, more than 1e-01"),
        ((np.nan, 1, 1), 'loss differs'),
        ((1, np.nan, 1), 'gradient of W differs'),
    ],
)
def test_a_difference_above_a_limit_is_refused(factors, message):
    loss, grads = gradients()
    found = loss * factors[0], {'W': grads['W'] * factors[1], 'b': grads['b'] * factors[2]}
    with pytest.raises(ValueError, match=message):
        functions.difference((loss, grads), found)


def test_a_process_that_dies_is_named(capfd):
    process = functions.Process('chainer', TINY)
    assert process.receive()[0] == ''
    process()
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(SystemExit, match='error: the process of chainer ended by SIGKILL; if mem'):
        process()
    process.close()


def test_an_implementation_that_cannot_run_is_left_out(capfd):
    with contextlib.ExitStack() as stack:
        found = functions.started(['chainer', 'compiled sse9'], TINY, stack)
    assert list(found) == ['chainer']
    assert 'left out: compiled sse9: ' in capfd.readouterr().out


@pytest.mark.slow
def test_all_implementations_that_can_run_are_in_the_tables(capfd):
    result = functions.measure('tiny', TINY, 1, True)
    printed = capfd.readouterr().out
    rows = result['implementations']
    assert next(iter(rows)) == 'chainer'
    for name in functions.implementations():
        assert (f'left out: {name}: ' in printed) != (name in rows)
    compiled = [name for name in rows if name.startswith('compiled ')]
    assert (
        len(compiled) == max(1, len(kernels.functions) - 1) if kernels.functions else not compiled
    )
    for name, row in rows.items():
        assert row['times_chainer'] > 0 and row['memory'] >= 0
        assert 0 < row['difference'] < 1e-2 or name == 'chainer'
        assert (row['two_at_once'] or 0) > 0 or name not in list(rows)[:2]
        line = next(line for line in printed.splitlines() if line.startswith(f'{name} '))
        assert f'{row["images_per_second"]:.2f}' in line.split()
    for name in compiled:
        assert rows[name]['description'] == f'compiled C, {name.split()[1]}, float32'
    assert len({rows[name]['difference'] for name in compiled}) <= 1  # the same bits
    assert list(result['layers']) == list(rows)[:2]
    assert set(result['layers']['chainer']) == set(list(result['layers'].values())[-1])
    assert result['layers']['chainer']['all']['flop'] == result['flop'] == operations(TINY)
    assert '\nconvolution 3x3/2, 8 to 8, side 16 ' in printed


@pytest.mark.slow
@pytest.mark.skipif(not kernels.functions, reason='there is no compiled library')
def test_a_wrong_implementation_is_not_timed(root):
    program = Path(__file__).parent / 'programs' / 'time_wrong_functions.py'
    done = subprocess.run(
        [sys.executable, program],
        cwd=root,
        env={**os.environ, 'PYTHONPATH': str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    name = functions.implementations()[1]
    message = f'error: {name} is wrong, so nothing was timed: its gradient of /conv1/W differs from'
    assert message in done.stderr
    assert done.returncode == 1 and 'images/s' not in done.stdout


@pytest.mark.slow
def test_the_command_prints_and_writes_its_figures(root, tmp_path):
    file = tmp_path / 'figures.json'
    done = subprocess.run(
        [*COMMAND, '--networks', 'smoke', '--repeat', '1', '--json', file],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    content = json.loads(file.read_text())
    assert content['benchmark'] == 'functions' and content['machine']
    (network,) = content['figures'].values()
    assert 'smoke: ResNet-50, width 16, stem imagenet; 32 images of 32 x 32' in done.stdout
    assert f' {network["sgemm_gflop_per_second"]:.1f} GFLOP/s; medians of 1 rounds' in done.stdout
    assert network['blas'] in done.stdout
    row = network['implementations']['chainer']
    assert row['memory'] > 4 * 1_500_000  # the gradients
    assert f'{row["images_per_second"]:.2f}' in done.stdout


@pytest.mark.parametrize(
    'options, message',
    [
        ('--networks smoke,32px', "--networks has '32px', which is none of smoke, cifar"),
        ('--networks cifar --layers smoke', '--layers smoke is none of cifar'),
        ('--layers none', '--layers none is none of smoke, cifar'),
        ('--repeat 0', '--repeat must be at least 1, not 0'),
        ('--json nowhere/figures.json', '--json nowhere/figures.json: No such file'),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(monkeypatch, capfd, options, message):
    monkeypatch.setattr(functions, 'measure', lambda *args: pytest.fail('it started'))
    with pytest.raises(SystemExit) as ended:
        functions.main(['functions', *options.split()])
    captured = capfd.readouterr()
    assert ended.value.code == 2 and captured.out == ''
    assert captured.err.startswith('error: ') and message in captured.err
