"""Every number of the experiment, in one place; letters say where it comes from.

S a reading note of the paper, A its abstract, G Goyal et al. (arXiv:1706.02677), R what public
re-implementations agree on, D arithmetic, P this project's own choice.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import textwrap
from pathlib import Path

from extensions import base_learning_rate
from extensions.checkpoint import interval
from extensions.half_precision import NAMES, SUMS
from extensions.schedules import FORMS, LR_SCHEDULES, learning_rate
from reproduce import images, loader


class InputError(Exception):
    """What the user gave cannot be run; the message says why in one line, and what would work."""


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
# What a run that goes on from a checkpoint may have otherwise.
_MAY_CHANGE = (
    'preset',
    'communicator',
    'train_root',
    'val_root',
    'n_train_images',
    'validation_batch_size',
    'loader',
    'bad_images',
    'manifests',
    'out',
    'checkpoint_every',
    'keep_checkpoints',
    'resume',
    'overwrite',
    'watchdog',
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


def _setting(default, help, choices=None):
    kind = str if default is None else type(default)
    metadata = {'help': help, 'choices': choices, 'kind': kind}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The defaults are the paper's run: ResNet-50 on ImageNet, 1,024 workers, a batch of 32,768, 90
    epochs.

    Raises:
        InputError: A value is out of its range; it is named.
    """

    preset: str = _setting('paper', 'name of the set of values that the others start from')

    workers: int | None = _setting(
        1024, "the paper's n; a multiple of the processes, which play workers / processes each (S)"
    )
    local_batch_size: int = _setting(32, 'images of one worker in one iteration (S)')
    epochs: int = _setting(90, 'epochs; the schedules stretch to them (S)')

    lr_schedule: str = _setting(
        'slow_start',
        "the paper's learning rate, or, to compare with it, Goyal's steps without or with gradual "
        'warm-up (S, G)',
        LR_SCHEDULES,
    )
    alpha_form: str = _setting(
        'printed',
        'form of the transition alpha_SGD; sgd: none, momentum SGD throughout (S, P)',
        FORMS,
    )
    beta_center: float = _setting(10.0, 'epoch of the 90 at which alpha_SGD is 1/2 (S)')
    beta_period: float = _setting(5.0, 'epochs of the 90 that the transition takes (S)')
    lr_rmsprop: float = _setting(3e-4, 'step size of the RMSprop part, eta_RMSprop (R)')
    mu1: float = _setting(0.9, 'decay rate of the momentum (R)')
    mu2: float = _setting(0.99, 'decay rate of the mean square of the gradient (R)')
    eps: float = _setting(1e-8, 'added to the root of the mean square (R)')
    weight_decay: float = _setting(1e-4, 'on everything but BN gamma and beta (G)')
    pooled_variance: bool = _setting(
        False, 'validate with the variance of all images instead of the mean of the variances (P)'
    )

    bn_decay: float = _setting(
        0.0, 'validate with moving averages of the BN statistics; the paper has none (S)'
    )

    communicator: str = _setting('auto', 'pure_nccl on GPUs, mpi on CPUs; auto chooses', NAMES)
    allreduce_grad_dtype: str = _setting(
        'float16', 'type of the gradients on the wire (S)', ('float16', 'float32', 'float64')
    )
    accumulate: str = _setting(
        'exact', 'sum of the communicator mpi; ring rounds after each addition, as NCCL (P)', SUMS
    )
    gradient_scale: float = _setting(
        1.0, 'power of two that is on the gradients on the wire; the paper has none (P)'
    )
    stop_on_nonfinite: bool = _setting(
        True, 'an infinite or NaN gradient ends the run before the update (P)'
    )

    width: int = _setting(64, 'channels after the first convolution')
    stem: str = _setting(
        'imagenet', 'first layers, for 224 or for 32 pixels', ('imagenet', 'cifar')
    )

    train_root: str | None = _setting(None, 'folder of training images, CLASS/*.jpg')
    val_root: str | None = _setting(None, 'folder of validation images, CLASS/*.jpg')
    n_train_images: int = _setting(
        1_281_167, 'training images that --dry-run counts with where there is no folder'
    )
    image_size: int = _setting(224, 'pixels of an image in training and validation (G)')
    resize: int = _setting(256, 'shorter side before the centre crop of validation (G)')
    min_crop_area: float = _setting(0.08, 'smallest random crop, as a fraction of the area (G)')
    horizontal_flip: bool = _setting(True, 'flip half of the training images (G)')
    validation_batch_size: int = _setting(64, 'images at a time in validation (P)')
    resize_filter: str = _setting(
        'antialiased',
        'how images are resized: antialiased bilinear, by OpenCV or, slower, by Pillow; or linear, '
        'which aliases (P)',
        images.FILTERS,
    )
    loader: str = _setting(
        'processes:2', 'who decodes the images of a rank: processes:N, threads:N, or serial (P)'
    )
    bad_images: str = _setting(
        'error',
        'an image that cannot be decoded ends the run, or is skipped and counted (P)',
        ('error', 'skip'),
    )
    manifests: str | None = _setting(
        None, 'folder that lists of images are kept in [manifests, beside --out]'
    )

    seed: int = _setting(0, 'of the initial values, the order of images and their augmentation (P)')
    out: str = _setting('results/paper', 'folder for everything that the run writes')
    checkpoint_every: str = _setting('1', 'epochs, as 1, or minutes, as 10m (P)')
    keep_checkpoints: int = _setting(2, 'how many of the last checkpoints are kept (P)')
    resume: str | None = _setting(
        None, 'checkpoint, or folder of them, to go on from; auto: those in --out, if there are any'
    )
    overwrite: bool = _setting(False, 'start anew where --out holds another run')
    watchdog: float = _setting(
        300.0, 'seconds without progress or a sign of life after which the job is ended; 0: never'
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices = field.metadata['choices']
            if choices and value not in choices:
                raise InputError(
                    f'{_flag(field.name)} must be one of {", ".join(choices)}, not {value!r}'
                )
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f'{_flag(name)} must be at least 1, not {value}')
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f'{_flag(name)} must be finite and not negative, not {value}')
        if self.eps == 0:  # a gradient of exactly 0 would be 0 / 0
            raise InputError('--eps must be above 0')
        for name in ('mu1', 'mu2'):
            if getattr(self, name) >= 1:
                raise InputError(f'{_flag(name)} must be below 1, not {getattr(self, name)}')
        if not 0 <= self.bn_decay < 1:
            raise InputError(f'--bn-decay must be in [0, 1), not {self.bn_decay}')
        if self.bn_decay and self.pooled_variance:
            raise InputError(
                '--bn-decay and --pooled-variance exclude each other: there are no moving averages '
                'of a pooled variance'
            )
        if self.seed >= 2**32:
            raise InputError(f'--seed must be below 2**32, not {self.seed}')
        if not (math.isfinite(self.beta_center) and 0 < self.beta_period < math.inf):
            raise InputError(
                '--beta-center must be finite and --beta-period above 0, not '
                f'{self.beta_center} and {self.beta_period}'
            )
        try:
            interval(self.checkpoint_every)
        except ValueError as error:
            raise InputError(f'--checkpoint-every is {error}') from error
        try:
            loader.parse(self.loader)
        except ValueError as error:
            raise InputError(f'--loader is {error}') from error
        if not 0 < self.min_crop_area <= 1:
            raise InputError(f'--min-crop-area must be in (0, 1], not {self.min_crop_area}')
        if self.resize < self.image_size:
            raise InputError(
                f'--resize {self.resize} is smaller than --image-size {self.image_size}: '
                'the centre crop does not fit'
            )

    @property
    def total_batch_size(self) -> int:
        assert self.workers is not None, 'parse() knows the number of processes'
        return self.workers * self.local_batch_size

    @property
    def preprocessing(self) -> images.Preprocessing:
        return images.Preprocessing(
            self.image_size,
            self.resize,
            self.min_crop_area,
            horizontal_flip=self.horizontal_flip,
            resize_filter=self.resize_filter,
        )

    @property
    def manifests_folder(self) -> str:
        return self.manifests or str(Path(self.out).parent / 'manifests')

    @property
    def identity(self) -> dict:
        """What must not change when a run goes on from a checkpoint."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if name not in _MAY_CHANGE}

    @property
    def lr_base(self) -> float:
        return base_learning_rate(self.total_batch_size)

    def lr(self, epoch_of_90):
        """eta at an epoch of the paper's 90, or at each of an array."""
        return learning_rate(epoch_of_90, self.total_batch_size, self.lr_schedule)

    def iterations(self, n_images) -> int:
        """Updates until ``epochs`` epochs are complete."""
        return -(-self.epochs * n_images // self.total_batch_size)


def paper() -> Settings:
    """The paper's run: ResNet-50 on ImageNet, 1,024 workers x 32 images, 90 epochs; published: 74.9
    % in 15 minutes on 1,024 P100 GPUs. Not run by this project. Fewer processes play the 1,024
    workers in turn."""
    return Settings()


def cifar10() -> Settings:
    """CIFAR-10 from an image folder with a slim ResNet-50: the paper's schedules on a data set that
    one machine can train on. 8 workers x 32 images unless told otherwise. Two CPU cores take 13
    minutes an epoch; 3 epochs were run (42.8 % top-1), the 30 were not: 6.6 hours predicted."""
    return Settings(
        preset='cifar10',
        workers=8,
        epochs=30,
        width=16,
        stem='cifar',
        n_train_images=50_000,
        image_size=32,
        resize=32,
        min_crop_area=0.25,
        loader='processes:1',
        out='results/cifar10',
    )


def smoke() -> Settings:
    """1,437 handwritten digits that come with the program, a slim ResNet-50, one worker a process:
    everything that the paper's run does, in about two minutes on two CPU cores; ends with a top-1
    of 95 % or more."""
    return Settings(
        preset='smoke',
        workers=None,
        epochs=15,
        width=16,
        n_train_images=1437,
        image_size=32,
        resize=32,
        min_crop_area=0.8,
        horizontal_flip=False,
        loader='processes:1',
        out='results/smoke',
    )


PRESETS = {preset.__name__: preset for preset in (paper, cifar10, smoke)}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f'{message}; --help lists the options')


