"""RMSprop warm-up: an update rule that starts as RMSprop and becomes momentum SGD."""

from __future__ import annotations

import math
import numbers
from pathlib import Path
from typing import Any

import numpy as np
from chainer import optimizer, using_device
from chainer.backends import cuda

from extensions import kernels, rmsprop_warmup_gpu
from extensions.gradients import own_gradients

# Elements per block of the NumPy update. Its four streams and the scratch (5 x 256 KiB in float32)
# stay in a core's second-level cache. At a quarter of this size, calls take 15 % of the time.
_BLOCK = 65536

# One element of the update, compiled by both C and CUDA, and the arguments of the CUDA kernel.
ELEMENT = Path(__file__).with_name('rmsprop_warmup_element.h').read_text()
KERNEL = (
    (
        'T grad, T lr, T alpha_sgd, T alpha_rmsprop, T mu1, T mu2, T one_minus_mu2, T eps, '
        'T weight_decay_rate'
    ),
    'T param, T m, T delta',
    ELEMENT,
    'rmsprop_warmup',
)


def _check_hyperparameters(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
            raise TypeError(f'{name} must be a number, not {value!r}')
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f'{name} must be finite and at least 0, not {value}')
        if name in ('mu1', 'mu2') and value >= 1:
            raise ValueError(f'{name} is a decay rate and must be below 1, not {value}')


_default_hyperparam: Any = optimizer.Hyperparameter()
_default_hyperparam.alpha_sgd = 1.0
_default_hyperparam.alpha_rmsprop = 0.0
_default_hyperparam.mu1 = 0.9
_default_hyperparam.mu2 = 0.99
_default_hyperparam.eps = 1e-8
_default_hyperparam.weight_decay_rate = 0.0


class RMSpropWarmupRule(optimizer.UpdateRule):
    """Update rule of one parameter. :class:`RMSpropWarmup` states the equations.

    Args:
        parent_hyperparam (~chainer.optimizer.Hyperparameter): Supplies every value that is not
            given here.
        lr, alpha_sgd, alpha_rmsprop, mu1, mu2, eps, weight_decay_rate (float): As in
            :class:`RMSpropWarmup`, for this parameter only.

    Attributes:
        state (dict): ``m`` and ``delta``: arrays with the parameter's shape, dtype and device,
            initially 0.

    Raises:
        TypeError, ValueError: As in :class:`RMSpropWarmup`.
    """

    is_elementwise = True

    def __init__(
        self,
        parent_hyperparam=None,
        lr=None,
        alpha_sgd=None,
        alpha_rmsprop=None,
        mu1=None,
        mu2=None,
        eps=None,
        weight_decay_rate=None,
    ):
        super().__init__(parent_hyperparam or _default_hyperparam)
        given = {
            'lr': lr,
            'alpha_sgd': alpha_sgd,
            'alpha_rmsprop': alpha_rmsprop,
            'mu1': mu1,
            'mu2': mu2,
            'eps': eps,
            'weight_decay_rate': weight_decay_rate,
        }
        given = {name: value for name, value in given.items() if value is not None}
        _check_hyperparameters(**given)
        for name, value in given.items():
            setattr(self.hyperparam, name, value)

    def init_state(self, param):
        with using_device(param.device):
            self.state['m'] = param.device.xp.zeros_like(param.data)
            self.state['delta'] = param.device.xp.zeros_like(param.data)

    def _hyperparameters(self, dtype) -> tuple[float, ...]:
        hp = self.hyperparam.get_dict()  # all in one call: a parameter may be small
        eps, mu2 = hp['eps'], hp['mu2']
        if eps != 0 and dtype.type(eps) == 0:
            raise ValueError(
                f'RMSpropWarmup: eps = {eps} rounds to zero in {dtype.name}. Choose a larger eps, '
                'or keep the parameters in float32 (optimizer.use_fp32_update)'
            )
        # Return Python floats: a NumPy scalar would widen float32 arithmetic to float64. The
        # difference 1 - mu2 is rounded once here; computed in float32 for mu2 = 0.99, it would be
        # off by 10 units in the last place.
        alphas = hp['alpha_sgd'], hp['alpha_rmsprop']
        values = (hp['lr'], *alphas, hp['mu1'], mu2, 1 - mu2, eps, hp['weight_decay_rate'])
        return tuple(map(float, values))

    def update_core_cpu(self, param):
        if param.grad is None:
            return
        arrays = (param.grad, param.data, self.state['m'], self.state['delta'])
        hyperparameters = self._hyperparameters(param.dtype)
        if not kernels.rmsprop_warmup(arrays, [hyperparameters]):
            _check_arrays(param.name or 'of this rule', param, self.state)
            self._update_by_numpy(arrays, *hyperparameters)

    def _update_by_numpy(
        self, arrays, lr, alpha_sgd, alpha_rmsprop, mu1, mu2, one_minus_mu2, eps, weight_decay_rate
    ):
        dtype = arrays[1].dtype
        scratch = np.empty(min(_BLOCK, arrays[0].size), dtype)
        # nditer yields blocks of the arrays as 1-d views, for any memory layout.
        blocks = np.nditer(
            arrays,
            flags=['external_loop', 'buffered', 'zerosize_ok'],
            op_flags=[['readonly'], ['readwrite'], ['readwrite'], ['readwrite']],
            op_dtypes=[dtype] * 4,
            casting='same_kind',
            buffersize=_BLOCK,
        )
        with blocks:
            for g, p, m, delta in blocks:
                s = scratch[: len(p)]
                if weight_decay_rate != 0:
                    g = g + weight_decay_rate * p
                np.multiply(g, g, out=s)
                s *= one_minus_mu2
                m *= mu2
                m += s  # [W1]
                if alpha_rmsprop != 0:
                    np.sqrt(m, out=s)
                    s += eps
                    np.divide(alpha_rmsprop, s, out=s)
                    s += alpha_sgd
                    s *= g
                else:
                    np.multiply(g, alpha_sgd, out=s)
                delta *= mu1
                delta -= s  # [W2]
                np.multiply(delta, lr, out=s)
                p += s  # [W3]

    def update_core_gpu(self, param):
        if param.grad is None:
            return
        cuda.elementwise(*KERNEL, options=rmsprop_warmup_gpu.OPTIONS)(
            param.grad,
            *self._hyperparameters(param.dtype),
            param.data,
            self.state['m'],
            self.state['delta'],
        )


