"""The study in miniature: small runs for real, and the committed results against their table."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reproduce.studies import miniature

SMALL = """
from reproduce.studies import miniature
miniature.N_EPOCHS = 2
miniature.COMMON = '--preset smoke --width 2 --epochs 2 --local-batch-size 4 --loader serial'
miniature.VARIANTS = {'x': ('two', '--workers 2'), 'y': ('four', '--workers 4 --bn-decay 0.9')}
miniature.main()
"""


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    """A folder like CIFAR-10's, of 3 classes."""
    root = tmp_path_factory.mktemp('like cifar')
    rng = np.random.RandomState(0)
    for split, n in (('train', 20), ('val', 8)):
        for name in ('cat', 'dog', 'ship'):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.randint(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{i:04}.png')
    return root


@pytest.fixture
def start(root, cifar, tmp_path):
    def start(*options, per_class=16, program=SMALL):
        command = [sys.executable, '-c', program, '--images', str(cifar), '--out', str(tmp_path)]
        return subprocess.Popen(
            [*command, f'--train-per-class={per_class}', '--val-per-class=6', *options],
            cwd=root,
            env={
                **os.environ,
                'OMPI_ALLOW_RUN_AS_ROOT': '1',
                'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1',
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.slow
def test_runs_tables_and_goes_on_after_an_interruption(start, tmp_path):
    first = start('--seeds', '2', '--at-a-time', '1')
    while not (tmp_path / 'x-seed0' / 'summary.json').exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=60)
    assert (
        first.returncode == 1 and output.splitlines()[-1] == 'stopped: the same command continues'
    )
    done = (tmp_path / 'x-seed0' / 'log').stat().st_mtime_ns
    second = start('--seeds', '2')
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0, output
    assert re.search(r'^[1-3] of 4 runs are finished$', output, re.MULTILINE)
    assert re.search(r'^\d of 8 epochs, \d+ s left; \w-seed\d is finished', output, re.MULTILINE)
    assert (tmp_path / 'x-seed0' / 'log').stat().st_mtime_ns == done  # not trained again
    assert Image.open(tmp_path / 'runs.png').size[0] > 1000
    rows = (tmp_path / 'table.md').read_text().splitlines()[2:]
    for row, (variant, title, workers) in zip(rows, (('x', 'two', 2), ('y', 'four', 4))):
        runs = [tmp_path / f'{variant}-seed{seed}' for seed in (0, 1)]
        logs = [json.loads((run / 'log').read_text())[-1] for run in runs]
        top1 = [100 * log['validation/main/accuracy'] for log in logs]
        expected = f'{statistics.mean(top1):.2f} +- {statistics.stdev(top1):.2f}'
        assert row.startswith(f'| {variant} | {title} | 2 | {expected} |')
        settings = json.loads((runs[1] / 'settings.json').read_text())
        assert (settings['workers'], settings['seed']) == (workers, 1)
        assert settings['bn_decay'] == (0.9 if variant == 'y' else 0)
        assert len(list((tmp_path / 'images' / 'train' / 'ship').iterdir())) == 16
    assert len((tmp_path / 'commands.txt').read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_ends_all(start, tmp_path):
    done = start('--at-a-time', '1', program=SMALL.replace('--workers 2', '--workers 1000'))
    output, _ = done.communicate(timeout=100)
    assert done.returncode == 1
    path = tmp_path / 'x-seed0' / 'output.txt'
    assert output.splitlines()[-1] == f'error: x-seed0 failed; {path} says why'
    assert 'error: the total batch of 1000 workers' in path.read_text()


def test_too_few_images_and_no_images(cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = ['--images', cifar]
    for options, message in (
        (
            [*images, '--train-per-class=21'],
            'train/cat has 20 images, not 21: lower --train-per-class',
        ),
        (['--images', cifar / 'train'], 'has no class folders; --images needs train/CLASS'),
        ([], '--images FOLDER is needed'),
        ([*images, '--seeds', '0'], 'must be at least 1'),
        (['--table-only', '--out', cifar], 'has no finished run'),
    ):
        monkeypatch.setattr(sys, 'argv', ['miniature', *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            miniature.main()
        # A text that is the status is what Python prints, before it ends with 1.
        assert message in f'{ended.value.code}{capsys.readouterr().err}'
        assert ended.value.code not in (0, None)


def linked(out):
    return {str(path.relative_to(out)): path.resolve() for path in out.glob('images/*/*/*')}


def test_the_images_are_those_that_were_asked_for(cifar, tmp_path):
    def ask(n, images=cifar):
        found = miniature.first_images(images, {'train': n, 'val': 2})
        miniature.link(found, tmp_path)
        return {f'images/{"/".join(place)}': path for place, path in found.items()}

    other = tmp_path / 'other'
    for split in ('train', 'val'):
        for i in range(5):
            (other / split / 'cat').mkdir(parents=True, exist_ok=True)
            (other / split / 'cat' / f'{i:04}.png').touch()
    for n, images in ((10, cifar), (3, cifar), (4, other), (12, cifar)):
        asked = ask(n, images)
        assert linked(tmp_path) == asked
        classes = 1 if images == other else 3
        assert len(asked) == classes * (n + 2)
        names = {Path(place).name for place in asked if '/train/' in place}
        assert names == {f'{i:04}.png' for i in range(n)}  # the first ones
        assert len(list((tmp_path / 'images' / 'train').iterdir())) == classes

    (tmp_path / 'x-seed0').mkdir()
    assert linked(tmp_path) == ask(12)  # goes on
    for n, images in ((3, cifar), (13, cifar), (4, other)):
        with pytest.raises(SystemExit, match=f'the runs in {tmp_path} have other images'):
            ask(n, images)
    assert linked(tmp_path) == asked


def test_the_variants_are_what_their_titles_say():
    from reproduce.job.options import parse

    settings = {}
    for name, (_, options) in miniature.VARIANTS.items():
        settings[name], _ = parse([*miniature.COMMON.split(), *options.split()], 1)
    assert settings['a'].total_batch_size == 64
    assert {s.total_batch_size for name, s in settings.items() if name != 'a'} == {1024}
    assert {s.epochs for s in settings.values()} == {miniature.N_EPOCHS}
    differing = {}
    for name in ('s', 'dc', 'e', 'f'):
        differing[name] = {
            key
            for key, value in settings[name].identity.items()
            if value != settings['d'].identity[key]
        }
    assert differing == {
        's': {'alpha_form'},
        'dc': {'alpha_form'},
        'e': {'bn_decay'},
        'f': {'allreduce_grad_dtype'},
    }
    assert settings['b'].lr(0) == 0.4 and settings['c'].lr(0) == 0.1 and settings['d'].lr(0) == 0.2
    assert all(settings[name].alpha_form == 'sgd' for name in 'abcs')


def test_the_published_table_is_that_of_the_logs(root):
    results = root / 'reproduce' / 'results' / 'miniature'
    found = miniature.collect(results)
    assert set(found) == set(miniature.VARIANTS)
    assert all(len(logs) >= 3 for logs in found.values())
    table = miniature.table(found)
    assert (results / 'table.md').read_text() == table + '\n'
    assert table in (results / 'README.md').read_text()
    commands = (results / 'commands.txt').read_text().splitlines()
    n_updates = {}
    for variant, logs in found.items():
        for seed, log in logs.items():
            run = results / f'{variant}-seed{seed}'
            summary = json.loads((run / 'summary.json').read_text())
            assert summary['top1'] == log[-1]['validation/main/accuracy']
            assert len(log) == miniature.N_EPOCHS
            [command] = [c for c in commands if c.endswith(f'/{variant}-seed{seed}')]
            assert f'{miniature.VARIANTS[variant][1]} --seed {seed} ' in command
            n_updates[variant] = summary['iterations']
    assert n_updates == {variant: 1563 if variant == 'a' else 98 for variant in found}