def _flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def _help(field) -> str:
    """With the default, unless that is described in it."""
    text = field.metadata['help']
    return (text if ']' in text else f'{text} [{field.default}]').replace('%', '%%')


def _parser(description: str | None) -> argparse.ArgumentParser:
    presets = '\n'.join(
        textwrap.fill(
            ' '.join((preset.__doc__ or '').split()),
            width=80,
            initial_indent=f'  {name:9}',
            subsequent_indent=' ' * 11,
        )
        for name, preset in PRESETS.items()
    )
    parser = _Parser(
        prog='reproduce/train.py',
        description=description,
        epilog=f'presets:\n{presets}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Settings):
        options: dict = {'help': _help(field)}
        kind = field.metadata['kind']
        if kind is bool:
            options['action'] = argparse.BooleanOptionalAction
        else:
            options['type'] = kind
            options['metavar'] = 'X' if not field.metadata['choices'] else None
            options['choices'] = field.metadata['choices']
        if field.name == 'preset':
            options.update(choices=tuple(PRESETS), metavar=None)
        parser.add_argument(_flag(field.name), **options)
    parser.add_argument(
        '--dry-run', action='store_true', default=False, help='print the plan as a table and stop'
    )
    return parser


def parse(argv, n_processes: int, description: str | None = None) -> tuple[Settings, bool]:
    """Settings of a command line: a preset, and over it what was given explicitly.

    Args:
        argv (list of str): Without the program's name.
        n_processes (int): Workers where the preset has one a process.
        description (str): For ``--help``.

    Returns:
        tuple: The settings, and whether this is a dry run.

    Raises:
        InputError: An option is unknown or has an impossible value.
        SystemExit: After ``--help``.
    """
    given = vars(_parser(description).parse_args(argv))
    dry_run = given.pop('dry_run')
    settings = dataclasses.replace(PRESETS[given.get('preset', 'paper')](), **given)
    if settings.workers is None:
        settings = dataclasses.replace(settings, workers=n_processes)
    return settings, dry_run
