import dataclasses

import pytest

from extensions import SOURCES
from reproduce.job.options import check, main, parse, watchdog_of
from reproduce.settings import PRESETS, InputError, Settings


def test_the_default_is_the_papers_run():
    assert parse([], n_processes=3) == (PRESETS['paper'](), False)


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
        ({'mu1': 1.0}, '--mu1 must be at least 0 and below 1, not 1.0'),
        ({'mu2': 1.0}, '--mu2 must be at least 0 and below 1'),
        ({'eps': float('nan')}, '--eps'),
        ({'eps': 0.0}, '--eps must be above 0'),
        ({'weight_decay': -1e-4}, '--weight-decay'),
        ({'seed': 2**32}, '--seed must be at least 0 and below'),
        ({'seed': -1}, '--seed'),
        ({'beta_period': 0.0}, '--beta-period'),
        ({'beta_center': float('inf')}, '--beta-center'),
        ({'min_crop_area': 0.0}, '--min-crop-area'),
        ({'resize': 200}, 'the centre crop does not fit'),
        ({'communicator': 'ring'}, '--communicator must be one of auto, mpi'),
        ({'alpha_form': 'smooth'}, '--alpha-form'),
        ({'lr_schedule': 'linear'}, '--lr-schedule must be one of slow_start, steps'),
        ({'bn_decay': 1.0}, '--bn-decay'),
        ({'evaluate': 'm.npz', 'resume': 'auto'}, 'leave out --resume and --overwrite'),
        ({'evaluate': '', 'overwrite': True}, 'leave out --resume and --overwrite'),
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
        ('--preset smok', 'smok is not one of paper, cifar10, smoke; did you mean smoke?'),
        ('--alpha-form smooth', 'smooth is not one of printed, continuous, sgd; --help'),
        ('stray', "'stray' is not an option; --help lists the options"),
        ('--zzz', 'there is no option --zzz; --help lists the options'),
        ('--epochs', '--epochs: expected one argument; --help lists the options'),
        ('--dry-run --evaluate m.npz', '--dry-run and --evaluate contradict each other'),
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
        assert f'side of the images that the network sees, in pixels (G) [{size}]' in text
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


@pytest.mark.parametrize(
    'words, message',
    [
        ('2 . train --epoch 3', 'error: there is no option --epoch; did you mean --epochs?'),
        ('2 . preflight --dry-run', 'error: there is no option --dry-run'),
        ('2 . preflight --evaluate m.npz', 'error: there is no option --evaluate'),
        ('3 . train --preset smoke --workers 4', 'error: --workers: 4 workers cannot be spread'),
        ('2 . train --mu1 1', 'error: --mu1 must be at least 0 and below 1, not 1.0'),
    ],
)
def test_a_job_is_checked_before_its_ranks_start(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == ''
    assert told.err.startswith(message) and told.err.count('\n') == 1


@pytest.mark.parametrize(
    'words, has_output',
    [
        ('2 . train --preset smoke', True),
        ('5 . train --dry-run', False),
        ('5 . train --evaluate m.npz', False),
        ('3 . smoke --workers 2 --evaluate m.npz', False),
        ('2 . preflight', False),
    ],
)
def test_a_job_that_may_start(capsys, words, has_output):
    main(words.split())
    told = capsys.readouterr()
    assert told.err == '' and bool(told.out) == has_output


@pytest.mark.parametrize(
    'words, seconds',
    [
        ('', 300),
        ('--watchdog 7.5 --help', 7.5),
        ('--width 4 --watchdog=0 --nonesuch', 0),
        ('--watchdog 7 --watchdog 8', 8),
        ('--watchdog', 300),
        ('--watchdog ten', 300),
        ('--watchdog -1', 300),
        ('--watchdog inf', 300),
        ('--watchdog nan', 300),
        ('--watch 7', 300),  # options cannot be abbreviated
    ],
)
def test_the_watchdogs_limit_is_known_before_the_options_are_checked(words, seconds, capsys):
    assert watchdog_of(words.split()) == seconds
    assert capsys.readouterr() == ('', '')