class RMSpropWarmup(optimizer.GradientMethod):
    """RMSprop warm-up (S): momentum SGD and RMSprop, mixed inside the momentum.

    The gradient g_t is the average over all workers, plus ``weight_decay_rate`` times theta_{t-1}.
    theta denotes the parameters, and m_0 = Delta_0 = 0::

        [W1]  m_t     = mu2 * m_{t-1} + (1 - mu2) * g_t**2
        [W2]  Delta_t = mu1 * Delta_{t-1} - (alpha_SGD + alpha_RMSprop / (sqrt(m_t) + eps)) * g_t
        [W3]  theta_t = theta_{t-1} + eta * Delta_t

    Both terms are inside Delta, so the RMSprop term also has the momentum's gain of 1 / (1 - mu1).
    eta is outside Delta, so a change of eta acts at once and needs no momentum correction (G,
    remark 2). With alpha_SGD = 1 and alpha_RMSprop = 0, the rule is Chainer's
    :class:`~chainer.optimizers.CorrectedMomentumSGD`.
    :class:`~extensions.schedules.AlphaSGDSchedule` changes the two alphas during training.

    In the code, m is ``state['m']``, Delta is ``state['delta']`` and eta is ``lr``. All arithmetic
    uses the parameter's dtype. With ``use_fp32_update()``, float16 parameters have float32 master
    copies, as everywhere in Chainer.

    Args:
        lr (float): eta. The paper varies it: see :func:`~extensions.schedules.slow_start_factor`.
        alpha_sgd (float): Weight of the momentum SGD term.
        alpha_rmsprop (float): Weight of the RMSprop term.
        mu1 (float): Decay rate of the momentum; 0.9 (R).
        mu2 (float): Decay rate of the mean square; 0.99 (R).
        eps (float): Added to sqrt(m_t), outside the root; 1e-8 (R).
        weight_decay_rate (float): Applies to every parameter whose rule has no rate of its own. It
            has the effect of Chainer's hook :class:`~chainer.optimizer_hooks.WeightDecay`, on CPUs
            with the same bits. Unlike the hook, it needs no extra pass over gradients and
            parameters. ``param.grad`` stays unchanged.

    Raises:
        TypeError: A hyper-parameter is not a number. Booleans are not accepted.
        ValueError: A hyper-parameter is negative or not finite, or ``mu1`` or ``mu2`` is not below
            1.
        ValueError: At an update, and on CPUs before any parameter is changed: ``eps`` rounds to
            zero in the parameter's dtype. A parameter or its state is read-only. The gradient or
            the state has another shape than the parameter.
    """

    def __init__(
        self,
        lr,
        alpha_sgd=1.0,
        alpha_rmsprop=0.0,
        mu1=0.9,
        mu2=0.99,
        eps=1e-8,
        weight_decay_rate=0.0,
    ):
        super().__init__()
        values = {
            'lr': lr,
            'alpha_sgd': alpha_sgd,
            'alpha_rmsprop': alpha_rmsprop,
            'mu1': mu1,
            'mu2': mu2,
            'eps': eps,
            'weight_decay_rate': weight_decay_rate,
        }
        _check_hyperparameters(**values)
        for name, value in values.items():
            setattr(self.hyperparam, name, value)

    lr = optimizer.HyperparameterProxy('lr')
    alpha_sgd = optimizer.HyperparameterProxy('alpha_sgd')
    alpha_rmsprop = optimizer.HyperparameterProxy('alpha_rmsprop')
    mu1 = optimizer.HyperparameterProxy('mu1')
    mu2 = optimizer.HyperparameterProxy('mu2')
    eps = optimizer.HyperparameterProxy('eps')
    weight_decay_rate = optimizer.HyperparameterProxy('weight_decay_rate')

    def create_update_rule(self):
        return RMSpropWarmupRule(self.hyperparam)

    def update(self, lossfun=None, *args, **kwds):
        """Updates all parameters in a single call, on a GPU in a single launch.

        Chainer's :class:`~chainer.GradientMethod` loops over the parameters. For a small parameter,
        the loop takes longer than the arithmetic. The loop runs here only if a rule's hook, a rule
        of another class, a loss scale, float16, several dtypes or devices, a parameter with two
        names, or an array that is not in C order requires it, for the parameters' first update, or
        on CPUs without the C library.

        Args:
            lossfun (callable): As everywhere in Chainer: returns the loss, whose gradients are used
                instead of those that the parameters have.
        """
        if lossfun is not None:
            loss = lossfun(*args, **kwds)
            if getattr(self, '_use_cleargrads', True):  # Chainer's use_cleargrads sets it
                self.target.cleargrads()
            else:
                self.target.zerograds()
            loss.backward(loss_scale=self._loss_scale)
            del loss
        self.reallocate_cleared_grads()
        self.check_nan_in_grads()
        self.call_hooks('pre')
        in_loop = self.is_safe_to_update() and not self._update_at_once()
        if in_loop:
            self._check_all()
        self.t += 1
        if in_loop:
            for param in self.target.params():
                param.update()
        self.reallocate_cleared_grads()
        self.call_hooks('post')
        self.update_loss_scale()

    def reallocate_cleared_grads(self):
        """Calls Chainer's method, which examines every parameter, only if a gradient is missing."""
        if any(param.grad is None for param in self.target.params()):
            super().reallocate_cleared_grads()

    def _update_at_once(self) -> bool:
        arrays: list = []
        values = []
        rules = []
        known: dict = {}  # few rules have their own hyper-parameters
        for param in self.target.params():
            rule = param.update_rule
            if rule is None or not rule.enabled:
                continue
            if not _is_plain(rule, param):
                return False
            arrays += (param.grad, param.array, rule.state['m'], rule.state['delta'])
            own = vars(rule.hyperparam)
            key = (*own, *map(id, own.values()))
            if key not in known:
                known[key] = rule._hyperparameters(param.dtype)
            values.append(known[key])
            rules.append(rule)
        if not _update_all(arrays, values):
            return False
        for rule in rules:
            rule.t += 1
        return True

    def _check_all(self):
        """Raises the errors of all parameters on the CPU before any of them is updated."""
        scaled = []
        for name, param in self.target.namedparams():
            rule = param.update_rule
            if rule is None or not rule.enabled or param.array is None:
                continue
            if param._loss_scale is not None:
                scaled.append(param)
            has_master = rule._use_fp32_update and param.dtype == np.float16
            on_cpu = isinstance(param.array, np.ndarray)
            if isinstance(rule, RMSpropWarmupRule) and on_cpu and not has_master:
                rule._hyperparameters(param.dtype)
                _check_arrays(name, param, rule.state or {})
        own_gradients(scaled)  # Chainer divides each by the loss scale, in place


