import dataclasses

import pytest

from extensions import SOURCES
from reproduce.dataset import InputError
from reproduce.job import report
from reproduce.job.options import check, parse
from reproduce.settings import PRESETS, Settings


def test_the_default_is_the_papers_run():
    settings, dry_run = parse([], n_processes=3)
    assert settings == PRESETS['paper']() and not dry_run
    assert (settings.workers, settings.local_batch_size, settings.epochs) == (1024, 32, 90)
    assert settings.total_batch_size == 32768
    assert settings.lr_base == pytest.approx(12.8, rel=1e-15)
    assert settings.iterations(1_281_167) == 3519
    assert (settings.alpha_form, settings.beta_center, settings.beta_period) == ('printed', 10, 5)
    assert (settings.mu1, settings.mu2, settings.eps, settings.lr_rmsprop) == (
        0.9,
        0.99,
        1e-8,
        3e-4,
    )
    assert settings.weight_decay == 1e-4 and not settings.pooled_variance
    assert (settings.allreduce_grad_dtype, settings.communicator) == ('float16', 'auto')
    assert (settings.width, settings.stem, settings.image_size, settings.resize) == (
        64,
        'imagenet',
        224,
        256,
    )
    assert (settings.min_crop_area, settings.horizontal_flip) == (0.08, True)


def test_iterations_cover_the_epochs_and_no_more():
    settings = Settings(workers=2, local_batch_size=3, epochs=5)
    assert settings.iterations(6) == 5 and settings.iterations(7) == 6


def test_smoke_has_one_worker_a_process():
    assert parse(['--preset', 'smoke'], 3)[0].workers == 3
    assert parse(['--preset', 'smoke', '--workers', '6'], 3)[0].workers == 6


def other_value(field):
    if field.metadata['choices']:
        return field.metadata['choices'][-1]
    value = field.default
    if field.name == 'checkpoint_every':
        return '10m'
    if field.name == 'loader':
        return 'threads:3'
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value * 0.5
    return 'elsewhere' if value is None or isinstance(value, str) else value + 3


def test_settings_of_the_images_reach_their_preprocessing():
    settings = Settings(
        image_size=20, resize=24, min_crop_area=0.3, horizontal_flip=False, resize_filter='pillow'
    )
    preprocessing = settings.preprocessing
    assert (preprocessing.image_size, preprocessing.resize) == (20, 24)
    assert (preprocessing.min_crop_area, preprocessing.max_aspect) == (0.3, 4 / 3)
    assert (preprocessing.horizontal_flip, preprocessing.resize_filter) == (False, 'pillow')
    assert Settings().preprocessing == type(preprocessing)(
        224, 256, 0.08, 4 / 3, True, 'antialiased'
    )


def test_manifests_lie_beside_the_output():
    assert Settings(out='results/paper').manifests_folder == 'results/manifests'
    assert Settings(out='here/').manifests_folder == 'manifests'
    assert Settings(manifests='/lists').manifests_folder == '/lists'


@pytest.mark.parametrize(
    'name', [f.name for f in dataclasses.fields(Settings) if f.name != 'preset']
)
@pytest.mark.parametrize('preset', PRESETS)
def test_every_setting_has_an_option_that_beats_the_preset(preset, name):
    field = {f.name: f for f in dataclasses.fields(Settings)}[name]
    value = other_value(field)
    flag = '--' + name.replace('_', '-')
    if isinstance(value, bool):
        options = [flag if value else flag.replace('--', '--no-', 1)]
    else:
        options = [flag, str(value)]
    if name == 'image_size':  # which must not exceed it
        options += ['--resize', str(value)]
    settings, _ = parse(['--preset', preset, *options], n_processes=2)
    assert getattr(settings, name) == value and type(getattr(settings, name)) is type(value)
    assert settings.preset == preset


