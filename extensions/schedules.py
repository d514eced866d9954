"""The paper's schedules: the transition from RMSprop to SGD, and the slow-start learning rate."""

from __future__ import annotations

import numpy as np
from chainer import reporter, training
from chainer.training import extension

PAPER_EPOCHS = 90

# (until epoch, factor)
_SLOW_START = ((40, 0.5), (70, 0.075), (85, 0.01), (float('inf'), 0.001))

FORMS = ('printed', 'continuous')


def alpha_sgd(epoch, beta_center=10.0, beta_period=5.0, form='printed'):
    """Weight of the SGD term during the transition (S).

    Let u = 2 (epoch - beta_center) / beta_period. ``form='printed'`` is the formula that the paper
    prints::

        [W5]  alpha_SGD = 1/2 exp(u)    epoch < beta_center
                         1/2 + u       epoch < beta_center + beta_period / 2
                         1             otherwise

    The printed linear branch passes 1 at epoch 11.25. It reaches 1.5 just before epoch 12.5, then
    drops to 1. Yet the paper's text says that the curve was chosen after the ELU, to be smooth.
    ``form='continuous'`` has 1/2 + u/2 in this branch. The result is exactly (ELU(u) + 1) / 2. Its
    value and its derivative are continuous at ``beta_center``, and it reaches 1 at
    ``beta_center + beta_period / 2``. The printed formula is the default, because readers of the
    paper expect it.

    Args:
        epoch (float or array): Fractional epochs, in the paper's 90.
        beta_center (float): Epoch at which alpha_SGD is 1/2; 10 (S).
        beta_period (float): Length of the transition in epochs; 5 (S).
        form (str): ``'printed'`` or ``'continuous'``.

    Returns:
        float, or float64 array with the shape of ``epoch``.

    Raises:
        ValueError: ``form`` is unknown, or ``beta_period`` is not above 0.
    """
    if form not in FORMS:
        raise ValueError(f'form must be one of {", ".join(map(repr, FORMS))}, not {form!r}')
    if not beta_period > 0:
        raise ValueError(f'beta_period must be above 0, not {beta_period}')
    u = 2 * (np.asarray(epoch, np.float64) - beta_center) / beta_period
    exponential = np.exp(np.minimum(u, 0)) / 2
    linear = 0.5 + (u if form == 'printed' else u / 2)
    alpha = np.where(u < 0, exponential, np.where(u < 1, linear, 1.0))  # [W5]
    return alpha if alpha.ndim else float(alpha)


def alpha_rmsprop(alpha_sgd, lr, lr_rmsprop=3e-4):
    """Weight of the RMSprop term for a given ``alpha_sgd`` (R)::

        [W4]  alpha_RMSprop = max(0, 1 - alpha_SGD) * eta_RMSprop / eta

    The division by eta gives the RMSprop term's step the size eta_RMSprop for every eta. The
    printed form of alpha_SGD exceeds 1; the floor at 0 keeps the RMSprop term from becoming ascent.

    Args:
        alpha_sgd (float or array): From :func:`alpha_sgd`.
        lr (float or array): eta, the current learning rate.
        lr_rmsprop (float): eta_RMSprop; 3e-4 (R).

    Returns:
        float, or float64 array.

    Raises:
        ValueError: ``lr`` is not above 0.
    """
    if not np.all(np.asarray(lr) > 0):
        raise ValueError(f'lr must be above 0, not {lr}')
    alpha = np.maximum(0.0, 1 - np.asarray(alpha_sgd, np.float64)) * lr_rmsprop / lr  # [W4]
    return alpha if np.ndim(alpha) else float(alpha)


def base_learning_rate(total_batch_size):
    """eta_base (S, G): 0.1 per 256 images of the total batch.

    The total batch is n workers times b_local images. The paper's 32,768 images give 12.8.

    Args:
        total_batch_size (int): B, the images of all workers in one iteration.

    Returns:
        float.
    """
    return 0.1 * total_batch_size / 256


def slow_start_factor(epoch):
    """eta / eta_base at a fractional epoch of the paper's 90 (S)::

        [L]  0.5    epochs  0-40        0.01   epochs 70-85
             0.075  epochs 40-70        0.001  epochs 85-90

    No gradual warm-up is added.

    Args:
        epoch (float or array): Fractional epochs, in the paper's 90.

    Returns:
        float, or float64 array with the shape of ``epoch``.
    """
    ends, factors = zip(*_SLOW_START)
    factor = np.asarray(factors)[np.searchsorted(ends[:-1], epoch, side='right')]  # [L]
    return factor if np.ndim(factor) else float(factor)


def learning_rate(epoch, total_batch_size):
    """eta at a fractional epoch of the paper's 90 (S).

    eta is :func:`base_learning_rate` times :func:`slow_start_factor`.

    Args:
        epoch (float or array): Fractional epochs, in the paper's 90.
        total_batch_size (int): B, the images of all workers in one iteration.

    Returns:
        float, or float64 array with the shape of ``epoch``.
    """
    return base_learning_rate(total_batch_size) * slow_start_factor(epoch)


