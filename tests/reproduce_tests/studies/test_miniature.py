"""The study in miniature: small runs for real, and the committed results against their tables."""

import hashlib
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

from reproduce.studies.miniature import __main__ as miniature
from reproduce.studies.miniature import tables, variants

SMALL = """
import sys
from pathlib import Path
from reproduce.studies.miniature import __main__ as miniature, variants
variants.N_SEEDS = 2
class Tiny(variants.Regime):
    options = '--preset smoke --width 2 --shallow --epochs 2 --local-batch-size 4 --loader serial'
tiny = Tiny('', 2)
variants.MAIN = {'x': variants.Variant('two', '--workers 2', '', tiny)}
variants.OTHERS = {'y': variants.Variant('four', '--workers 4 --bn-decay 0.9', 'outside', tiny)}
again = '--width 3 --stem cifar --workers 1'
variants.MAIN_AGAIN = {'z': variants.Variant('again', again, 'resnet10', tiny)}
variants.GROUPS = variants.MAIN, variants.OTHERS, variants.MAIN_AGAIN
variants.VARIANTS = {**variants.MAIN, **variants.OTHERS, **variants.MAIN_AGAIN}
variants.MAIN_COMPARISONS = (variants.Comparison('y', 'x', 'near'),)
variants.OTHER_COMPARISONS = variants.EARLY_COMPARISONS = ()
variants.MAIN_AGAIN_COMPARISONS = variants.EARLY_AGAIN_COMPARISONS = ()
miniature.INCLUDED = Path('INCLUDED')
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
    def start(*options, per_class=16, program=SMALL, out=tmp_path):
        command = [sys.executable, '-c', program, '--images', str(cifar), '--out', str(out)]
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
            # As a shell starts what is in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # noqa: PLW1509
        )

    return start


@pytest.mark.slow
def test_runs_tables_and_goes_on_after_an_interruption(start, tmp_path):
    first = start('--seeds', '2', '--at-a-time', '1')
    while not (tmp_path / 'x-seed0' / 'run.json').exists():
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
    assert re.search(r'^[1-3] of 6 runs are finished$', output, re.MULTILINE)
    assert re.search(r'^\d+ of 12 epochs, \d+ s left; \w-seed\d is finished', output, re.MULTILINE)
    assert (tmp_path / 'x-seed0' / 'log').stat().st_mtime_ns == done  # not trained again
    for name in ('runs.png', 'start.png', 'resnet10/runs.png', 'resnet10/start.png'):
        assert Image.open(tmp_path / name).size[0] > 1000
    lines = (tmp_path / 'table.md').read_text().splitlines()
    rows = lines[2:5]
    parts = {'x': '', 'y': 'outside', 'z': 'resnet10'}
    for row, (variant, title, workers) in zip(
        rows, (('x', 'two', 2), ('y', 'four', 4), ('z', 'again', 1))
    ):
        runs = [tmp_path / f'{variant}-seed{seed}' for seed in (0, 1)]
        logs = [json.loads((run / 'log').read_text())[-1] for run in runs]
        top1 = [100 * log['validation/main/accuracy'] for log in logs]
        half_width = 12.706 * statistics.stdev(top1) / 2**0.5  # Student's t, 1 degree of freedom
        cells = row.split(' | ')
        assert cells[:3] == [f'| {variant}', title, '2']
        mean, _, interval = cells[3].partition(' +- ')
        assert mean == f'{statistics.mean(top1):.2f}'
        assert float(interval) == pytest.approx(half_width, rel=1e-3, abs=0.006)
        found = [json.loads((run / 'run.json').read_text()) for run in runs]
        assert [run['part'] for run in found] == [parts[variant]] * 2
        n_updates = json.loads((runs[0] / 'summary.json').read_text())['iterations']
        for run in found:
            assert len(run['first losses']) == max(1, round(0.05 * n_updates))
            assert run['first losses'][0] == pytest.approx(np.log(3), rel=0.2)
        settings = json.loads((runs[1] / 'settings.json').read_text())
        assert (settings['workers'], settings['seed']) == (workers, 1)
        assert settings['bn_decay'] == (0.9 if variant == 'y' else 0)
        assert len(list((tmp_path / 'images' / 'train' / 'ship').iterdir())) == 16
    commands = (tmp_path / 'commands.txt').read_text().splitlines()
    assert [line.rpartition('/')[2] for line in commands] == [
        f'{variant}-seed{seed}' for variant in 'xyz' for seed in range(2)
    ]  # the main variants first
    assert any(line.startswith('| y - x | near | 2 |') for line in lines)
    for name, layer in (('x', 'res2/0/conv1/W'), ('z', 'res2/conv1/W')):  # ResNet50, ResNet10
        assert layer in np.load(tmp_path / f'{name}-seed0' / 'model.npz')

    # The bits again, and other ones.
    again = start('--check', 'x-seed1', 'y-seed0')
    output, _ = again.communicate(timeout=100)
    assert again.returncode == 0, output
    assert output.splitlines()[-2:] == ['x-seed1: the same bits', 'y-seed0: the same bits']
    assert not list((tmp_path / 'check').iterdir())  # a further check trains anew
    path = tmp_path / 'x-seed1' / 'run.json'
    content = json.loads(path.read_text())
    content['digests']['parameters'] = 'f' * 64
    path.write_text(json.dumps(content))
    again = start('--check', 'x-seed1')
    output, _ = again.communicate(timeout=100)
    assert (again.returncode, output.splitlines()[-1]) == (1, 'x-seed1: other digests')

    # Included runs are not trained again; those of other settings are refused.
    included, out = tmp_path / 'included', tmp_path / 'new'
    published = start('--publish', str(included))
    output, _ = published.communicate(timeout=60)
    assert published.returncode == 0, output
    kept = {path.name for path in (included / 'y-seed1').iterdir()}
    assert kept == {'log', 'settings.json', 'summary.json', 'run.json'}
    models = {path.parent.name for path in included.glob('*/model.npz')}
    assert models == {'x-seed0'}  # of the main variants
    assert (included / 'table.md').exists() and (included / 'commands.txt').exists()
    (included / 'x-seed1' / 'log').unlink()  # this run is not there as a whole
    program = SMALL.replace("INCLUDED'", f"{included}'")
    third = start('--seeds', '2', program=program, out=out)
    output, _ = third.communicate(timeout=100)
    assert third.returncode == 0, output
    assert '5 of 6 runs are finished' in output.splitlines()
    assert not (out / 'y-seed1' / 'output.txt').exists()
    assert (out / 'x-seed1' / 'output.txt').exists()
    for other in (
        program.replace('--workers 2', '--workers 3'),
        program.replace("'outside'", "''"),
    ):
        refused = start('--seeds', '2', program=other, out=tmp_path / 'newer')
        output, _ = refused.communicate(timeout=60)
        assert refused.returncode == 1
        assert 'was trained with other settings (' in output.splitlines()[-1]


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


@pytest.mark.slow
def test_a_run_that_was_killed_at_its_end_gets_its_files(start, tmp_path):
    first = start('--seeds', '1', '--at-a-time', '1')
    assert first.wait(200) == 0
    path = tmp_path / 'y-seed0' / 'run.json'
    whole = path.read_text()
    path.unlink()
    second = start('--seeds', '1')
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 0, output
    assert path.read_text() == whole
    assert 'goes on from' in (tmp_path / 'y-seed0' / 'output.txt').read_text()


def test_the_variants_are_what_their_titles_say():
    from reproduce.job.options import parse

    settings = {}
    for name, variant in variants.VARIANTS.items():
        words = variant.words[2 if variant.part else 0 :]
        settings[name], _ = parse(words, 1)
        assert settings[name].epochs == variant.regime.epochs
        assert settings[name].total_batch_size == (64 if name in ('a', 'a2') else 1024)
    assert settings['d'].iterations(50_000) == 538 and settings['a'].iterations(50_000) == 8594
    differing = {}
    for name, own in settings.items():
        other = settings['d2' if variants.VARIANTS[name].regime is variants.SECOND else 'd']
        differing[name] = {
            key for key, value in own.identity.items() if value != other.identity[key]
        }
    expected = {
        'a a2': 'workers lr_schedule alpha_form bn_decay',
        'b b2 c c2 lars': 'lr_schedule alpha_form',
        's dc': 'alpha_form',
        'd d2 m ab': '',
        'e': 'bn_decay',
        'f': 'allreduce_grad_dtype',
        'r t df': 'accumulate',
        'g': 'gradient_scale',
        'l8 l128': 'workers local_batch_size',
    }
    assert differing == {
        name: set(keys.split()) for names, keys in expected.items() for name in names.split()
    }
    for again in ('', '2'):
        lr = [settings[f'{name}{again}'].lr(0) for name in 'abcd']
        assert lr == pytest.approx([0.1, 1.6, 0.4, 0.8], rel=1e-12)
    assert {name: v.part for name, v in variants.VARIANTS.items() if v.part} == {
        'm': 'outside',
        'ab': 'abrupt',
        't': 'tree',
        'df': 'divide-first',
        'lars': 'lars',
        **dict.fromkeys(('a2', 'b2', 'c2', 'd2'), 'resnet10'),
    }
    planned = (
        *variants.MAIN_COMPARISONS,
        *variants.OTHER_COMPARISONS,
        *variants.EARLY_COMPARISONS,
        *variants.MAIN_AGAIN_COMPARISONS,
        *variants.EARLY_AGAIN_COMPARISONS,
    )
    assert {c.variant for c in planned} == set(variants.VARIANTS) - {'a', 'a2'}
    assert {c.expected for c in planned} == {'above', 'below', 'near'}


def comparison_rows(values, expected='above', n_planned=1):
    planned = [variants.Comparison('x', 'y', expected)]
    planned += [variants.Comparison('x', f'z{i}', 'near') for i in range(n_planned - 1)]
    text = tables.comparisons('points', values, tuple(planned), '.2f')
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()[2:]]


def test_a_comparison_says_n_and_no_verdict_before_all_seeds():
    y = dict(enumerate((50.0, 51.0, 49.0, 50.5, 49.5)))
    d = dict(enumerate((2.0, 2.5, 1.5, 2.2, 1.8)))
    x = {seed: y[seed] + d[seed] for seed in y}
    # mean 2, deviation 0.3808, t = 11.744: p = 0.000301; 95 %: 2.776 * 0.3808 / sqrt(5) = 0.47
    [row] = comparison_rows({'x': x, 'y': y})
    assert row == ['x - y', 'above', '5', '+2.00 +- 0.47', '< 0.001', '< 0.001', 'as expected']
    assert comparison_rows({'x': x, 'y': y}, 'below')[0][-1] == 'against'
    assert comparison_rows({'x': x, 'y': y}, 'near')[0][-1] == 'against'
    # Corrected for all that were planned, also those that were not run.
    rows = comparison_rows({'x': x, 'y': y}, n_planned=8)
    assert rows[0][4:] == ['< 0.001', '0.002', 'as expected']
    assert rows[1] == ['x - z0', 'near', '0', 'not run', '', '', '']
    assert comparison_rows({'x': x, 'y': y}, n_planned=200)[0][5:] == ['0.060', 'open']
    # Seeds that only one of the two has do not count.
    fewer = {seed: x[seed] for seed in (0, 1, 3)}
    [row] = comparison_rows({'x': {**fewer, 9: 99.0}, 'y': y})
    assert row[2] == '3' and row[-1] == 'incomplete' and row[3].startswith('+2.23')
    [row] = comparison_rows({'x': {0: 52.0}, 'y': y})
    assert row == ['x - y', 'above', '1', '+2.00', '', '', 'incomplete']
    # Near: the whole interval counts.
    inside = {seed: y[seed] + d[seed] - 1.2 for seed in y}
    outside = {seed: y[seed] + d[seed] - 0.9 for seed in y}
    assert comparison_rows({'x': inside, 'y': y}, 'near')[0][-1] == 'as expected'  # 0.8 + 0.47
    assert comparison_rows({'x': outside, 'y': y}, 'near')[0][-1] == 'against'  # 1.1 + 0.47
    [row] = comparison_rows({'x': outside, 'y': y}, 'near', n_planned=200)[:1]
    assert row[-1] == 'open'


def test_results_say_what_is_not_run():
    entry = {'validation/main/accuracy': 0.5, 'main/loss': 1.0, 'validation/main/loss': 1.5}
    log = [{**entry, 'validation/main/accuracy': 0.1}, entry]
    text = tables.all_tables({'b': {3: log}}, {'b': {3: [2.5, 2.0]}})
    assert '| b | large batch, SGD | 1 | 50.00 | 2.250 | 1.000 | 1.500 |' in text.splitlines()
    assert '| a | small batch, SGD | 0 | not run |  |  |  |' in text.splitlines()


def test_the_published_tables_are_those_of_the_logs(root):
    results = root / 'reproduce' / 'results' / 'miniature'
    found = miniature.collect(results)
    if not found:
        pytest.skip('no runs yet')
    logs = {v: {seed: run.log() for seed, run in runs.items()} for v, runs in found.items()}
    first = {
        v: {seed: run.read('run.json')['first losses'] for seed, run in runs.items()}
        for v, runs in found.items()
    }
    text = tables.all_tables(logs, first)
    assert (results / 'table.md').read_text() == text + '\n'
    commands = (results / 'commands.txt').read_text()
    for variant, runs in found.items():
        regime, batch = variants.VARIANTS[variant].regime, 64 if variant in ('a', 'a2') else 1024
        n_updates = -(-50_000 * regime.epochs // batch)
        for seed, run in runs.items():
            assert miniature._differing(run) == []
            summary = run.read('summary.json')
            assert summary['top1'] == run.log()[-1]['validation/main/accuracy']
            assert (summary['iterations'], summary['validation_images']) == (n_updates, 10_000)
            assert len(run.log()) == regime.epochs
            assert len(first[variant][seed]) == round(0.05 * n_updates)
            options = variants.VARIANTS[variant].options
            assert f'{options} --seed {seed} ' in commands


def test_the_published_models_are_those_of_the_runs(root):
    """A digest again: of names, types, shapes and bytes, in the order of the names."""
    results = root / 'reproduce' / 'results' / 'miniature'
    assert {path.parent.name for path in results.glob('*/model.npz')} == {
        f'{variant}-seed0' for variant in variants.MAIN
    }
    for path in results.glob('*/model.npz'):
        assert path.stat().st_size < 1_000_000
        arrays = {f'/{name}': array for name, array in np.load(path).items()}
        statistics = ('/avg_mean', '/avg_var', '/N')
        parameters = {name: a for name, a in arrays.items() if not name.endswith(statistics)}
        kept = {name: a for name, a in arrays.items() if name.endswith(statistics[:2])}
        digests = json.loads((path.parent / 'run.json').read_text())['digests']
        for part, of in (('parameters', parameters), ('BN statistics', kept)):
            sha = hashlib.sha256()
            for name in sorted(of):
                sha.update(f'{name} {of[name].dtype} {of[name].shape} '.encode())
                sha.update(of[name].tobytes())
            assert sha.hexdigest() == digests[part], path
