"""What train.py does without mpiexec, on every Python."""

import json
import subprocess
import sys

import chainer
import numpy as np
import pytest
from PIL import Image

from reproduce import dataset, images, train
from reproduce.job import plots
from reproduce.job.options import parse
from reproduce.resnet50 import ResNet50
from reproduce.settings import InputError
from reproduce.train import decayed_parameters


def test_dry_run_starts_in_a_fresh_interpreter(root, tmp_path):
    done = subprocess.run(
        [sys.executable, root / 'reproduce' / 'train.py', '--dry-run'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert '32,768' in done.stdout and done.stderr == ''
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_it_says_what_to_do(root, tmp_path):
    done = subprocess.run(
        [sys.executable, '-S', root / 'reproduce' / 'train.py'],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ''
    [line] = done.stderr.splitlines()
    assert line.startswith('error: ') and "no package 'chainer'" in line
    assert './run_mpi.sh' in line and 'hostfiles/README.md' in line


def test_weight_decay_is_on_everything_but_gamma_and_beta():
    model = ResNet50(10, width=4)
    decayed = {id(param) for param in decayed_parameters(model)}
    for name, param in model.namedparams():
        assert (id(param) in decayed) == (not name.endswith(('/gamma', '/beta'))), name
    assert len(decayed) == 53 + 2


def test_exemption_goes_by_type_and_not_by_name():
    model = chainer.Chain(
        gamma=chainer.links.Linear(2, 2), other=chainer.links.BatchNormalization(2)
    )
    assert {param.name for param in decayed_parameters(model)} == {'W', 'b'}


def settings_of(*options):
    return parse(list(options), 1)[0]


def test_folders_come_from_options_or_from_the_environment(monkeypatch):
    monkeypatch.delenv('IMAGENET_ROOT', raising=False)
    assert dataset.roots(settings_of()) == (None, None)
    monkeypatch.setenv('IMAGENET_ROOT', '/data/imagenet')
    assert dataset.roots(settings_of()) == ('/data/imagenet/train', '/data/imagenet/val')
    assert dataset.roots(settings_of('--train-root', 'a', '--val-root', 'b')) == ('a', 'b')
    assert dataset.roots(settings_of('--preset', 'smoke')) == (None, None)
    with pytest.raises(InputError, match='--train-root and --val-root go together'):
        dataset.roots(settings_of('--val-root', 'b'))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """16 training and 6 validation images of two classes."""
    top = tmp_path_factory.mktemp('images')
    rng = np.random.RandomState(0)
    for split, count in (('train', 8), ('val', 3)):
        for name in ('cat', 'dog'):
            (top / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 256, (10, 12, 3)).repeat(4, 0).repeat(4, 1)
                Image.fromarray(pixels.astype(np.uint8)).save(top / split / name / f'{i}.png')
    return top


@pytest.fixture
def trained(folders, tmp_path):
    """Trains in this process; returns the final model and the last entry of the log."""

    def run(*options):
        out = tmp_path / f'run{len(list(tmp_path.iterdir()))}'
        train.main(
            [
                *'--preset cifar10 --workers 2 --local-batch-size 4 --epochs 4 --width 2'.split(),
                *'--image-size 16 --resize 20 --stem imagenet --loader serial'.split(),
                *('--train-root', str(folders / 'train'), '--val-root', str(folders / 'val')),
                *('--out', str(out)),
                *options,
            ]
        )
        return dict(np.load(out / 'model.npz')), json.loads((out / 'log').read_text())[-1]

    return run


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.mark.slow
def test_every_option_reaches_the_training(trained, shallow, monkeypatch):
    """8 updates at the epochs 0, 11.25, 22.5, ... of 90, so that one lies in the transition."""
    monkeypatch.setattr(plots, 'curves', lambda *arguments: None)
    model, log = trained()
    again, _ = trained()
    assert same(model, again)
    # The last update is at epoch 78.75 of 90.
    assert log['lr'] == pytest.approx(0.1 * 8 / 256 * 0.01)
    assert (log['alpha_sgd'], log['alpha_rmsprop']) == (1, 0)
    start = ResNet50(2, 2, 'imagenet', seed=0).conv1.W.array
    assert np.corrcoef(model['conv1/W'].ravel(), start.ravel())[0, 1] > 0.9
    for options in (
        '--workers 1',
        '--local-batch-size 3',
        '--epochs 5',
        '--lr-schedule steps',
        '--alpha-form continuous',
        '--alpha-form sgd',
        '--beta-center 12',
        '--beta-period 4',
        '--lr-rmsprop 1e-3',
        '--mu1 0.8',
        '--mu2 0.9',
        '--eps 1e-3',
        '--weight-decay 1e-2',
        '--allreduce-grad-dtype float32',
        '--gradient-scale 1024',
        '--width 3',
        '--stem cifar',
        '--image-size 20',
        '--min-crop-area 0.9',
        '--no-horizontal-flip',
        '--resize-filter pillow',
        '--seed 1',
    ):
        other, _ = trained(*options.split())
        assert not same(model, other), f'{options} changes nothing'
    start = ResNet50(2, 2, 'imagenet', seed=1).conv1.W.array
    assert np.corrcoef(other['conv1/W'].ravel(), start.ravel())[0, 1] > 0.9
    four, _ = trained('--workers', '4')  # of two workers the sum of a ring is exact
    ring, _ = trained('--workers', '4', '--accumulate', 'ring')
    assert not same(four, ring)
    pooled, _ = trained('--pooled-variance')
    for name in model:
        assert np.array_equal(model[name], pooled[name]) == (not name.endswith('avg_var')), name
    _, other = trained('--resize', '24')
    assert other['validation/main/loss'] != log['validation/main/loss']
    for options in ('--validation-batch-size 4', '--loader processes:1'):
        other, _ = trained(*options.split())
        assert same(model, other), options


class Stopped(Exception):
    pass


def test_what_main_hands_to_the_trainer(folders, tmp_path, monkeypatch):
    """Which parameters decay, by how much, which pixels the network sees, and in which minibatches
    it is validated."""

    def stop(trainer, **_):
        raise Stopped(trainer)

    monkeypatch.setattr(chainer.training.Trainer, 'run', stop)
    with pytest.raises(Stopped) as stopped:
        train.main(
            [
                *'--preset cifar10 --workers 2 --local-batch-size 3 --width 2 --seed 5'.split(),
                *'--weight-decay 0.003 --loader serial --validation-batch-size 2'.split(),
                *('--train-root', str(folders / 'train'), '--val-root', str(folders / 'val')),
                *('--out', str(tmp_path / 'out')),
            ]
        )
    evaluator, left = stopped.value.args[0].get_extension('validation'), []
    evaluator.after_minibatch = lambda: left.append(evaluator.minibatches_left)
    n_images = len(list(folders.glob('val/*/*')))
    assert evaluator()['validation/images'] == n_images
    assert left == list(range(-(-n_images // 2), -1, -1))
    updater = stopped.value.args[0].updater
    for name, param in updater.get_optimizer('main').target.namedparams():
        param.grad = np.zeros_like(param.data)
        param.data[...] = 2
        param.update()
        decay = 0 if name.endswith(('/gamma', '/beta')) else 0.003 * 2
        m = param.update_rule.state['m']
        np.testing.assert_allclose(m, (1 - 0.99) * decay**2, rtol=1e-4, err_msg=name)
    x, t = updater._converter(updater._batches(4, 1))
    for k in range(3):
        epoch, place = divmod(4 * 6 + 3 + k, 16)
        index = np.random.RandomState([5, epoch]).permutation(16)[place]
        path = folders / 'train' / ('cat', 'dog')[index // 8] / f'{index % 8}.png'
        rng = np.random.RandomState([5, epoch, index])
        pixels = images.train_image(path, rng, images.Preprocessing(32, 32, 0.25))
        expected = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(x[k], expected.transpose(2, 0, 1), rtol=1e-4, atol=1e-5)
        assert t[k] == index // 8
