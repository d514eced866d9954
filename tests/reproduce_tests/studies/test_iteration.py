"""The benchmark of an iteration: its arithmetic, its refusals, and a real run."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
from mpi4py import MPI
from PIL import Image

from extensions import kernels
from reproduce import listing
from reproduce.settings import FUNCTIONS
from reproduce.studies.speed import iteration, iteration_program
from reproduce.train import experiment

COMMAND = [sys.executable, '-m', 'reproduce.studies.speed', 'iteration']


def test_a_row_is_the_mean_of_the_same_rounds_in_all_columns():
    """So the parts sum to the iteration, whatever hiccups a round has had."""
    rng = np.random.RandomState(0)
    rounds = rng.uniform(1, 2, (9, 8))
    rounds[:, 6] = rounds[:, :6].sum(axis=1)
    rounds[4, 2:7] += (100, 0, 0, 0, 100)
    row = iteration.middle_half(rounds)
    assert sum(row[part] for part in iteration._PARTS) == pytest.approx(row['iteration'])
    kept = np.sort(rounds[:, 6])[2:7]
    assert row['iteration'] == pytest.approx(kept.mean())
    assert row['pack'] < 2


def test_efficiencies_against_one_worker_and_one_host():
    runs = [
        {'workers': n, 'hosts': hosts, 'iteration': seconds}
        for n, hosts, seconds in ((1, 1, 0.7), (4, 1, 0.8), (8, 1, 0.875), (16, 2, 1.0))
    ]
    iteration.add_efficiencies(runs)
    assert [run['efficiency_one_worker'] for run in runs] == pytest.approx([1, 0.875, 0.8, 0.7])
    assert [run['efficiency_one_host'] for run in runs] == [None, None, 1, 0.875]
    others = [{'workers': 16, 'hosts': 2, 'iteration': 1.0}]
    iteration.add_efficiencies(others)
    assert (others[0]['efficiency_one_worker'], others[0]['efficiency_one_host']) == (None, None)


def test_the_ratio_is_of_medians(capsys):
    ours = np.tile(np.arange(1.0, 9.0), (3, 1))
    ours[2] *= 100
    peer = 2 * ours
    peer[2] = 2 * ours[0]
    result = {'processes': 2, 'seconds': {'ours, float16': ours.tolist(), 'theirs': peer.tolist()}}
    ratios = iteration.compare_with_peer(result)['ours, float16']
    assert ratios.pop('all but forward + backward') == 0.5 and set(ratios.values()) == {0.5}
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[-3:] == ['5000.00', '10000.00', '0.50']  # 7 - 2, and not the sum of medians


def test_the_plot_shows_three(tmp_path):
    runs = [
        {'workers': n, 'hosts': 1, 'iteration': 0.1 + n / 100, 'allreduce': n / 100}
        for n in (1, 2, 8)
    ]
    iteration.add_efficiencies(runs)
    iteration.plot({'ours': runs, 'ChainerMN': runs[:2], 'earlier.json': runs}, str(tmp_path))
    assert Image.open(tmp_path / 'iteration.png').size == (1350, 600)


@pytest.mark.parametrize(
    'options, message',
    [
        ('--workers 1,two', '--workers'),
        ('--workers 0', '--workers'),
        ('--repeat 0', 'above 0'),
        ('--stem resnet', 'resnet is not one of imagenet, cifar'),
        ('--loader fast', "--loader is 'fast'"),
        ('--hostfile nowhere', 'nowhere'),
        ('--image-root nowhere', 'image folder nowhere'),
        ('--compare setup.py', '--compare setup.py is not an iteration.json'),
        ('--out setup.py', 'setup.py'),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(root, options, message):
    done = subprocess.run(
        [*COMMAND, *options.split()],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ''
    errors = [line for line in done.stderr.splitlines() if 'error: ' in line]
    assert len(errors) == 1 and message in errors[0]
    assert 'Traceback' not in done.stderr


@pytest.mark.slow
@pytest.mark.mpi
def test_runs_table_plot_and_numbers_that_add_up(root, tmp_path):
    """Ours and ChainerMN's on 1 and 2 processes, by a hostfile; then a folder, and a comparison."""
    hosts = tmp_path / 'hosts'
    hosts.write_text('localhost slots=2\n')
    small = '--width 4 --local-batch-size 2 --iterations 3 --repeat 4'.split()

    def run(*options):
        done = subprocess.run(
            [*COMMAND, *small, *options],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out = tmp_path / 'first'
    printed = run('--workers', '2,1', '--hostfile', hosts, '--peer', 'chainermn', '--out', out)
    content = json.loads((out / 'iteration.json').read_text())
    figures_ = content['figures']
    assert content['benchmark'] == 'iteration'
    assert set(figures_['all_of_ours']) == {'ours, float16', 'ours, float32', 'ChainerMN, float32'}
    for runs in (figures_['runs'], figures_['peer']):
        assert [(run['workers'], run['processes'], run['hosts']) for run in runs] == [
            (1, 1, 1),
            (2, 2, 1),
        ]
        for run_ in runs:
            parts = sum(run_[part] for part in iteration._PARTS)
            assert parts == pytest.approx(run_['iteration'], rel=0.02)
            assert min(run_[part] for part in ('data', 'compute', 'update', 'allreduce')) > 0
            assert run_['images_per_second'] == 2 * run_['workers'] / run_['iteration']
    assert all(run_['pack'] > 0 for run_ in figures_['runs'])
    assert all(run_['pack'] == 0 for run_ in figures_['peer'])
    ratios = figures_['ours_by_peer']['2']['ours, float16']
    assert 0.5 < ratios['forward + backward'] < 2  # the same model
    assert '2 workers: round 0 of 4' in printed and 'sum to the iteration within' in printed
    assert f'{ratios["all but forward + backward"]:.2f}, ' in printed
    assert Image.open(out / 'iteration.png').size == (1350, 600)
    own = 'compiled' if kernels.functions and kernels.has_fma() else 'numpy'
    assert content['settings']['functions'] == own  # auto

    rng = np.random.RandomState(0)
    for name in ('cat', 'dog'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.randint(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'images' / name / f'{i}.png')
    second = tmp_path / 'second'
    options = ('--image-root', tmp_path / 'images', '--compare', out / 'iteration.json')
    words = '--workers 2 --stem cifar --functions chainer --out'.split()
    printed = run(*words, second, *options)
    assert 'has stem imagenet, this call has cifar' in printed
    assert f'has functions {own}, this call has chainer' in printed
    (run_,) = json.loads((second / 'iteration.json').read_text())['figures']['runs']
    assert run_['efficiency_one_worker'] is None and run_['efficiency_one_host'] == 1
    done = subprocess.run(
        [*COMMAND, '--workers', '4', *options],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert '4 workers x 16 images = 64 are more than the 4 in' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('name', FUNCTIONS)
def test_it_takes_every_implementation_that_a_training_takes(name):
    assert iteration.parse(['iteration', '--functions', name]).functions == name


def test_ours_trains_the_experiment(shallow, tmp_path):
    """A round gives the bits of train.experiment() itself, run for as many iterations."""
    options = argparse.Namespace(
        iterations=2,
        repeat=1,
        local_batch_size=2,
        width=2,
        stem='cifar',
        image_size=16,
        functions='chainer',
        allreduce_grad_dtype='float16',
        loader='serial',
        folder=str(tmp_path),
    )
    (tmp_path / 'images').mkdir()
    made = iteration_program.made_images(tmp_path / 'images', 16)
    train, val = iteration_program.repeated(made, 4), iteration_program.repeated(made, 2)
    assert (len(train), len(val), len(train.classes)) == (4, 2, 1000)
    ours = iteration_program.Ours(options, train, val, MPI.COMM_SELF, 'float16')
    seconds = ours.run(tmp_path)
    assert ours.updater.iteration == 2 and ours.updater.epoch == 1 and min(seconds[-2:]) > 0

    settings = iteration_program.settings_of(options, 1)
    trainer, batches = experiment(settings, ours.comm, train, val)
    trainer.stop_trigger = lambda trainer: trainer.updater.iteration == 2
    trainer.run()
    expected = trainer.updater.get_optimizer('main').target
    for name, param in ours.model.namedparams():
        np.testing.assert_array_equal(param.array, dict(expected.namedparams())[name].array)
    assert {type(entry[0]) for entry in ours.entries} > {
        type(entry.extension) for entry in trainer._extensions.values()
    }
    for loader in (ours.batches, batches):
        loader.close()


@pytest.mark.parametrize('n_images', [1, 5, 21, 50, 105])
def test_a_listing_of_just_so_many_images(tmp_path, n_images):
    names = [f'{i}.jpg' for i in range(21)]
    files = ''.join(f'{name}\0' for name in names).encode()
    folder = listing.ImageFolder(str(tmp_path), ('a', 'b', 'c'), np.array([10, 0, 11]), files)
    found = iteration_program.repeated(folder, n_images)
    assert len(found) == n_images and found.classes == folder.classes
    paths = [found.path(i) for i in range(n_images)]
    known = {folder.path(i): folder.labels[i] for i in range(21)}
    assert [known[path] for path in paths] == found.labels.tolist()
    times = np.unique([paths.count(path) for path in set(paths)])
    assert len(set(paths)) == min(n_images, 21) and np.ptp(times) <= 1