class _Schedule(training.Extension):
    """Sets hyper-parameters from the fractional epoch at the start of each update.

    Chainer runs extensions after an update. So ``initialize`` sets the values for the first update,
    also after a resume, and each call sets the values for the next update. The priority is low, so
    that observers first read the values of the previous update. An optimizer hook reports these
    values from inside the update.
    """

    trigger = (1, 'iteration')
    names: tuple[str, ...] = ()

    def __init__(self, total_batch_size, n_images, epochs=PAPER_EPOCHS, optimizer=None):
        if not (total_batch_size > 0 and n_images > 0 and epochs > 0):
            raise ValueError(
                'total_batch_size, n_images and epochs must be above 0, not '
                f'{total_batch_size}, {n_images} and {epochs}'
            )
        self._total_batch_size = total_batch_size
        self._n_images = n_images
        self._epochs = epochs
        self._optimizer = optimizer

    def initialize(self, trainer):
        self._reporting = self._optimizer_of(trainer)
        self._reporting.add_hook(self._report, self._hook_name, timing='post')
        self(trainer)

    def finalize(self):
        self._reporting.remove_hook(self._hook_name)

    def __call__(self, trainer):
        self._set(self._optimizer_of(trainer), self.paper_epoch(trainer.updater.iteration))

    def paper_epoch(self, iteration) -> float:
        """Epoch, of the paper's 90, after ``iteration`` updates: the start of the next update."""
        images = iteration * self._total_batch_size
        return images * PAPER_EPOCHS / (self._n_images * self._epochs)

    @property
    def _hook_name(self):
        return f'{self.default_name}_report'

    def _optimizer_of(self, trainer):
        return self._optimizer or trainer.updater.get_optimizer('main')

    def _report(self, optimizer):
        reporter.report({name: getattr(optimizer, name) for name in self.names})

    def _set(self, optimizer, epoch):
        raise NotImplementedError


class StepLearningRate(_Schedule):
    """Sets ``lr``, by default to the paper's slow start, :func:`learning_rate`.

    The epoch is fractional: completed updates x total batch / images, at the start of the update.
    The iterator's own epoch is not used. A run of E epochs maps its epoch e to 90 e / E. Each
    update reports the ``lr`` that it used.

    Args:
        total_batch_size (int): B, the images of all workers in one iteration.
        n_images (int): Images in the training set.
        epochs (float): E, the epochs of this run; 90 (S).
        optimizer (~chainer.Optimizer): By default, the updater's main optimizer.
        schedule (callable): ``schedule(epoch, total_batch_size)`` returns eta; the epoch is one of
            the paper's 90.

    Raises:
        ValueError: ``total_batch_size``, ``n_images`` or ``epochs`` is not above 0.
    """

    priority = extension.PRIORITY_READER - 50
    names = ('lr',)

    def __init__(
        self,
        total_batch_size,
        n_images,
        epochs=PAPER_EPOCHS,
        optimizer=None,
        schedule=learning_rate,
    ):
        super().__init__(total_batch_size, n_images, epochs, optimizer)
        self._schedule = schedule

    def _set(self, optimizer, epoch):
        optimizer.lr = self._schedule(epoch, self._total_batch_size)


class AlphaSGDSchedule(_Schedule):
    """The transition: sets ``alpha_sgd``, and the ``alpha_rmsprop`` for it and the current ``lr``.

    It runs after :class:`StepLearningRate`, even if it was added first. Each update reports the
    ``alpha_sgd`` and ``alpha_rmsprop`` that it used.

    Args:
        total_batch_size, n_images, epochs, optimizer: As in :class:`StepLearningRate`.
        beta_center, beta_period (float), form (str): As in :func:`alpha_sgd`.
        lr_rmsprop (float): As in :func:`alpha_rmsprop`.

    Raises:
        ValueError: As in :class:`StepLearningRate`.
        ValueError: ``beta_period`` is not above 0.
        ValueError: ``form`` is unknown.
        ValueError: ``lr`` is not above 0. Raised when values are set.
    """

    priority = StepLearningRate.priority - 1
    names = ('alpha_sgd', 'alpha_rmsprop')

    def __init__(
        self,
        total_batch_size,
        n_images,
        epochs=PAPER_EPOCHS,
        optimizer=None,
        beta_center=10.0,
        beta_period=5.0,
        form='printed',
        lr_rmsprop=3e-4,
    ):
        super().__init__(total_batch_size, n_images, epochs, optimizer)
        alpha_sgd(0.0, beta_center, beta_period, form)  # fail early on a bad schedule
        self._transition = (beta_center, beta_period, form)
        self._lr_rmsprop = lr_rmsprop

    def _set(self, optimizer, epoch):
        optimizer.alpha_sgd = alpha_sgd(epoch, *self._transition)
        optimizer.alpha_rmsprop = alpha_rmsprop(optimizer.alpha_sgd, optimizer.lr, self._lr_rmsprop)
