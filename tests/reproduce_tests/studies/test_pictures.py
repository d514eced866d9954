"""What the pictures show, against numbers computed here, and their data, made again in part."""

import importlib
import json
import subprocess
import sys

import extensions  # isort: skip  (makes Chainer importable on NumPy 2)
import chainer
import numpy as np
import pytest
from PIL import Image

from extensions import AlphaSGDSchedule, replaced_methods
from reproduce import images
from reproduce.dataset import write_digits
from reproduce.order import ImageOrder
from reproduce.resnet50 import ResNet50
from reproduce.studies import figures
from reproduce.studies.cluster.description import read
from reproduce.studies.pictures import (
    first_updates,
    hand_over,
    iteration,
    mn1,
    rounding,
    short_run,
    slow_start,
    start,
    statistics,
    step,
    style,
    transition,
    updates,
)

NAMES = (
    *('updates', 'start', 'step', 'transition', 'slow_start', 'statistics', 'rounding', 'mn1'),
    'iteration',
)


def committed(module):
    return json.loads((figures.RESULTS / module.DATA).read_text())


@pytest.fixture
def chainers_functions():
    """After the test, Chainer's functions are its own again."""
    yield
    replaced_methods.undo()


def texts_of(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize('name', NAMES)
def test_the_files_are_small_and_say_what_they_show(name):
    module = importlib.import_module(f'reproduce.studies.pictures.{name}')
    path = figures.RESULTS / 'figures' / f'{name}.png'
    image = Image.open(path)
    assert image.size[0] == 1400 and path.stat().st_size < 80_000
    assert image.info['Description'] == module.ALT
    gallery = (path.parent / 'README.md').read_text()
    assert f'![{module.ALT}]({name}.png)\n\n**{module.CAPTION}**\n' in gallery
    assert (
        len(module.ALT) > 100 and module.CAPTION.endswith('.') and module.CAPTION.count('. ') == 0
    )


def test_colours_differ_in_grey():
    rgb = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (style.BLACK, style.BLUE, style.SKY)]
    grey = sorted(np.dot(rgb, [0.299, 0.587, 0.114]))
    assert min(np.diff(grey)) > 60


@pytest.mark.slow
def test_the_command_draws_and_refuses(root, tmp_path):
    def run(*words):
        command = [sys.executable, '-m', 'reproduce.studies.figures', *words, '--out', tmp_path]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    done = run('mn1')
    assert done.stdout == f'{tmp_path / "mn1.png"}\n' and not done.returncode
    assert Image.open(tmp_path / 'mn1.png').info['Description'] == mn1.ALT
    done = run('mn1', '--measure')
    assert done.returncode == 2
    assert done.stderr.endswith('--measure: mn1 has no data of its own: leave it out\n')


# ---------------------------------------------------------------- drawings without data


def test_updates_in_90_epochs():
    figure = updates.draw()
    left, right = figure.axes
    points = {
        line.get_xdata()[0]: line.get_ydata()[0]
        for line in left.lines
        if len(line.get_xdata()) == 1
    }
    assert points == {256: 450_411, 8192: 14_076, 32_768: 3519}
    for batch, n in points.items():
        assert (n - 1) * batch < 90 * 1_281_167 <= n * batch
        assert any(f'{n:,} updates' in text for text in texts_of(figure))
        assert f'{n:,}' in updates.ALT
    (line,) = right.lines
    assert dict(zip(*line.get_data()))[32_768] == 56.0


