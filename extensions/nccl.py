"""The float16 all-reduce for GPUs over NCCL, and the assignment of GPUs to ranks."""

from __future__ import annotations

import contextlib
import dataclasses

import chainer
import chainermn
import numpy as np
from chainer.backends import cuda
from chainermn.communicators import pure_nccl_communicator
from mpi4py import MPI

from extensions import cupy_compatibility
from extensions.communicator_base import (
    AVERAGES,
    BROADCASTS,
    CommunicatorError,
    CommunicatorOptions,
    params_with_grad,
    sorted_params,
)
from extensions.gradients import joined_gradients, own_gradients, parts_of
from extensions.timing import TimedSteps

cupy_compatibility.mend_kernels()


class HalfPrecisionNcclCommunicator(
    CommunicatorOptions, TimedSteps, pure_nccl_communicator.PureNcclCommunicator
):
    """ChainerMN's ``pure_nccl`` (S), with a scale for the gradients and a check of their mean.

    ChainerMN packs the gradients into one buffer of the wire's dtype, and NCCL sums the buffers of
    all ranks. ChainerMN then divides the sum in the wire's dtype and unpacks it. All of this runs
    on the null stream. The check reads one number from the device in every iteration. Losses from
    rounding are not counted here. Before each call of NCCL, the ranks compare what they are about
    to do over MPI, in one message, because NCCL hangs if they differ.

    ChainerMN's double buffering all-reduces on another stream, while the next iteration runs. This
    leaves no place for the scale and the check: it needs ``gradient_scale=1`` and
    ``stop_on_nonfinite=False``.

    Args:
        mpi_comm (mpi4py.MPI.Comm): The ranks. Each rank's current device is its GPU.
        allreduce_grad_dtype, gradient_scale, stop_on_nonfinite: See :func:`create_communicator`.
    """

    def __init__(self, mpi_comm, allreduce_grad_dtype='float16', **options):
        super().__init__(mpi_comm, allreduce_grad_dtype, **options)
        # One kernel packs all parameters, as in ChainerMN's create_communicator.
        self.set_config('batched_copy', True)

    def bcast_data(self, model):
        """Gives every rank the parameters of rank 0, in arrays of any memory layout.

        Raises:
            ValueError: On every rank: the ranks have parameters of different names, shapes or
                dtypes.
        """
        params = sorted_params(model)
        self.agree(BROADCASTS, [(name, param.shape, param.dtype.str) for name, param in params])
        with _in_c_order(params):
            super().bcast_data(model)

    def multi_node_mean_grad(self, model, zero_fill=False):
        """Replaces the model's gradients by their mean over the ranks.

        Args:
            model (~chainer.Link): All ranks must have the same parameters.
            zero_fill (bool): Whether a missing gradient counts as zeros. If not, its parameter is
                skipped; the gradient must then be missing on all ranks.

        Raises:
            ValueError: On every rank: two ranks have gradients of different parameters or shapes.
            NonFiniteGradients: On every rank: the mean is infinite or NaN.
        """
        params, every, scaled, error = [], [], [], None
        try:
            params = params_with_grad(model, zero_fill)
            every, scaled = self._scaled_gradients(params)
        except Exception as its_error:  # noqa: BLE001  (raised on every rank)
            error = its_error
        self.agree(AVERAGES, [(name, param.shape) for name, param in params], error=error)
        if not any(param.size for param in every):
            return  # CUDA has no kernel of no element
        super().multi_node_mean_grad(model, zero_fill)
        if self.gradient_scale != 1:
            for gradients in scaled:
                gradients *= gradients.dtype.type(1 / self.gradient_scale)
            for param in every:
                if param.grad.dtype != param.dtype:
                    param.grad = param.grad.astype(param.dtype)
        if self.stop_on_nonfinite:
            self._check_mean(params)

    def _scaled_gradients(self, params):
        """Gives each parameter a gradient of its own, multiplied by the scale.

        Returns:
            tuple: Each parameter once, and the arrays whose parts are the gradients; without a
                scale, there are none.
        """
        every = list({id(param): param for _, param in params}.values())  # one may have two names
        for param in every:
            if param.grad is None:
                with chainer.using_device(param.device):
                    param.grad = param.device.xp.zeros_like(param.array)
        if self.gradient_scale == 1:
            own_gradients(every)
            return every, []
        return every, _multiplied(every, self.gradient_scale)

    def _multi_node_mean_grad_async(self, model, zero_fill, stream):
        if stream != cuda.Stream.null:  # double buffering
            if self.gradient_scale != 1 or self.stop_on_nonfinite:
                raise CommunicatorError(
                    'double buffering leaves no place for the gradient scale and for the check of '
                    'the mean: choose gradient_scale=1 and stop_on_nonfinite=False, or '
                    'double_buffering=False'
                )
            layout = [(name, param.shape) for name, param in params_with_grad(model, zero_fill)]
            self.agree(AVERAGES, layout)
        super()._multi_node_mean_grad_async(model, zero_fill, stream)

    def _check_mean(self, params):
        sent, mean = (
            buffer.array(sum(param.size for _, param in params), dtype=self.allreduce_grad_dtype)
            for buffer in (self.gpu_buffer_a, self.gpu_buffer_b)
        )
        xp = chainer.backend.get_array_module(mean)
        if xp.isfinite(mean).all():
            return
        names, own, start = [], {}, 0
        for name, param in params:
            part = slice(start, start + param.size)
            start = part.stop
            if not xp.isfinite(mean[part]).all():
                names.append(name)
                n_inf, n_nan = int(xp.isinf(sent[part]).sum()), int(xp.isnan(sent[part]).sum())
                if n_inf or n_nan:
                    own[name] = f'{n_inf} inf and {n_nan} NaN'
        self.raise_nonfinite(names, own)


