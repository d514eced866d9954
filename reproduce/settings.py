"""Every number of the experiment, in one place.

A letter in parentheses says where a number comes from: ``extensions.SOURCES`` is the legend.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from extensions import alpha_sgd, base_learning_rate
from extensions.communicator_base import ACCUMULATE
from extensions.half_precision import NAMES
from extensions.schedules import FORMS, PAPER_EPOCHS
from reproduce import images
from reproduce.baselines import LR_SCHEDULES

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


def _setting(default, help, choices=None):
    kind = str if default is None else type(default)
    metadata = {'help': help, 'choices': choices, 'kind': kind}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The defaults are the paper's run: ResNet-50 on ImageNet, 1,024 workers, a batch of 32,768, 90
    epochs.
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
        tuple(LR_SCHEDULES),
    )
    alpha_form: str = _setting(
        'printed',
        'form of the transition alpha_SGD; sgd: none, momentum SGD throughout (S, P)',
        (*FORMS, 'sgd'),
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
        'exact',
        'sum of the communicator mpi; ring rounds after each addition, as NCCL (P)',
        ACCUMULATE,
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
        'how images are resized: antialiased bilinear, by OpenCV or, slower, by Pillow (P)',
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
    def communicator_options(self) -> dict:
        """For :func:`~extensions.half_precision.create_communicator`."""
        names = ('allreduce_grad_dtype', 'accumulate', 'gradient_scale', 'stop_on_nonfinite')
        return {'name': self.communicator, **{name: getattr(self, name) for name in names}}

    @property
    def lr_base(self) -> float:
        return base_learning_rate(self.total_batch_size)

    def epoch_of_90(self, epoch):
        """The epoch of the paper's 90 for an epoch of this run, or for each of an array."""
        return epoch * PAPER_EPOCHS / self.epochs

    def lr(self, epoch_of_90):
        """eta at an epoch of the paper's 90, or at each of an array."""
        return LR_SCHEDULES[self.lr_schedule](epoch_of_90, self.total_batch_size)

    def alpha_sgd(self, epoch_of_90):
        """alpha_SGD at an epoch of the paper's 90, or at each of an array."""
        if self.alpha_form == 'sgd':
            return np.ones_like(epoch_of_90, np.float64)[()]
        return alpha_sgd(epoch_of_90, self.beta_center, self.beta_period, self.alpha_form)

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