def _check_arrays(name, param, state):
    """Raises ValueError for arrays on the CPU that cannot be updated together."""
    arrays = {
        f'the parameter {name}': param.array,
        **{f'the state {key!r} of the parameter {name}': value for key, value in state.items()},
    }
    for what, array in arrays.items():
        if array.shape != param.shape:
            raise ValueError(
                f'RMSpropWarmup: {what} has the shape {array.shape}, but the parameter has '
                f'{param.shape}. Load the state of the same model, or call optimizer.setup'
            )
        # A state that has not followed its parameter from a GPU yet is CuPy's: all can be written.
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise ValueError(
                f'RMSpropWarmup: {what} is read-only, as memory-mapped files and buffers are. Set '
                'a copy: array.copy()'
            )
    if param.grad is not None and param.grad.shape != param.shape:
        raise ValueError(
            f'RMSpropWarmup: the gradient of the parameter {name} has the shape '
            f'{param.grad.shape}, but the parameter has {param.shape}'
        )


def _update_all(arrays, values) -> bool:
    if all(isinstance(array, np.ndarray) for array in arrays):
        return kernels.rmsprop_warmup(arrays, values)
    if all(isinstance(array, cuda.ndarray) for array in arrays):
        return rmsprop_warmup_gpu.update(arrays, values)
    return False


def _is_plain(rule, param) -> bool:
    """Whether the rule would only do the update's arithmetic, as in most iterations."""
    hooks = rule._hookable
    return (
        type(rule) is RMSpropWarmupRule
        and not (hooks._pre_update_hooks or hooks._post_update_hooks)
        and rule.state is not None
        and param.dtype != np.float16
        and param._loss_scale is None
    )