def _multiplied(params, factor):
    """Makes the gradients parts of few arrays, multiplied in float32 or float64, which it returns.

    One array for each dtype takes one kernel, where each gradient would take one.
    """
    groups: dict = {}
    for param in params:
        groups.setdefault(np.promote_types(param.grad.dtype, np.float32), []).append(param)
    arrays = []
    for dtype, group in groups.items():
        with chainer.using_device(group[0].device):
            array = joined_gradients(group).astype(dtype, copy=False)
            array *= dtype.type(factor)
        for param, part in zip(group, parts_of(array, group)):
            param._set_grad_without_check(part)  # the setter refuses another dtype
        arrays.append(array)
    return arrays


@contextlib.contextmanager
def _in_c_order(params):
    """Replaces arrays in another memory layout by copies, and writes these back at the end.

    ChainerMN copies a parameter's memory as it lies.
    """
    replaced = {}
    for _, param in params:
        if not param.array.flags.c_contiguous:
            replaced[id(param)] = param, param.array
            param.array = param.device.xp.ascontiguousarray(param.array)
    yield
    for param, array in replaced.values():
        array[...] = param.array
        param.array = array


def device_of(comm):
    """Returns the rank's device: the current GPU with ``pure_nccl``, the CPU with the others.

    Returns:
        ~chainer.backend.Device: The device of the communicator's gradients.
    """
    if not hasattr(comm, 'nccl_comm'):
        return chainer.get_device('@numpy')
    return chainer.get_device(f'@cupy:{cuda.cupy.cuda.runtime.getDevice()}')


@dataclasses.dataclass(frozen=True)
class Gpus:
    """The GPUs and the NCCL that one rank sees.

    Attributes:
        rank (int): Rank in the communicator.
        host (str): Name of the host, as MPI reports it.
        bus_ids (tuple of str): PCI bus of each GPU that the rank can use; empty without a GPU.
        nccl (int): Version number of the NCCL that is loaded, such as 2708 or 22304; 0 without.
        obstacle (str): Why the rank sees no GPU; None if it sees one.
        is_expected (bool): Whether the rank has a GPU or CuPy, which its user does not hide. To
            train on CPUs would then be a surprise.
    """

    rank: int
    host: str
    bus_ids: tuple = ()
    nccl: int = 0
    obstacle: str | None = None
    is_expected: bool = True

    def __str__(self):
        return f'rank {self.rank} on {self.host}'

    @property
    def nccl_version(self):
        """The version as text: 22304 is 2.23.4, and 2708 is 2.7.8; - without NCCL."""
        return _text(self.nccl)


def _text(number: int) -> str:
    if not number:
        return '-'
    major = 10000 if number >= 10000 else 1000
    return f'{number // major}.{number % major // 100}.{number % 100}'


def version() -> str:
    """Returns the version of the NCCL that this process has loaded, as text; - without one."""
    return _text(chainermn.nccl.get_version() if chainermn.nccl._available else 0)


_NO_NCCL = 'has a GPU, but no NCCL for CuPy'


def inspect(rank: int) -> Gpus:
    """Returns the GPUs that this rank sees. Never fails: the result states the obstacle."""
    host = MPI.Get_processor_name()
    if cupy_compatibility.hidden():
        obstacle = f'sees no GPU ({cupy_compatibility.hidden()} hides all)'
        return Gpus(rank, host, obstacle=obstacle, is_expected=False)
    if not cuda.available:
        return Gpus(rank, host, obstacle=_why_no_cupy(), is_expected=_has_gpu_or_cupy())
    runtime = cuda.cupy.cuda.runtime
    try:
        n_gpus = runtime.getDeviceCount()
        bus_ids = tuple(runtime.deviceGetPCIBusId(i) for i in range(n_gpus))
    except runtime.CUDARuntimeError as error:
        return Gpus(rank, host, obstacle=f'sees no GPU ({error})')
    if not bus_ids:
        return Gpus(rank, host, obstacle='sees no GPU')
    nccl = chainermn.nccl.get_version() if chainermn.nccl._available else 0
    return Gpus(rank, host, bus_ids, nccl)


