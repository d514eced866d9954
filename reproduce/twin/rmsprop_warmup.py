"""RMSprop warm-up for PyTorch: an optimizer that starts as RMSprop and becomes momentum SGD."""

from __future__ import annotations

import torch


class RMSpropWarmup(torch.optim.Optimizer):
    """The twin of :class:`extensions.rmsprop_warmup.RMSpropWarmup`, which derives the rule::

        m_t     = mu2 m_{t-1} + (1 - mu2) g_t**2                                         [W1]
        Delta_t = mu1 Delta_{t-1} - (alpha_SGD + alpha_RMSprop / (sqrt(m_t) + eps)) g_t  [W2]
        theta_t = theta_{t-1} + eta Delta_t                                              [W3]

    g_t is the mean gradient plus ``weight_decay`` times theta_{t-1}. m is ``state[p]['m']``, Delta
    is ``state[p]['delta']``, eta is ``lr``. ``foreach`` operators pass over all tensors of a group
    at once. Every value may change between steps, by ``param_groups``.

    Args:
        params (iterable): Parameters, or dicts of groups, as everywhere in PyTorch.
        lr, alpha_sgd, alpha_rmsprop, mu1, mu2, eps, weight_decay (float): As there.

    Raises:
        ValueError: A value is negative or not finite, or ``mu1`` or ``mu2`` is not below 1.
    """

    def __init__(
        self,
        params,
        lr,
        alpha_sgd=1.0,
        alpha_rmsprop=0.0,
        mu1=0.9,
        mu2=0.99,
        eps=1e-8,
        weight_decay=0.0,
    ):
        values = {'lr': lr, 'alpha_sgd': alpha_sgd, 'alpha_rmsprop': alpha_rmsprop, 'mu1': mu1}
        values.update(mu2=mu2, eps=eps, weight_decay=weight_decay)
        super().__init__(params, values)
        for group in self.param_groups:
            for name in values:
                most = 1 if name in ('mu1', 'mu2') else float('inf')
                if not 0 <= group[name] < most:
                    raise ValueError(
                        f'{name} must be at least 0 and below {most}, not {group[name]}'
                    )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group['params'] if param.grad is not None]
            if params:
                self._update(params, **{k: v for k, v in group.items() if k != 'params'})
        return loss

    def _update(self, params, lr, alpha_sgd, alpha_rmsprop, mu1, mu2, eps, weight_decay):
        for param in params:
            if not self.state[param]:
                self.state[param].update(m=torch.zeros_like(param), delta=torch.zeros_like(param))
        m, delta = ([self.state[param][name] for param in params] for name in ('m', 'delta'))
        g = [param.grad for param in params]
        if weight_decay != 0:
            g = torch._foreach_add(g, params, alpha=weight_decay)
        torch._foreach_mul_(m, mu2)
        torch._foreach_addcmul_(m, g, g, value=1 - mu2)  # [W1]
        torch._foreach_mul_(delta, mu1)
        torch._foreach_add_(delta, g, alpha=-alpha_sgd)
        if alpha_rmsprop != 0:
            root = torch._foreach_sqrt(m)
            torch._foreach_add_(root, eps)
            torch._foreach_addcdiv_(delta, g, root, value=-alpha_rmsprop)  # [W2]
        torch._foreach_add_(params, delta, alpha=lr)  # [W3]
