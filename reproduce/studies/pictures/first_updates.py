"""Records the first updates of trainings by plain SGD, gradual warm-up and RMSprop warm-up."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from reproduce.settings import Settings, smoke
from reproduce.studies.pictures import short_run

VARIANTS: dict[str, dict[str, Any]] = {
    'SGD': {'lr_schedule': 'steps', 'alpha_form': 'sgd'},
    'gradual warm-up': {'lr_schedule': 'gradual_warmup', 'alpha_form': 'sgd'},
    'RMSprop warm-up': {},
}


N_WORKERS = 32  # x 32 images = 1,024: most of the digits in each update
N_UPDATES = 20  # 14 of 90 epochs; alpha_SGD reaches 1 at epoch 12.5
DATA = 'figures/first_updates.json'


def settings(variant, workers=N_WORKERS) -> Settings:
    """Returns the settings of a training on the digits, with the paper's 90 epochs."""
    return dataclasses.replace(
        smoke(),
        workers=workers,
        width=8,
        epochs=90,
        loader='serial',
        communicator='mpi',
        **VARIANTS[variant],
    )


class Recorder:
    """Records updates. :func:`short_run.run` calls it after each of them.

    Attributes:
        found (dict): Lists with a number for each update. ``epoch``: at its start; ``loss`` and
            ``lr``; ``factor`` and ``step``: the name of a layer to a list. ``factor`` is the median
            over the layer's weights of eta (alpha_SGD + alpha_RMSprop / (sqrt m + eps)). ``step``
            is the root mean square of this factor times the gradient with its weight decay: what
            the update adds to eta Delta.
    """

    def __init__(self):
        self.found = {'epoch': [], 'loss': [], 'lr': [], 'factor': {}, 'step': {}}
        self._delta = {}

    def __call__(self, trainer, batches):
        updater = trainer.updater
        optimizer = updater.get_optimizer('main')
        self.found['epoch'].append(rounded(updater.previous_epoch_detail))
        self.found['loss'].append(rounded(np.mean(updater.losses[-1])))
        self.found['lr'].append(rounded(optimizer.lr))
        for name, param in sorted(optimizer.target.namedparams()):
            if is_drawn(name):
                layer = name.strip('/').removesuffix('/W')
                for key, value in self._layer(layer, param.update_rule.state, optimizer).items():
                    self.found[key].setdefault(layer, []).append(rounded(value))

    def _layer(self, layer, state, optimizer) -> dict:
        m, delta = (state[kind].astype(np.float64) for kind in ('m', 'delta'))
        before, self._delta[layer] = self._delta.get(layer, 0.0), delta
        rmsprop = optimizer.alpha_rmsprop / (np.sqrt(m) + optimizer.eps)
        step = optimizer.lr * (optimizer.mu1 * before - delta)
        return {
            'factor': np.median(optimizer.lr * (optimizer.alpha_sgd + rmsprop)),
            'step': np.sqrt(np.mean(step**2)),
        }


def is_drawn(name) -> bool:
    """Whether a parameter is a layer's weight, and sees more than padding.

    With digits of 32 x 32, the 3x3 convolutions of res5 have one pixel: most of their weights only
    ever meet zeros.
    """
    return name.endswith('/W') and not (name.startswith('/res5') and name.endswith('conv2/W'))


def rounded(value) -> float:
    """Rounds a number to five digits, for a short file."""
    return float(f'{float(value):.5g}')


def measure() -> dict:
    """Trains each variant for some updates.

    Returns:
        dict: Variant to what :class:`Recorder` found.
    """
    result = {}
    for variant in VARIANTS:
        recorder = Recorder()
        short_run.run(settings(variant), N_UPDATES, recorder)
        result[variant] = recorder.found
    return result
