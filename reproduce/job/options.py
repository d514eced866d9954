"""The command line of reproduce/train.py: its options, their help, and checks of their values."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import textwrap
from pathlib import Path

from extensions import SOURCES, cupy_compatibility
from extensions.checkpoint import interval
from reproduce import loader
from reproduce.dataset import check_workers
from reproduce.job import output
from reproduce.job.command_line import Parser
from reproduce.settings import PRESETS, InputError, Settings

# Settings, their range in words, and the test of a value.
_RANGES = (
    (
        (
            *('workers', 'local_batch_size', 'epochs', 'width', 'image_size', 'resize'),
            *('validation_batch_size', 'n_train_images', 'keep_checkpoints'),
        ),
        'at least 1',
        lambda x: x >= 1,
    ),
    (
        ('lr_rmsprop', 'weight_decay', 'watchdog'),
        'at least 0 and finite',
        lambda x: 0 <= x < math.inf,
    ),
    # With eps = 0, a gradient of exactly 0 would be 0 / 0.
    (('eps', 'beta_period', 'lr_per_256'), 'above 0 and finite', lambda x: 0 < x < math.inf),
    (('mu1', 'mu2', 'bn_decay'), 'at least 0 and below 1', lambda x: 0 <= x < 1),
    (('min_crop_area',), 'above 0 and at most 1', lambda x: 0 < x <= 1),
    (('beta_center',), 'finite', math.isfinite),
    (('seed',), 'at least 0 and below 2**32', lambda x: 0 <= x < 2**32),
)
_OWN_PLACE = ('--out', '--resume', '--overwrite')  # with one of these, smoke is but a preset
_FORMATS = {'checkpoint_every': interval, 'loader': loader.parse}


def check(settings):
    """Raises InputError, which names the option and the range, if a value cannot be used."""
    for field in dataclasses.fields(settings):
        choices, value = field.metadata['choices'], getattr(settings, field.name)
        if choices and value not in choices:
            raise InputError(
                f'{flag(field.name)} must be one of {", ".join(choices)}, not {value!r}'
            )
    for names, words, fits in _RANGES:
        for name in names:
            value = getattr(settings, name)
            if value is not None and not fits(value):
                raise InputError(f'{flag(name)} must be {words}, not {value}')
    for name, parse_value in _FORMATS.items():
        try:
            parse_value(getattr(settings, name))
        except ValueError as error:
            raise InputError(f'{flag(name)} is {error}') from error
    if settings.bn_decay and settings.pooled_variance:
        raise InputError(
            '--bn-decay and --pooled-variance exclude each other, because moving averages of a '
            'pooled variance do not exist: give only one'
        )
    if settings.evaluate is not None and (settings.resume or settings.overwrite):
        raise InputError(
            '--evaluate validates a model that is finished: leave out --resume and --overwrite'
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


def parser_of(preset: Settings, description=None, verb='train') -> argparse.ArgumentParser:
    """Returns the parser of all options. The help shows the preset's values as defaults."""
    presets = _wrapped((name, function.__doc__ or '') for name, function in PRESETS.items())
    parser = _SettingsParser(
        prog=f'./run_mpi.sh {verb} --',
        description=description,
        epilog='[X] is the default, (X) the source of a number.\n\n'
        f'presets:\n{presets}\n\nsources of the numbers:\n{_wrapped(SOURCES.items())}',
        argument_default=argparse.SUPPRESS,
    )
    for field in dataclasses.fields(Settings):
        if field.name == 'evaluate' and verb != 'train':
            continue
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
    if verb == 'train':
        text = 'print learning rates and alphas of all epochs, and stop'
        parser.add_argument('--dry-run', action='store_true', default=False, help=text)
    return parser


def parse(argv, n_processes: int, description=None, verb='train') -> tuple[Settings, bool]:
    """Reads a command line. Explicit options replace the preset's values.

    Args:
        argv (list of str): The words of the command line, without the program's name.
        n_processes (int): Number of processes. A preset without a number of workers gets this one.
        description (str): Text at the start of ``--help``.
        verb (str): ``'train'``, or another, which has neither ``--dry-run`` nor ``--evaluate``.

    Returns:
        tuple: The settings (Settings), and whether to print the plan only (bool).

    Raises:
        InputError: An option is unknown or has an impossible value.
        SystemExit: ``--help`` was given.
    """
    chooser = _SettingsParser(add_help=False)
    chooser.add_argument('--preset', choices=tuple(PRESETS), default='paper')
    preset = PRESETS[chooser.parse_known_args(argv)[0].preset]()
    given = vars(parser_of(preset, description, verb).parse_args(argv))
    dry_run = given.pop('dry_run', False)
    settings = dataclasses.replace(preset, **given)
    if settings.workers is None:
        settings = dataclasses.replace(settings, workers=n_processes)
    check(settings)
    if dry_run and settings.evaluate is not None:
        raise InputError('--dry-run and --evaluate contradict each other: give only one')
    return settings, dry_run


def watchdog_of(argv) -> float:
    """Returns the seconds of --watchdog before the options are checked, on any rank by itself.

    Args:
        argv (list of str): The words of the command line, without the program's name.

    Returns:
        float: The seconds; the default's if the option has an impossible value.
    """
    chooser = _SettingsParser(add_help=False)
    chooser.add_argument('--watchdog', type=float)
    try:
        seconds = chooser.parse_known_args(argv)[0].watchdog
    except InputError:
        seconds = None
    return seconds if seconds is not None and 0 <= seconds < math.inf else Settings.watchdog


def main(argv):
    """Checks the options of a job before mpiexec starts its ranks: N FOLDER VERB OPTIONS...

    mpiexec would add a page of its own to the line that the ranks print. N may be empty for the
    verb smoke. FOLDER is the user's. Prints, for a training, the number of processes, the absolute
    path of its results, and the options that the verb smoke adds, each on a line.
    """
    n_processes, folder, verb, *words = argv
    preset = ['--preset', 'smoke'] if verb == 'smoke' else []
    parser = 'train' if verb == 'smoke' else verb
    if not n_processes:
        n_processes, workers = _layout_for_smoke(words)
        preset += workers
    try:
        settings, dry_run = parse([*preset, *words], int(n_processes), verb=parser)
        trains = not dry_run and settings.evaluate is None
        if trains:
            check_workers(settings, int(n_processes))
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    if verb == 'preflight' or not trains:
        return
    out, added = settings.out, []
    if verb == 'smoke' and not any(word.split('=')[0] in _OWN_PLACE for word in words):
        out, added = output.for_smoke(settings, folder)
    print(n_processes, Path(folder, out), *preset[2:], *added, sep='\n')


def _layout_for_smoke(words) -> tuple[int, list[str]]:
    """Two processes; on a host with one GPU, one that plays two workers."""
    on_one_gpu = cupy_compatibility.has_cupy() and cupy_compatibility.count_gpus() == 1
    names = [word.partition('=')[0] for word in words]
    on_cpus = {'mpi', 'naive'} & {part for word in words for part in word.split('=')}
    if not on_one_gpu or on_cpus:
        return 2, []
    return 1, [] if '--workers' in names else ['--workers', '2']


if __name__ == '__main__':
    main(sys.argv[1:])