def test_mn1_has_the_nodes_and_hops_of_the_cluster():
    cluster = read('mn1')
    figure = mn1.draw()
    (axis,) = figure.axes
    gids = [patch.get_gid() for patch in [*axis.patches, *axis.lines]]
    counted = {gid: gids.count(gid) for gid in ('node', 'switch', 'uplink', 'gpu', 'network')}
    assert counted == {'node': 128, 'switch': 16, 'uplink': 16, 'gpu': 8, 'network': 2}
    places = [(gpu // 128, gpu // 8) for gpu in range(1024)]  # group and node
    following = [*places[1:], places[0]]
    in_a_node = sum(a == b for a, b in zip(places, following))
    leaving = sum(a[0] != b[0] for a, b in zip(places, following))
    expected = (in_a_node, 1024 - in_a_node - leaving, leaving)
    assert mn1.hops(cluster) == expected == (896, 120, 8)
    assert {str(n) for n in expected} <= set(texts_of(figure))


def test_parts_of_an_iteration_add_up():
    content = committed(iteration)
    figure = iteration.draw(content)
    left, right = figure.axes
    for axis, totals in (
        (left, [1000 * run['iteration'] for run in content['figures']['runs']]),
        (right, [176.4, 182.6, 185.8, 196.9]),
    ):
        widths = np.zeros(len(totals))
        for bar in axis.patches:
            widths[round(bar.get_y() + bar.get_height() / 2)] += bar.get_width()
        np.testing.assert_allclose(widths, totals, rtol=3e-3)
        for total in totals:
            assert f' {total:.0f}' in [text.get_text() for text in axis.texts]
            assert f'{total:.0f}' in iteration.ALT
    allreduce = [row['allreduce'] for _, row in iteration.predicted()]
    assert [round(ms) for ms in allreduce] == [0, 6, 9, 20]


# ---------------------------------------------------------------- the first updates


class Oracle:
    """The rule in float64, from the gradients and the parameters that each update had."""

    def __init__(self, settings):
        model = ResNet50(10, settings.width, settings.stem, settings.seed)
        self.before = {name: param.array.copy() for name, param in model.namedparams()}
        self.m = dict.fromkeys(self.before, 0.0)
        self.rows = []

    def __call__(self, trainer, _):
        optimizer = trainer.updater.get_optimizer('main')
        epoch = 64 * (trainer.updater.iteration - 1) / 1437
        alpha = 0.5 * np.exp(2 * (epoch - 10) / 5)
        eta = 0.5 * 0.1 * 64 / 256
        row = {}
        for name, param in optimizer.target.namedparams():
            decay = 0 if name.endswith(('gamma', 'beta')) else 1e-4
            g = param.grad.astype(np.float64) + decay * self.before[name]
            self.m[name] = 0.99 * self.m[name] + 0.01 * g**2
            factor = eta * (alpha + (1 - alpha) * 3e-4 / eta / (np.sqrt(self.m[name]) + 1e-8))
            row[name] = np.median(factor), np.sqrt(np.mean((factor * g) ** 2))
            self.before[name] = param.array.copy()
        self.rows.append(row)


@pytest.mark.usefixtures('chainers_functions')
def test_the_effective_step_is_that_of_the_formula():
    settings = first_updates.settings('RMSprop warm-up', workers=2)
    recorder, oracle = first_updates.Recorder(), Oracle(settings)

    def watch(*arguments):
        recorder(*arguments)
        oracle(*arguments)

    short_run.run(settings, 3, watch)
    found = recorder.found
    assert found['epoch'] == pytest.approx([0, 64 / 1437, 128 / 1437], rel=1e-3)
    assert found['lr'] == 3 * [0.0125] and len(found['step']) == 51
    for name in found['step']:
        factors, steps = zip(*(row[f'/{name}/W'] for row in oracle.rows))
        assert found['factor'][name] == pytest.approx(factors, rel=1e-3), name
        assert found['step'][name] == pytest.approx(steps, rel=1e-3), name


@pytest.mark.slow
@pytest.mark.usefixtures('chainers_functions')
@pytest.mark.parametrize('variant, n', [('RMSprop warm-up', 2), ('SGD', 1), ('gradual warm-up', 1)])
def test_the_first_updates_are_those_of_the_command(variant, n):
    recorder = first_updates.Recorder()
    short_run.run(first_updates.settings(variant), n, recorder)
    found = committed(step)[variant]
    assert len(found['loss']) == first_updates.N_UPDATES
    for key, values in recorder.found.items():
        if isinstance(values, list):
            assert values == found[key][:n], key
        else:
            assert values == {name: of[:n] for name, of in found[key].items()}, key


def test_steps_are_alike_at_first_with_the_warm_up():
    content = committed(step)
    figure = step.draw(content)
    for axis, variant, key in zip(figure.axes, 2 * ('SGD', 'RMSprop warm-up'), 'ffss'):
        found = content[variant]['factor' if key == 'f' else 'step']
        drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
        assert drawn == found and len(drawn) == 51
    first = [values[0] for values in content['RMSprop warm-up']['step'].values()]
    assert max(first) < 1.1 * min(first)
    assert min(first) > 0.9 * 10 * 3e-4  # eta_RMSprop g / sqrt(0.01 g**2)
    plain = [values[0] for values in content['SGD']['step'].values()]
    assert max(plain) > 1000 * min(plain)


def test_the_start_is_that_of_the_studys_runs():
    (axis,) = start.draw().axes
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    for variant in 'bcd':
        runs = (figures.RESULTS / 'miniature').glob(f'{variant}-seed*')
        losses = [json.loads((run / 'run.json').read_text())['first losses'] for run in runs]
        np.testing.assert_allclose(lines[variant], np.mean(losses, axis=0))
    assert max(lines['b']) > max(lines['c']) > np.log(10) > max(lines['d'][1:])


# ---------------------------------------------------------------- the hand-over to SGD


def test_an_abrupt_switch_and_the_full_rate():
    content = committed(transition)
    lines = {line.get_label(): line for line in transition.draw(content).axes[0].lines}
    for name in ('printed', 'continuous', 'abrupt'):
        assert list(lines[name].get_data()[0]) == content[name]['epoch']
        assert list(lines[name].get_data()[1]) == content[name]['loss']
    for axis, name in zip(slow_start.draw(content).axes, ('SGD', 'abrupt', 'printed')):
        drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
        for variant in (name, f'{name}, full rate'):
            assert drawn[variant] == content[variant]['loss']
    after = {
        name: np.array(found['loss'])[np.array(found['epoch']) > 10]
        for name, found in content.items()
    }
    assert after['abrupt, full rate'].max() > after['abrupt'].max() > np.log(10)
    assert max(after['printed'].max(), after['printed, full rate'].max()) < 2.1


def test_the_rates_and_transitions_of_the_hand_over(tmp_path):
    for name, variant in hand_over.VARIANTS.items():
        settings = hand_over.settings(name, tmp_path)
        assert settings.seed == 100 and settings.total_batch_size == 1024
        assert settings.lr(0) == pytest.approx(1.6 if name.endswith('full rate') else 0.8)
        assert settings.alpha_sgd(0) == (
            1 if name.startswith('SGD') else pytest.approx(0.00916, 1e-3)
        )
        assert variant.part == ('abrupt' if name.startswith('abrupt') else '')


@pytest.mark.slow
@pytest.mark.usefixtures('chainers_functions')
def test_the_trainings_of_the_hand_over(tmp_path, monkeypatch):
    """On the digits: the third update, at epoch 11.7, is the first after the abrupt switch."""
    write_digits(tmp_path / 'digits')
    monkeypatch.setattr(hand_over, 'N_UPDATES', 4)
    found = hand_over.measure(tmp_path / 'digits')
    assert found.keys() == committed(transition).keys()
    for of in found.values():
        assert of['epoch'] == pytest.approx([n * 1024 / 1437 * 90 / 11 for n in range(4)], 1e-4)
        assert of['loss'][0] == found['printed']['loss'][0]
    losses = {name: of['loss'] for name, of in found.items()}
    assert losses['printed'][:3] == losses['continuous'][:3] != losses['SGD'][:3]
    assert losses['SGD'][1] != losses['SGD, full rate'][1]
    assert losses['abrupt'][3] != losses['printed'][3]
    assert extensions.AlphaSGDSchedule is AlphaSGDSchedule  # nothing is left replaced


def test_data_that_need_images_say_so(tmp_path):
    with pytest.raises(figures.DataError, match='--measure: transition needs --images: a folder'):
        figures.picture('transition', True, None, tmp_path)
    with pytest.raises(figures.DataError, match='image folder .*/nowhere/train: No such file'):
        figures.picture('transition', True, tmp_path / 'nowhere', tmp_path)


# ---------------------------------------------------------------- BN statistics


class Inputs(chainer.LinkHook):
    """Keeps the values that each batch normalization gets, float64 [channels, values]."""

    def __init__(self):
        self.of = {}

    def forward_postprocess(self, args):
        if isinstance(args.link, chainer.links.BatchNormalization):
            x = np.moveaxis(args.args[0].array.astype(np.float64), 1, 0)
            self.of.setdefault(id(args.link), []).append(x.reshape(len(x), -1))


def relative(found, expected, scale):
    return np.linalg.norm(found - expected) / np.linalg.norm(scale)


@pytest.mark.usefixtures('chainers_functions')
def test_statistics_of_the_training_set_by_numpy():
    seen = []

    def watch(trainer, batches):
        model = trainer.updater.get_optimizer('main').target
        taken, take = [], batches.train_batch
        batches.train_batch = lambda *which: (taken.append(order(*which)[1]), take(*which))[1]
        with Inputs() as inputs:
            true = statistics.of_training_set(model, batches, 32, 2)
        links = statistics.links_of(model)
        seen.append((true, np.concatenate(taken), [inputs.of[id(link)] for link in links]))

    order = ImageOrder(1437, 2, 32, 0)
    short_run.run(statistics.settings(2), 1, watch)
    [(true, taken, inputs)] = seen
    assert len(set(taken)) == len(taken) == 1437 // 32 * 32  # each image once
    assert len(inputs) == 53 and all(len(minibatches) == 1437 // 32 for minibatches in inputs)
    expected = [[], []]
    for minibatches in inputs:
        means = [x.mean(axis=1) for x in minibatches]
        expected[0].append(np.mean(means, axis=0))
        # Of the images together, but with the unbiased variance within each minibatch.
        within = np.mean([x.var(axis=1, ddof=1) for x in minibatches], axis=0)
        expected[1].append(within + np.var(means, axis=0))
    for found, parts in zip(true, expected):
        np.testing.assert_allclose(found, np.concatenate(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures('chainers_functions')
def test_a_row_compares_with_the_training_set(monkeypatch):
    rng = np.random.RandomState(0)
    true = np.stack([rng.randn(3320), 1 + rng.rand(3320)])
    monkeypatch.setattr(statistics, 'of_training_set', lambda *arguments: true)
    monkeypatch.setattr(statistics, 'top1', lambda trainer, model, values: values[0, 0])
    last, links = [], []

    def watch(trainer, batches):
        model = trainer.updater.get_optimizer('main').target
        comparison(trainer, batches)
        last.append(statistics.read(model))
        links[:] = statistics.links_of(model)

    comparison = statistics.Comparison(32)
    short_run.run(statistics.settings(16), 3, watch)  # the third update ends an epoch
    [row] = comparison.rows
    assert row['epoch'] == pytest.approx(3 * 512 / 1437)
    weights = np.array([0.9**2, 0.9, 1])
    moving = np.tensordot(weights / weights.sum(), last, 1)
    ends = np.cumsum([link.avg_mean.size for link in links])
    for name, found in (('moving', moving), ('last', last[-1])):
        each = [
            (
                relative(found[0][a:b], true[0][a:b], np.sqrt(true[1][a:b])),
                relative(found[1][a:b], true[1][a:b], true[1][a:b]),
            )
            for a, b in zip([0, *ends], ends)
        ]
        assert (row[name]['mean'], row[name]['variance']) == pytest.approx(np.median(each, axis=0))
        assert row[name]['top-1'] == pytest.approx(found[0][0])
    assert row['true']['top-1'] == true[0][0]


@pytest.mark.usefixtures('chainers_functions')
def test_top1_is_by_the_given_statistics():
    def watch(trainer, batches):
        model = trainer.updater.get_optimizer('main').target
        given = np.stack([np.full(3320, 0.5), np.full(3320, 2.0)])
        found = statistics.top1(trainer, model, given)
        links = statistics.links_of(model)
        assert all((link.avg_mean == 0.5).all() and (link.avg_var == 2).all() for link in links)
        right = 0
        with chainer.using_config('train', False):
            for pixels, t in batches.validation_batches(0, 360):
                y = model(images.normalize(pixels, images.MEAN, images.STD, np))
                right += np.sum(np.argmax(y.array, axis=1) == t)
        assert found == right / 360

    short_run.run(statistics.settings(2), 1, watch)


@pytest.mark.slow
@pytest.mark.usefixtures('chainers_functions')
def test_the_statistics_are_those_of_the_command():
    comparison = statistics.Comparison(32)
    short_run.run(statistics.settings(2), 23, comparison)  # an epoch
    [found], expected = comparison.rows, committed(statistics)['2'][0]
    assert found.keys() == expected.keys() and found['epoch'] == expected['epoch']
    for name in ('true', 'moving', 'last'):  # top-1 is exact; norms are sums by BLAS
        assert found[name] == pytest.approx(expected[name], rel=1e-13), name


def test_the_last_minibatch_is_nearer_with_a_large_batch():
    content = committed(statistics)
    figure = statistics.draw(content)
    for axis, rows in zip(figure.axes[:2], content.values()):
        drawn = [line.get_ydata() for line in axis.lines]
        for name in ('last', 'moving'):
            expected = [100 * row[name]['variance'] for row in rows]
            assert any(len(y) == len(rows) and np.allclose(y, expected) for y in drawn)
    for row in content['32']:
        assert row['last']['variance'] < row['moving']['variance']


# ---------------------------------------------------------------- rounding


@pytest.fixture(scope='module')
def gradients():
    """Of 8 workers, with many too small for float16."""
    rng = np.random.RandomState(0)
    return (rng.randn(8, 200) * 10.0 ** rng.uniform(-9, -1, 200)).astype(np.float32)


def one_by_one(halves):
    total = halves[0]
    for half in halves[1:]:
        total = np.float16(total + half)
    return total


def test_the_orders_by_scalars(gradients):
    before, eight = gradients.copy(), np.float16(8)
    found = {name: order(gradients) for name, order in rounding.ORDERS.items()}
    np.testing.assert_array_equal(gradients, before)
    for i, column in enumerate(gradients.T):
        halves = [np.float16(value) for value in column]
        ring = np.float16(one_by_one(halves) / eight)
        # Float16 numbers are multiples of 2**-24: a float64 holds their sum.
        assert found['exact'][i] == np.float16(sum(map(float, halves)) / 8)
        assert found['ring'][i] == ring
        assert found['tree'][i] == ring  # the GPUs of one host are a chain
        divided = [np.float16(half / eight) for half in halves]
        assert found['divide first'][i] == one_by_one(divided)


def test_the_tree_adds_hosts(gradients):
    twice = np.concatenate([gradients, gradients[::-1]])
    found = rounding.ORDERS['tree'](twice)
    for i, column in enumerate(gradients.T):
        halves = [np.float16(value) for value in column]
        both = np.float16(one_by_one(halves) + one_by_one(halves[::-1]))
        assert found[i] == np.float16(both / np.float16(16))


def test_costs_are_relative_to_the_mean_in_float64(gradients):
    found = rounding.costs(gradients)
    mean = np.array([sum(float(value) for value in column) / 8 for column in gradients.T])
    for name, order in rounding.ORDERS.items():
        error = relative(order(gradients).astype(float), mean, mean)
        assert found['errors'][name] == pytest.approx(error)
    for name, n in (('cast', 1), ('divided', 8)):
        gone = sum(np.float16(value) / np.float16(n) == 0 for value in gradients.ravel())
        assert found['flushed'][name] == pytest.approx(gone / gradients.size)
    assert 0.05 < found['flushed']['cast'] < found['flushed']['divided']


@pytest.mark.slow
@pytest.mark.usefixtures('chainers_functions')
def test_the_rounding_is_that_of_the_command(monkeypatch):
    monkeypatch.setattr(rounding, 'WORKERS', (8,))
    expected = committed(rounding)['8']
    for key, found in rounding.measure()['8'].items():
        assert found == pytest.approx(expected[key], rel=1e-9)


def test_the_errors_are_drawn():
    content = committed(rounding)
    left, right = rounding.draw(content).axes
    for axis, key in ((left, 'errors'), (right, 'flushed')):
        for line in axis.lines:
            expected = [100 * found[key][line.get_label()] for found in content.values()]
            np.testing.assert_allclose(line.get_ydata(), expected)
    assert len(left.lines) == 4 and len(right.lines) == 2