@pytest.mark.parametrize(
    'change, message',
    [
        ({'workers': 0}, '--workers must be at least 1, not 0'),
        ({'epochs': -1}, '--epochs'),
        ({'mu1': 1.0}, '--mu1 must be below 1'),
        ({'mu2': 1.0}, '--mu2 must be below 1'),
        ({'eps': float('nan')}, '--eps'),
        ({'eps': 0.0}, '--eps must be above 0'),
        ({'weight_decay': -1e-4}, '--weight-decay'),
        ({'seed': 2**32}, '--seed'),
        ({'seed': -1}, '--seed'),
        ({'beta_period': 0.0}, '--beta-period'),
        ({'beta_center': float('inf')}, '--beta-center'),
        ({'min_crop_area': 0.0}, '--min-crop-area'),
        ({'resize': 200}, 'the centre crop does not fit'),
        ({'communicator': 'ring'}, '--communicator must be one of auto, mpi'),
        ({'alpha_form': 'smooth'}, '--alpha-form'),
        ({'lr_schedule': 'linear'}, '--lr-schedule must be one of slow_start, steps'),
        ({'bn_decay': 1.0}, '--bn-decay'),
        ({'bn_decay': 0.9, 'pooled_variance': True}, '--bn-decay and --pooled-variance exclude'),
    ],
)
def test_impossible_values(change, message):
    with pytest.raises(InputError, match=message):
        check(Settings(**change))


@pytest.mark.parametrize(
    'arguments, message',
    [
        ('--worker 3', 'there is no option --worker; did you mean --workers?'),
        ('--epoch=3', 'there is no option --epoch; did you mean --epochs?'),
        ('--no-stop-on-nonfinit', 'did you mean --no-stop-on-nonfinite?'),
        ('--preset smok', 'smok is none of paper, cifar10, smoke; did you mean smoke?'),
        ('--alpha-form smooth', 'smooth is none of printed, continuous, sgd; --help'),
        ('stray', "'stray' is no option; --help lists the options"),
        ('--zzz', 'there is no option --zzz; --help lists the options'),
        ('--epochs', '--epochs: expected one argument; --help lists the options'),
        ('--seed 1.5', "--seed: invalid int value: '1.5'; --help lists the options"),
    ],
)
def test_bad_command_lines(arguments, message):
    with pytest.raises(InputError) as raised:
        parse(arguments.split(), 1)
    assert message in str(raised.value) and '\n' not in str(raised.value)


def test_help_has_the_values_of_the_preset(capsys):
    texts = []
    for preset in PRESETS:
        with pytest.raises(SystemExit):
            parse(['--preset', preset, '--help'], 1)
        texts.append(' '.join(capsys.readouterr().out.split()))
    for text, size in zip(texts, (224, 32, 32)):
        assert f'pixels of an image in training and validation (G) [{size}]' in text
    for letter, source in SOURCES.items():
        assert f'{letter} {source}' in texts[0]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        parse(['--help'], 1, 'What it does.')
    text = capsys.readouterr().out
    assert 'What it does.' in text
    for preset in PRESETS.values():
        assert preset.__doc__.split()[-2] in text
    for field in dataclasses.fields(Settings):
        assert '--' + field.name.replace('_', '-') in text


def test_plan_stretches_to_the_epochs_of_the_run():
    settings = dataclasses.replace(PRESETS['cifar10'](), epochs=30, workers=8)
    rows = [row.split() for row in report.plan(settings, 50_000).splitlines() if row.strip()]
    table = {
        row[0]: row[1:]
        for row in rows[
            rows.index(['epoch', 'of', '90', 'eta', 'alpha_sgd', 'alpha_rmsprop']) + 1 :
        ]
    }
    assert table['0'][:2] == ['0', '0.05'] and table['29'][:2] == ['87', '0.0001']
    assert table['3.75'][:3] == ['11.25', '0.05', '1.00000']
    assert table['<4.16667'][2] == '1.50000' and table['4.16667'][2] == '1.00000'


@pytest.mark.parametrize(
    'seconds, text',
    [(12.4, '12 s'), (200, '3 min 20 s'), (3725, '1 h 02 min'), (59.7, '1 min 00 s')],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text
