"""The paper's schedules: the transition from RMSprop to SGD, and the slow-start learning rate."""

from __future__ import annotations

import numpy as np
from chainer import reporter, training

PAPER_EPOCHS = 90

# (until epoch, factor)
_SLOW_START = ((40, 0.5), (70, 0.075), (85, 0.01), (float('inf'), 0.001))

FORMS = ('printed', 'continuous')

# Below that of Chainer's snapshot, -100: an extension is initialized after those above it, and so
# after a snapshot that is loaded automatically.
_PRIORITY = -150


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
        ValueError: ``lr`` is not above 0 where ``alpha_sgd`` is below 1.
    """
    share = np.maximum(0.0, 1 - np.asarray(alpha_sgd, np.float64))
    # From the end of the transition on, a schedule may let lr fall to 0.
    lr = np.where((share == 0) & (np.asarray(lr) == 0), 1.0, lr)
    if not np.all(lr > 0):
        raise ValueError(f'lr must be above 0, not {lr}')
    alpha = share * lr_rmsprop / lr  # [W4]
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

    A hook of the optimizer sets and reports the values inside the update. So they fit the iteration
    after every way of resuming, wherever in the order of the extensions it comes. Between the
    updates, ``initialize`` and each call set the values of the next update, for those who read
    them there. The priority is low, so that observers first read the values of the last update.
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
        self._trainer = None
        if optimizer is not None:
            self._check(optimizer)

    def initialize(self, trainer):
        self(trainer)

    def finalize(self):
        if self._trainer is not None and self._hook_of(self._target) == self._before_update:
            self._target.remove_hook(self._hook_name)
        self._trainer = None

    def __call__(self, trainer):
        self._trainer = trainer
        optimizer = self._target
        self._check(optimizer)
        hook = self._hook_of(optimizer)
        if hook != self._before_update:  # the first time, or optimizer.setup() discarded it
            if hook is not None:
                other = hook.__self__
                if other._trainer is trainer:
                    raise ValueError(
                        f'{other.name} and {self.name} both set {" and ".join(self.names)} of one '
                        'optimizer: extend the trainer by one of them'
                    )
                optimizer.remove_hook(self._hook_name)  # of a trainer that never ran
            optimizer.add_hook(self._before_update, self._hook_name, timing='pre')
        self._set(optimizer, self.paper_epoch(trainer.updater.iteration))

    def paper_epoch(self, iteration) -> float:
        """Epoch, of the paper's 90, after ``iteration`` updates: the start of the next update."""
        images = iteration * self._total_batch_size
        return images * PAPER_EPOCHS / (self._n_images * self._epochs)

    @property
    def _hook_name(self):
        return f'schedule of {" and ".join(self.names)}'

    @property
    def _target(self):
        if self._optimizer is not None:
            return _actual(self._optimizer)
        try:
            return _actual(self._trainer.updater.get_optimizer('main'))
        except KeyError:
            raise ValueError(
                f'{self.name}: the updater has no optimizer named main: give the schedule its '
                'optimizer'
            ) from None

    def _check(self, optimizer):
        """Raises ValueError if the optimizer would ignore the values."""
        held = getattr(optimizer, 'hyperparam', optimizer)
        lacking = [name for name in self.names if not hasattr(held, name)]
        if lacking:
            raise ValueError(
                f'{type(self).__name__} sets {" and ".join(lacking)}, which '
                f'{type(_actual(optimizer)).__name__} does not have'
            )

    def _hook_of(self, optimizer):
        hooks = optimizer._hookable._pre_update_hooks if optimizer._hookable else {}
        return hooks.get(self._hook_name)

    def _before_update(self, optimizer):
        # A hook that is left, as after another extension's initialize failed, does nothing.
        if self._trainer is not None and _is_running(self._trainer):
            self._set(optimizer, self.paper_epoch(self._trainer.updater.iteration))
            prefix = self._prefix(optimizer)
            reporter.report({prefix + name: getattr(optimizer, name) for name in self.names})

    def _prefix(self, optimizer):
        """Returns what tells the values of another than the main optimizer apart."""
        for name, other in self._trainer.updater.get_all_optimizers().items():
            if _actual(other) is optimizer:
                return '' if name == 'main' else f'{name}/'
        return f'{self.name}/'

    def _set(self, optimizer, epoch):
        raise NotImplementedError


def _is_running(trainer) -> bool:
    try:
        return reporter.get_current_reporter() is trainer.reporter
    except IndexError:  # no reporter
        return False


def _actual(optimizer):
    """Returns the optimizer inside ChainerMN's multi-node optimizer, which shares its hooks."""
    return getattr(optimizer, 'actual_optimizer', optimizer)


class StepLearningRate(_Schedule):
    """Sets ``lr``, by default to the paper's slow start, :func:`learning_rate`.

    The epoch is fractional: completed updates x total batch / images, at the start of the update.
    The completed updates are the updater's ``iteration``, from wherever it was loaded. The
    iterator's own epoch is not used. A run of E epochs maps its epoch e to 90 e / E. Each update
    reports the ``lr`` that it used. For an optimizer other than the updater's main one, the
    optimizer's name comes before it, as in ``generator/lr``.

    Args:
        total_batch_size (int): B, the images of all workers in one iteration.
        n_images (int): Images in the training set.
        epochs (float): E, the epochs of this run; 90 (S).
        optimizer (~chainer.Optimizer): By default, the updater's main optimizer.
        schedule (callable): ``schedule(epoch, total_batch_size)`` returns eta; the epoch is one of
            the paper's 90.

    Raises:
        ValueError: ``total_batch_size``, ``n_images`` or ``epochs`` is not above 0.
        ValueError: Here or, for the main optimizer, before the first update: the optimizer has no
            hyper-parameter ``lr``, as Adam.
        ValueError: Before the first update: another schedule sets ``lr`` of the same optimizer.
    """

    priority = _PRIORITY
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
    ``alpha_sgd`` and ``alpha_rmsprop`` that it used, named as in :class:`StepLearningRate`. The
    optimizer is an :class:`~extensions.RMSpropWarmup`: others have no alphas and are refused.

    Args:
        total_batch_size, n_images, epochs, optimizer: As in :class:`StepLearningRate`.
        beta_center, beta_period (float), form (str): As in :func:`alpha_sgd`.
        lr_rmsprop (float): As in :func:`alpha_rmsprop`.

    Raises:
        ValueError: As in :class:`StepLearningRate`, for ``alpha_sgd`` and ``alpha_rmsprop``.
        ValueError: ``beta_period`` is not above 0.
        ValueError: ``form`` is unknown.
        ValueError: ``lr`` is not above 0 before the transition ends. Raised when values are set.
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
