"""The command line of reproduce/train.py: its options, their help, and checks of their values."""

from __future__ import annotations

import argparse
import dataclasses
import math
import textwrap

from extensions import SOURCES
from extensions.checkpoint import interval
from reproduce import loader
from reproduce.dataset import InputError
from reproduce.job.command_line import Parser
from reproduce.settings import PRESETS, Settings

_AT_LEAST_ONE = (
    'workers',
    'local_batch_size',
    'epochs',
    'width',
    'image_size',
    'resize',
    'validation_batch_size',
    'n_train_images',
    'keep_checkpoints',
)
_NOT_NEGATIVE = (
    'lr_rmsprop',
    'mu1',
    'mu2',
    'eps',
    'weight_decay',
    'seed',
    'watchdog',
)


def check(settings):
    """Raises InputError, which names the option and the range, if a value cannot be used."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        choices = field.metadata['choices']
        if choices and value not in choices:
            raise InputError(
                f'{flag(field.name)} must be one of {", ".join(choices)}, not {value!r}'
            )
    for name in _AT_LEAST_ONE:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f'{flag(name)} must be at least 1, not {value}')
    for name in _NOT_NEGATIVE:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f'{flag(name)} must be finite and not negative, not {value}')
    if settings.eps == 0:  # a gradient of exactly 0 would be 0 / 0
        raise InputError('--eps must be above 0, not 0')
    for name in ('mu1', 'mu2'):
        if getattr(settings, name) >= 1:
            raise InputError(f'{flag(name)} must be below 1, not {getattr(settings, name)}')
    if not 0 <= settings.bn_decay < 1:
        raise InputError(f'--bn-decay must be at least 0 and below 1, not {settings.bn_decay}')
    if settings.bn_decay and settings.pooled_variance:
        raise InputError(
            '--bn-decay and --pooled-variance exclude each other, because moving averages of a '
            'pooled variance do not exist: give only one'
        )
    if settings.seed >= 2**32:
        raise InputError(f'--seed must be below 2**32, not {settings.seed}')
    if not (math.isfinite(settings.beta_center) and 0 < settings.beta_period < math.inf):
        raise InputError(
            '--beta-center must be finite, and --beta-period finite and above 0, not '
            f'{settings.beta_center} and {settings.beta_period}'
        )
    try:
        interval(settings.checkpoint_every)
    except ValueError as error:
        raise InputError(f'--checkpoint-every is {error}') from error
    try:
        loader.parse(settings.loader)
    except ValueError as error:
        raise InputError(f'--loader is {error}') from error
    if not 0 < settings.min_crop_area <= 1:
        raise InputError(
            f'--min-crop-area must be above 0 and at most 1, not {settings.min_crop_area}'
        )
    if settings.resize < settings.image_size:
        raise InputError(
            f'--resize {settings.resize} is smaller than --image-size {settings.image_size}: '
            'the centre crop does not fit; choose a larger --resize'
        )


class _SettingsParser(Parser):
    def error(self, message):
        raise InputError(self.remedy(message))


def flag(name: str) -> str:
    """Returns the option of a setting."""
    return '--' + name.replace('_', '-')


def _help(field, default) -> str:
    """Returns the help of an option, with its default unless that is None or in the text."""
    text = field.metadata['help']
    without = default is None or ']' in text
    return (text if without else f'{text} [{default}]').replace('%', '%%')


def _wrapped(items) -> str:
    return '\n'.join(
        textwrap.fill(
            ' '.join(text.split()),
            width=80,
            initial_indent=f'  {name:9}',
            subsequent_indent=' ' * 11,
        )
        for name, text in items
    )


def parser_of(preset: Settings, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of all options. The help shows the preset's values as defaults."""
    presets = _wrapped((name, function.__doc__ or '') for name, function in PRESETS.items())
    parser = _SettingsParser(
        prog='reproduce/train.py',
        description=description,
        epilog='[X] is the default, (X) the source of a number.\n\n'
        f'presets:\n{presets}\n\nsources of the numbers:\n{_wrapped(SOURCES.items())}',
        argument_default=argparse.SUPPRESS,
    )
    for field in dataclasses.fields(Settings):
        options: dict = {'help': _help(field, getattr(preset, field.name))}
        kind = field.metadata['kind']
        if kind is bool:
            options['action'] = argparse.BooleanOptionalAction
        else:
            options['type'] = kind
            options['metavar'] = 'X' if not field.metadata['choices'] else None
            options['choices'] = field.metadata['choices']
        if field.name == 'preset':
            options.update(choices=tuple(PRESETS), metavar=None)
        parser.add_argument(flag(field.name), **options)
    parser.add_argument(
        '--dry-run',
        action='store_true',
        default=False,
        help='print learning rates and alphas of all epochs, and stop',
    )
    return parser


def parse(argv, n_processes: int, description: str | None = None) -> tuple[Settings, bool]:
    """Reads a command line. Explicit options replace the preset's values.

    Args:
        argv (list of str): The words of the command line, without the program's name.
        n_processes (int): Number of processes. A preset without a number of workers gets this one.
        description (str): Text at the start of ``--help``.

    Returns:
        tuple: The settings (Settings), and whether to print the plan only (bool).

    Raises:
        InputError: An option is unknown or has an impossible value.
        SystemExit: ``--help`` was given.
    """
    chooser = _SettingsParser(add_help=False)
    chooser.add_argument('--preset', choices=tuple(PRESETS), default='paper')
    preset = PRESETS[chooser.parse_known_args(argv)[0].preset]()
    given = vars(parser_of(preset, description).parse_args(argv))
    dry_run = given.pop('dry_run')
    settings = dataclasses.replace(preset, **given)
    if settings.workers is None:
        settings = dataclasses.replace(settings, workers=n_processes)
    check(settings)
    return settings, dry_run