def _has_gpu_or_cupy() -> bool:
    return cupy_compatibility.count_gpus() > 0 or cupy_compatibility.has_cupy()


def _why_no_cupy() -> str:
    if cupy_compatibility.has_cupy():
        reason = ' '.join(str(getattr(cuda, '_resolution_error', '')).split())
        return f'has a CuPy that fails: {reason}'
    if cupy_compatibility.count_gpus():
        return 'has a GPU, but no CuPy: start with EXTRAS=gpu ./run_mpi.sh, which installs it'
    return 'has no GPU and no CuPy'


def choose(name: str, everyone: list[Gpus]) -> tuple[str, str]:
    """Chooses between ``pure_nccl`` and ``mpi`` for all ranks.

    Every rank makes the same choice, since the choice depends on the GPUs of all ranks.

    Args:
        name (str): ``'auto'`` or ``'pure_nccl'``.
        everyone (list of Gpus): The GPUs of all ranks.

    Returns:
        tuple: The communicator's name, and the reason in words.

    Raises:
        CommunicatorError: In one of these cases:
            ``name`` is ``pure_nccl``, and a rank has no GPU or no NCCL.
            ``name`` is ``auto``, and only some ranks have both.
            ``name`` is ``auto``, and a rank has a GPU or CuPy, but cannot use it.
            NCCL is too old, or its version differs between ranks.
    """
    lacking = [s for s in everyone if s.obstacle or not s.nccl]
    why = ''
    if lacking:
        why = f'{lacking[0]} {lacking[0].obstacle or _NO_NCCL}'
    if lacking and name == 'pure_nccl':
        raise CommunicatorError(
            f'the communicator pure_nccl needs a GPU and NCCL on every rank: {why}. '
            'On CPUs choose the communicator mpi'
        )
    if lacking and len(lacking) < len(everyone):
        able = next(s for s in everyone if s not in lacking)
        raise CommunicatorError(
            f'some ranks can use NCCL and some cannot: {able} can, but {why}. '
            'Give every rank a GPU, or choose the communicator mpi'
        )
    surprised = next((s for s in lacking if s.is_expected), None)
    if surprised:
        raise CommunicatorError(
            f'auto finds no GPU that it can use: {surprised} '
            f'{surprised.obstacle or _NO_NCCL}. To train on CPUs, choose the communicator mpi'
        )
    if lacking:
        return 'mpi', f'auto: {why}'
    first = everyone[0]
    for gpus in everyone:
        if gpus.nccl < 2000:
            raise CommunicatorError(
                f'{gpus} has NCCL {gpus.nccl_version}, but pure_nccl needs 2.0 or later: '
                'install a later version, or choose the communicator mpi'
            )
        if gpus.nccl != first.nccl:
            raise CommunicatorError(
                f'{first} has NCCL {first.nccl_version}, {gpus} has {gpus.nccl_version}: '
                'install the same version on every host'
            )
    reason = 'asked for' if name == 'pure_nccl' else 'auto: every rank has a GPU and NCCL'
    return 'pure_nccl', f'{reason}, NCCL {first.nccl_version}'


def own_gpus(everyone: list[Gpus]) -> list[int]:
    """Returns the number of each rank's GPU: the ranks of a host take its GPUs in order.

    If the scheduler shows a rank only one GPU, the rank takes that GPU.

    Args:
        everyone (list of Gpus): The GPUs of all ranks.

    Returns:
        list of int: One GPU number per rank.

    Raises:
        CommunicatorError: Two ranks would share a GPU. The message names both.
    """
    n_ranks_on: dict = {}
    taken: dict = {}
    numbers = []
    for gpus in everyone:
        intra_rank = n_ranks_on.get(gpus.host, 0)
        n_ranks_on[gpus.host] = intra_rank + 1
        number = intra_rank % len(gpus.bus_ids)
        other = taken.setdefault((gpus.host, gpus.bus_ids[number]), gpus)
        if other is not gpus:
            raise CommunicatorError(
                f'{other} and {gpus} would share the GPU on PCI bus {gpus.bus_ids[number]}: '
                'start as many ranks per host as it has GPUs (slots in the hostfile), or let the '
                'scheduler show each rank its own GPU'
            )
        numbers.append(number)
    return numbers
