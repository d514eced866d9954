"""Records the loss while SGD takes over from RMSprop: smoothly or abruptly, at half or full rate.

The network, images and batch are those of reproduce/studies/miniature, with a seed that it does not
count.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from reproduce.job import options
from reproduce.job.countdown import Countdown
from reproduce.settings import Settings
from reproduce.studies.miniature import parts, variants
from reproduce.studies.pictures import short_run
from reproduce.studies.pictures.first_updates import rounded


def _at_the_full_rate(variant):
    return dataclasses.replace(variant, options=f'{variant.options} --lr-schedule steps')


_NAMES = {'d': 'printed', 'dc': 'continuous', 'ab': 'abrupt', 's': 'SGD'}
_HALF_RATE = {_NAMES[name]: variants.VARIANTS[name] for name in _NAMES}  # slow start
VARIANTS = {
    **_HALF_RATE,
    **{f'{name}, full rate': _at_the_full_rate(variant) for name, variant in _HALF_RATE.items()},
}
SEED = 100
N_UPDATES = 120  # 20 of 90 epochs
DATA = 'figures/hand_over.json'


def settings(variant, images: Path) -> Settings:
    """Returns the settings of a training, with the paper's 90 epochs in 11.

    Args:
        variant (str): One of ``VARIANTS``.
        images (Path): CIFAR-10, as train/CLASS/* and val/CLASS/*.
    """
    words = f'{variants.FIRST.options} {VARIANTS[variant].options} --seed {SEED}'.split()
    roots = ['--train-root', str(images / 'train'), '--val-root', str(images / 'val')]
    return options.parse([*words, *roots], n_processes=1)[0]


class Recorder:
    """Records updates. :func:`short_run.run` calls it after each of them.

    Args:
        countdown (Countdown): Is called after each update, too.

    Attributes:
        found (dict): Lists with a number for each update. ``epoch``: the paper's, of 90, at the
            update's start; ``loss``: its training loss, a mean over the workers.
    """

    def __init__(self, countdown):
        self.found = {'epoch': [], 'loss': []}
        self._countdown = countdown

    def __call__(self, trainer, batches):
        epoch = trainer.updater.previous_epoch_detail * 90 / variants.FIRST.epochs
        self.found['epoch'].append(rounded(epoch))
        self.found['loss'].append(rounded(np.mean(trainer.updater.losses[-1])))
        self._countdown()


def measure(images: Path) -> dict:
    """Trains each variant for some updates, and prints the time left.

    Args:
        images (Path): CIFAR-10, as train/CLASS/* and val/CLASS/*.

    Returns:
        dict: Variant to what :class:`Recorder` found.
    """
    countdown = Countdown('updates', len(VARIANTS) * N_UPDATES)
    result = {}
    for name, variant in VARIANTS.items():
        recorder = Recorder(countdown)
        with parts.put(variant.part):
            short_run.run(settings(name, images), N_UPDATES, recorder)
        result[name] = recorder.found
    return result
