"""Every number of the experiment, in one place.

A letter in parentheses names the source of a number. ``extensions.SOURCES`` is the legend.
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

FUNCTIONS = ('auto', 'compiled', 'numpy', 'chainer', 'torch')


class InputError(Exception):
    """Settings that cannot be run. The message is one line with the cause and the remedy."""


# A run that resumes from a checkpoint may change these settings.
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
    'evaluate',
    'watchdog',
)


def _setting(default, help, choices=None):
    kind = str if default is None else type(default)
    metadata = {'help': help, 'choices': choices, 'kind': kind}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run.

    The defaults are the paper's run: ResNet-50 on ImageNet, 1,024 workers, a batch of 32,768, 90
    epochs.
    """

    preset: str = _setting(
        'paper', 'named set of defaults for all other options; the end of --help describes them'
    )

    workers: int | None = _setting(
        1024,
        "number of workers, the paper's n. Each worker has its own minibatch. Each process plays "
        'the same number of workers. The preset smoke has one worker per process (S)',
    )
    local_batch_size: int = _setting(
        32, "images per worker and iteration, the paper's local batch size b (S)"
    )
    epochs: int = _setting(
        90, 'length of the run in epochs; the schedules stretch to that length (S)'
    )

    lr_per_256: float = _setting(
        0.1, 'learning rate per 256 images of the total batch, before the schedule (S, G)'
    )
    lr_schedule: str = _setting(
        'slow_start',
        "learning rate by epoch. slow_start is the paper's (S). For comparison: Goyal's steps "
        "without warm-up, and Goyal's gradual_warmup, the same steps after a warm-up (G)",
        tuple(LR_SCHEDULES),
    )
    alpha_form: str = _setting(
        'printed',
        'form of alpha_SGD, the weight of SGD during the transition from RMSprop to SGD. printed '
        '(S): the formula that the paper prints, which jumps. continuous (P): without the jump. '
        'sgd (P): no transition, momentum SGD throughout',
        (*FORMS, 'sgd'),
    )
    beta_center: float = _setting(
        10.0, "epoch at which alpha_SGD is 1/2, counted in the paper's 90 epochs (S)"
    )
    beta_period: float = _setting(
        5.0, "length of the transition, counted in the paper's 90 epochs (S)"
    )
    lr_rmsprop: float = _setting(3e-4, 'eta_RMSprop, the step size of the RMSprop part (R)')
    mu1: float = _setting(0.9, 'decay rate of the momentum, per iteration (R)')
    mu2: float = _setting(0.99, 'decay rate of the mean of squared gradients, per iteration (R)')
    eps: float = _setting(1e-8, 'constant added to the root of the mean square (R)')
    weight_decay: float = _setting(
        1e-4, 'weight decay, for all parameters except gamma and beta of batch normalization (G)'
    )
    pooled_variance: bool = _setting(
        False,
        "validate with the variance of all workers' images together, instead of the mean of the "
        "workers' variances (P)",
    )

    bn_decay: float = _setting(
        0.0,
        'decay rate, per iteration, of moving averages of the batch statistics. Validation uses '
        'these averages. 0: no moving averages, as in the paper (S)',
    )

    communicator: str = _setting(
        'auto',
        'library that averages gradients over the processes: pure_nccl on GPUs, mpi on CPUs, '
        "or naive, ChainerMN's float32 communicator for CPUs. auto takes pure_nccl if every "
        'rank has a GPU and NCCL, and mpi if no host has a GPU or CuPy',
        NAMES,
    )
    allreduce_grad_dtype: str = _setting(
        'float16',
        'number format in which processes send gradients (S)',
        ('float16', 'float32', 'float64'),
    )
    accumulate: str = _setting(
        'exact',
        'how the communicator mpi adds gradients. exact: the exact sum. ring: a sum with rounding '
        'after each addition, as in NCCL (P)',
        ACCUMULATE,
    )
    gradient_scale: float = _setting(
        1.0,
        'power of two by which gradients are multiplied while they are sent. The paper has no such '
        'factor (P)',
    )
    stop_on_nonfinite: bool = _setting(
        True, 'end the run before the update if a gradient is infinite or NaN (P)'
    )

    width: int = _setting(
        64, 'channels after the first convolution; all other layers scale with this number'
    )
    stem: str = _setting(
        'imagenet',
        'first layers of the network. imagenet: for images of 224 pixels. cifar: for 32 pixels',
        ('imagenet', 'cifar'),
    )
    shallow: bool = _setting(
        False, 'one bottleneck in each stage instead of 3, 4, 6 and 3, for small studies'
    )
    functions: str = _setting(
        'auto',
        "implementation of the model's functions. chainer: Chainer's own. compiled: C, on CPUs "
        'only, with the same bits on all of them; needs a C compiler at the installation. numpy: '
        "the same in NumPy. torch: PyTorch's convolution, batch normalization, ReLU and max "
        'pooling; needs PyTorch. auto: compiled or, without the compiler, numpy; on GPUs, chainer. '
        "Products are float32's; with NVIDIA_TF32_OVERRIDE=1, GPUs may use TF32 (P)",
        FUNCTIONS,
    )

    train_root: str | None = _setting(
        None,
        'folder of training images. It has a subfolder per class, with .jpg, .jpeg or .png files. '
        'Without this option, the preset paper takes $IMAGENET_ROOT/train, if that is set, and the '
        'preset smoke takes digits that the project includes',
    )
    val_root: str | None = _setting(
        None,
        'folder of validation images, with the same classes. Give both folders, or none',
    )
    n_train_images: int = _setting(
        1_281_167, 'number of training images that --dry-run assumes without --train-root'
    )
    image_size: int = _setting(224, 'side of the images that the network sees, in pixels (G)')
    resize: int = _setting(
        256, 'in validation, shorter side of an image before its centre crop, in pixels (G)'
    )
    min_crop_area: float = _setting(
        0.08, "in training, smallest random crop, as a fraction of the image's area (G)"
    )
    horizontal_flip: bool = _setting(True, 'flip half of the training images at random (G)')
    validation_batch_size: int = _setting(64, 'images per minibatch in validation (P)')
    resize_filter: str = _setting(
        'antialiased',
        "antialiased bilinear filter that resizes images. antialiased: OpenCV's. pillow: Pillow's, "
        'slower (P)',
        images.FILTERS,
    )
    loader: str = _setting(
        'processes:2',
        "decoder of each rank's images: N processes with processes:N, N threads with threads:N, or "
        'the rank itself with serial (P)',
    )
    bad_images: str = _setting(
        'error',
        'response to an image that cannot be decoded: error ends the run; skip continues without '
        'the image, and lists it in summary.json (P)',
        ('error', 'skip'),
    )
    manifests: str | None = _setting(
        None, 'folder for the lists of images [manifests, beside --out]'
    )

    seed: int = _setting(
        0, 'seed of the initial values, of the order of images and of their augmentation (P)'
    )
    out: str = _setting('results/paper', 'folder for all files that the run writes')
    checkpoint_every: str = _setting(
        '1', 'write a checkpoint after so many epochs, as 2, or minutes, as 10m (P)'
    )
    keep_checkpoints: int = _setting(2, 'number of checkpoints to keep: the last ones (P)')
    resume: str | None = _setting(
        None,
        'checkpoint from which to continue. A folder stands for its newest checkpoint. auto: the '
        'newest one in --out; if there is none, the run starts from the beginning',
    )
    overwrite: bool = _setting(
        False,
        'delete an earlier run in --out, and start anew',
    )
    evaluate: str | None = _setting(
        None,
        "validate the model in this file, a run's model.npz or checkpoints/best.npz, and stop. Add "
        "this to the options of its run. Training images are not needed, and no run's files change",
    )
    watchdog: float = _setting(
        300.0,
        'end the job if no rank makes progress, or one rank gives no sign of life, for so many '
        'seconds. 0: never',
    )

    @property
    def total_batch_size(self) -> int:
        """n b: images of all workers together in one iteration."""
        assert self.workers is not None, 'options.parse() sets workers to the number of processes'
        return self.workers * self.local_batch_size

    @property
    def preprocessing(self) -> images.Preprocessing:
        """How images are cropped, resized and flipped."""
        return images.Preprocessing(
            self.image_size,
            self.resize,
            self.min_crop_area,
            horizontal_flip=self.horizontal_flip,
            resize_filter=self.resize_filter,
        )

    @property
    def manifests_folder(self) -> str:
        """The folder of manifests, which keep the lists of images."""
        return self.manifests or str(Path(self.out).parent / 'manifests')

    @property
    def identity(self) -> dict:
        """The settings that must not change when a run resumes, as {name: value}."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if name not in _MAY_CHANGE}

    @property
    def communicator_options(self) -> dict:
        """Keyword arguments of :func:`~extensions.half_precision.create_communicator`."""
        names = ('allreduce_grad_dtype', 'accumulate', 'gradient_scale', 'stop_on_nonfinite')
        return {'name': self.communicator, **{name: getattr(self, name) for name in names}}

    @property
    def lr_base(self) -> float:
        """eta_base, which is proportional to the total batch size."""
        return self._lr_scale * base_learning_rate(self.total_batch_size)

    def epoch_of_90(self, epoch):
        """Converts an epoch of this run, or an array of epochs, to the paper's 90 epochs."""
        return epoch * PAPER_EPOCHS / self.epochs

    def lr(self, epoch_of_90):
        """Returns eta at an epoch of the paper's 90, or at an array of epochs."""
        return self._lr_scale * LR_SCHEDULES[self.lr_schedule](epoch_of_90, self.total_batch_size)

    @property
    def _lr_scale(self) -> float:
        return self.lr_per_256 / base_learning_rate(256)

    def alpha_sgd(self, epoch_of_90):
        """Returns alpha_SGD at an epoch of the paper's 90, or at an array of epochs."""
        if self.alpha_form == 'sgd':
            return np.ones_like(epoch_of_90, np.float64)[()]
        return alpha_sgd(epoch_of_90, self.beta_center, self.beta_period, self.alpha_form)

    def iterations(self, n_images) -> int:
        """Returns the number of updates that complete ``epochs`` epochs of ``n_images`` images."""
        return -(-self.epochs * n_images // self.total_batch_size)


def paper() -> Settings:
    """The paper's run: ResNet-50 on ImageNet, 1,024 workers x 32 images, 90 epochs. The paper
    reports 74.9 % in 15 minutes on 1,024 P100 GPUs. This project has not run the preset. With fewer
    processes, each process plays several of the 1,024 workers."""
    return Settings()


def cifar10() -> Settings:
    """The paper's schedules on a data set for one machine: CIFAR-10 from an image folder, a slim
    ResNet-50, 8 workers x 32 images, 30 epochs. An epoch takes 6 minutes on two CPU cores. Three
    epochs were run, by Chainer's own functions, and reached 42.8 % top-1. All 30 would take 3
    hours; they were not run."""
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
    """Everything that the paper's run does, in about a minute on two CPU cores. It trains a slim
    ResNet-50 on 1,437 handwritten digits that the project includes, with one worker per process.
    The run ends with a top-1 of 95 % or more."""
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
