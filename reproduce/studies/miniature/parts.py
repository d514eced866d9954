"""What some variants of the miniature do that reproduce/train.py has no option for.

A known mistake, an abrupt transition, another optimizer, and other sums of float16 gradients. They
are for this study alone: each takes the place of a part of extensions/ in the process of one run.
The second network takes the place of ResNet50.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys

import extensions  # isort: skip  (makes Chainer importable on NumPy 2)
import numpy as np

from extensions import exact_mpi, schedules
from extensions.rmsprop_warmup import RMSpropWarmupRule
from reproduce.studies.miniature.network import ResNet10

LARS_TRUST = 0.01


class OutsideMomentumRule(RMSpropWarmupRule):
    """A known mistake: the RMSprop term beside the momentum instead of inside it::

        Delta_t = mu1 * Delta_{t-1} - alpha_SGD * g_t
        theta_t = theta_{t-1} + eta * (Delta_t - alpha_RMSprop / (sqrt(m_t) + eps) * g_t)

    The RMSprop term lacks the momentum's gain of 1 / (1 - mu1).
    """

    def _update_by_numpy(
        self, arrays, lr, alpha_sgd, alpha_rmsprop, mu1, mu2, one_minus_mu2, eps, weight_decay_rate
    ):
        grad, p, m, delta = arrays
        g = grad + np.float32(weight_decay_rate) * p
        m *= np.float32(mu2)
        m += np.float32(one_minus_mu2) * g * g
        delta *= np.float32(mu1)
        delta -= np.float32(alpha_sgd) * g
        beside = np.float32(alpha_rmsprop) / (np.sqrt(m) + np.float32(eps)) * g
        p += np.float32(lr) * (delta - beside)

    def update_core_cpu(self, param):
        arrays = (param.grad, param.data, self.state['m'], self.state['delta'])
        self._update_by_numpy(arrays, *self._hyperparameters(param.dtype))


def norm_of(array) -> float:
    """Returns || array ||, a float32 array, with the same bits everywhere: BLAS adds in an order
    that depends on the processor."""
    return math.sqrt(math.fsum(np.square(array, dtype=np.float64).ravel().tolist()))


class LarsRule(OutsideMomentumRule):
    """LARS (You, Gitman, Ginsburg, arXiv:1708.03888), for weights; others have momentum SGD::

        lambda  = trust * ||theta|| / (||grad|| + weight_decay * ||theta||)
        v_t     = mu1 * v_{t-1} + eta * lambda * (grad + weight_decay * theta)
        theta_t = theta_{t-1} - v_t

    v is ``-state['delta']``. For gamma, beta and biases lambda is 1: a gamma that starts at 0 would
    stay 0.
    """

    def _update_by_numpy(
        self, arrays, lr, alpha_sgd, alpha_rmsprop, mu1, mu2, one_minus_mu2, eps, weight_decay_rate
    ):
        grad, p, _, delta = arrays
        local = 1.0
        if p.ndim > 1:
            norm = norm_of(p)
            decayed = norm_of(grad) + weight_decay_rate * norm
            local = LARS_TRUST * norm / decayed if decayed > 0 else 1.0
        delta *= np.float32(mu1)
        delta -= np.float32(lr * local) * (grad + np.float32(weight_decay_rate) * p)
        p += delta


class OutsideMomentum(extensions.RMSpropWarmup):
    def create_update_rule(self):
        return OutsideMomentumRule(self.hyperparam)


class Lars(extensions.RMSpropWarmup):
    def create_update_rule(self):
        return LarsRule(self.hyperparam)


class AbruptTransition(extensions.AlphaSGDSchedule):
    """RMSprop alone until beta_center, then SGD alone."""

    def _set(self, optimizer, epoch):
        optimizer.alpha_sgd = 0.0 if epoch < self._transition[0] else 1.0
        optimizer.alpha_rmsprop = schedules.alpha_rmsprop(
            optimizer.alpha_sgd, optimizer.lr, self._lr_rmsprop
        )


class _KeepsAll(exact_mpi.HalfPrecisionMpiCommunicator):
    """Of one process: keeps the rounded gradient of each worker until the mean."""

    def _add_to_ring(self):
        self._kept.append(self._wire)
        self._wire = None

    def _ring_mean(self, n_added):
        kept, self._kept = self._kept, []
        with np.errstate(over='ignore', invalid='ignore'):
            return self._mean(kept)


class TreeSum(_KeepsAll):
    @staticmethod
    def _mean(kept):
        return tree_mean(kept)


class DivideFirst(_KeepsAll):
    @staticmethod
    def _mean(kept):
        return mean_divided_first(kept)


def tree_mean(gradients: list) -> np.ndarray:
    """Adds float16 gradients in pairs, then pairs of pairs, as a tree; divides in float16.

    Each addition rounds to float16.
    """
    n = len(gradients)
    while len(gradients) > 1:
        pairs = zip(gradients[::2], gradients[1::2])
        left_over = gradients[len(gradients) & ~1 :]
        gradients = [a + b for a, b in pairs] + left_over
    return gradients[0] / np.float16(n)


def mean_divided_first(gradients: list) -> np.ndarray:
    """Divides each float16 gradient by their number in float16, then adds one after the other.

    PyTorch's hook fp16_compress divides so since 1.10.
    """
    n = np.float16(len(gradients))
    total = gradients[0] / n
    for gradient in gradients[1:]:
        total += gradient / n
    return total


# What takes the place, and the places: a module, and a name in it.
_PARTS: dict[str, tuple[type, list[tuple[str, str]]]] = {
    'outside': (OutsideMomentum, [('extensions', 'RMSpropWarmup')]),
    'lars': (Lars, [('extensions', 'RMSpropWarmup')]),
    'abrupt': (AbruptTransition, [('extensions', 'AlphaSGDSchedule')]),
    'tree': (TreeSum, [('extensions.half_precision', 'HalfPrecisionMpiCommunicator')]),
    'divide-first': (DivideFirst, [('extensions.half_precision', 'HalfPrecisionMpiCommunicator')]),
    'resnet10': (
        ResNet10,
        [
            ('reproduce.train', 'ResNet50'),
            ('reproduce.job.preflight', 'ResNet50'),
            ('reproduce.job.evaluation', 'ResNet50'),
        ],
    ),
}
NAMES = tuple(_PARTS)


@contextlib.contextmanager
def put(name: str):
    """Makes trainings in this process use a part. A context manager.

    Args:
        name (str): One of ``NAMES``, or ``''`` for nothing. The sums need the setting
            ``accumulate='ring'``.
    """
    if not name:
        yield
        return
    replacement, places = _PARTS[name]
    originals = [
        getattr(importlib.import_module(module), attribute) for module, attribute in places
    ]
    for module, attribute in places:
        setattr(sys.modules[module], attribute, replacement)
    try:
        yield
    finally:
        for (module, attribute), original in zip(places, originals):
            setattr(sys.modules[module], attribute, original)
