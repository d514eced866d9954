"""The options, checks and errors that the communicators for CPUs and GPUs share."""

from __future__ import annotations

import math
import time
import zlib
from typing import ClassVar

import numpy as np
from mpi4py import MPI

_DTYPES = ('float16', 'float32', 'float64')
ACCUMULATE = ('exact', 'ring')

# What a rank does in a collective, for the messages.
AVERAGES = 'averages gradients'
BROADCASTS = 'broadcasts parameters'


class CommunicatorError(Exception):
    """The requested communicator cannot work here. The message gives the reason and a remedy."""


class NonFiniteGradients(ArithmeticError):
    """The mean gradient has infinite or NaN elements. The message names parameters and ranks.

    Attributes:
        agreed (bool): All ranks raise the error together, so no rank waits for another.
    """

    agreed = True


def wire_dtype(dtype) -> np.dtype:
    # numpy.dtype(None) would be float64.
    try:
        name = None if dtype is None else np.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in _DTYPES:
        raise CommunicatorError(
            f'allreduce_grad_dtype must be one of {", ".join(_DTYPES)}, not {name}'
        )
    return np.dtype(name)


def checked_accumulate(accumulate) -> str:
    if accumulate not in ACCUMULATE:
        raise CommunicatorError(
            f'accumulate must be one of {", ".join(ACCUMULATE)}, not {accumulate!r}'
        )
    return accumulate


def power_of_two(scale) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise CommunicatorError(f'gradient_scale must be a number, not {scale!r}')
    if math.frexp(scale)[0] != 0.5 or not 2.0**-40 <= scale <= 2.0**40:
        raise CommunicatorError(
            f'gradient_scale must be a power of two from 2**-40 to 2**40, not {scale}'
        )
    return float(scale)


class CommunicatorOptions:
    """Options of one communicator: checked when set, and passed on by :meth:`split`."""

    checks: ClassVar[dict] = {
        'allreduce_grad_dtype': wire_dtype,
        'gradient_scale': power_of_two,
        'stop_on_nonfinite': bool,
    }

    def __init__(
        self,
        mpi_comm,
        allreduce_grad_dtype='float16',
        *,
        gradient_scale=1.0,
        stop_on_nonfinite=True,
        reason='asked for',
    ):
        super().__init__(mpi_comm)
        self.set_config('allreduce_grad_dtype', allreduce_grad_dtype)
        self.set_config('gradient_scale', gradient_scale)
        self.set_config('stop_on_nonfinite', stop_on_nonfinite)
        self.reason = reason

    def set_config(self, name, value=True, **kwargs):
        if name in self.checks:
            setattr(self, name, self.checks[name](value))
        else:
            super().set_config(name, value, **kwargs)

    def get_config(self, name=None):
        return getattr(self, name) if name in self.checks else super().get_config(name)

    def split(self, color, key):
        options = {name: getattr(self, name) for name in self.checks}
        return type(self)(self.mpi_comm.Split(color, key), **options, reason=self.reason)

    def agree(self, action, layout, n_workers=1, error=None):
        """Raises on every rank if an error on one rank would leave the others waiting. Collective.

        It comes before every other message, so that ranks which do different things meet in it.

        Args:
            action (str): What the rank does next.
            layout (list of tuples): Name, shape and so on of each parameter that it does this with.
            n_workers (int): Number of workers whose gradients it has added.
            error (Exception): What is wrong on this rank; None if nothing is.

        Raises:
            ValueError: A rank has an error, or two ranks differ.
        """
        options = {name: str(getattr(self, name)) for name in self.checks}
        own = (action, layout, n_workers, options)
        digest = zlib.crc32(repr(own).encode())
        extremes = np.array([digest, -digest, error is not None], np.int64)
        self.mpi_comm.Allreduce(MPI.IN_PLACE, extremes, MPI.MAX)
        if extremes[0] == -extremes[1] and not extremes[2]:
            return
        where = f'rank {self.rank} on {MPI.Get_processor_name()}'
        said = error and f'{where}: {error}'
        everyone = self.mpi_comm.allgather((said, own))
        errors = [said for said, _ in everyone if said]
        if errors:
            raise ValueError(first_few(errors, '; ')) from error
        first = everyone[0][1]
        for rank, (_, other) in enumerate(everyone):
            if other != first:
                raise ValueError(f'ranks 0 and {rank} must {_difference(first, other)}')

    def raise_nonfinite(self, names, sent):
        """Raises :class:`NonFiniteGradients`. Collective: all ranks have the same mean.

        Args:
            names (list of str): Parameters whose mean is not finite.
            sent (dict): Maps a parameter to words on the non-finite values that this rank sent.
        """
        origins = {name: [] for name in names}
        where = f'rank {self.rank} on {MPI.Get_processor_name()}'
        for origin, what in self.mpi_comm.allgather((where, sent)):
            for name, words in what.items():
                origins[name].append(f'{words} from {origin}')
        overflow = f'finite on every rank, but the sum overflows {self.allreduce_grad_dtype}'
        culprits = [f'{name} ({first_few(origins[name]) or overflow})' for name in names]
        raise NonFiniteGradients(
            f'the mean gradient is infinite or NaN, and nothing was updated: '
            f'{first_few(culprits, "; ")}. If values overflow {self.allreduce_grad_dtype}, choose '
            f'a gradient_scale below {self.gradient_scale:g}, or a smaller loss scale. If not, '
            'check the learning rate and the images'
        )


def _difference(first, other) -> str:
    """Says what two ranks must have alike, from what :meth:`CommunicatorOptions.agree` gathers."""
    if first[0] != other[0]:
        return f'do the same: one {first[0]}, the other {other[0]}'
    options = [f'{k} ({v} and {other[3][k]})' for k, v in first[3].items() if v != other[3][k]]
    if options:
        return f'have the same options of the communicator: {", ".join(options)}'
    differing = sorted({entry[0] for entry in set(first[1]) ^ set(other[1])})
    return (
        f'have gradients of the same parameters (different: {first_few(differing) or "none"}) and '
        f'the same number of workers ({first[2]} and {other[2]})'
        if first[0] == AVERAGES
        else f'have the same parameters, shapes and dtypes (different: {first_few(differing)})'
    )


def first_few(items, separator=', ', n=3) -> str:
    """Joins the first ``n`` texts, and counts the others: ``a, b, c and 2 more``."""
    more = f' and {len(items) - n} more' if len(items) > n else ''
    return separator.join(items[:n]) + more


def raise_together(mpi_comm, error):
    """Raises on every rank if a rank has an error. Collective: call it on all ranks.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks.
        error (Exception): This rank's error, or None.

    Raises:
        Exception: ``error``, on the ranks that have one.
        RuntimeError: On the others. The message names the first rank with an error, and its error.
    """
    failed = np.array([error is not None], np.int64)
    mpi_comm.Allreduce(MPI.IN_PLACE, failed, MPI.MAX)
    if not failed[0]:
        return
    texts = mpi_comm.allgather(error and f'{type(error).__name__}: {error}')
    if error is not None:
        raise error
    time.sleep(1)  # the first error that is not caught ends all ranks: let it be the rank's own
    rank, text = next(item for item in enumerate(texts) if item[1])
    raise RuntimeError(f'rank {rank} failed: {text}')


def params_with_grad(model, zero_fill):
    return [
        (name, param) for name, param in sorted_params(model) if zero_fill or param.grad is not None
    ]


def sorted_params(model):
    """Returns the names and parameters that have a size, as ChainerMN orders them."""
    return [
        (name, param)
        for name, param in sorted(model.namedparams(), key=lambda item: item[0])
        if param.data is not None
    ]
