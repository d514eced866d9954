"""Which GPU a rank computes on, and who cannot take part in NCCL's all-reduce."""

from __future__ import annotations

import dataclasses

import chainermn
from chainer.backends import cuda
from mpi4py import MPI


class CommunicatorError(Exception):
    """The communicator asked for cannot work here; the message says why, and what would."""


@dataclasses.dataclass(frozen=True)
class Sight:
    """What one rank sees.

    Attributes:
        rank (int): In the communicator.
        host (str): Its name, as MPI has it.
        bus_ids (tuple of str): PCI bus of each GPU that the rank can use; empty without one.
        nccl (int): Version as NCCL counts it, 2708 or 22304; 0 without NCCL.
        obstacle (str): Why the rank sees no GPU; None if it does.
    """

    rank: int
    host: str
    bus_ids: tuple = ()
    nccl: int = 0
    obstacle: str | None = None

    def __str__(self):
        return f'rank {self.rank} on {self.host}'

    @property
    def nccl_version(self):
        """22304 is 2.23.4, 2708 is 2.7.8; - without NCCL."""
        if not self.nccl:
            return '-'
        major = 10000 if self.nccl >= 10000 else 1000
        return f'{self.nccl // major}.{self.nccl % major // 100}.{self.nccl % 100}'


def look(rank: int) -> Sight:
    """Never fails: what is missing stands in the result."""
    host = MPI.Get_processor_name()
    if not cuda.available:
        return Sight(rank, host, obstacle='has no usable GPU or no CuPy')
    runtime = cuda.cupy.cuda.runtime
    try:
        n_gpus = runtime.getDeviceCount()
        bus_ids = tuple(runtime.deviceGetPCIBusId(i) for i in range(n_gpus))
    except runtime.CUDARuntimeError as error:
        return Sight(rank, host, obstacle=f'sees no GPU ({error})')
    if not bus_ids:
        return Sight(rank, host, obstacle='sees no GPU')
    nccl = 0
    if chainermn.nccl._available:
        nccl = min(chainermn.nccl.get_build_version(), chainermn.nccl.get_version())
    return Sight(rank, host, bus_ids, nccl)


def choose(name: str, sights: list[Sight]) -> tuple[str, str]:
    """Chooses between ``pure_nccl`` and ``mpi`` by what all ranks see, so that all choose alike.

    Returns:
        tuple: The name, and why, in words.

    Raises:
        CommunicatorError: ``name`` is ``pure_nccl`` and a rank has no GPU or no NCCL; or ``auto``
            and some have and some have not; or NCCL is too old or of several versions.
    """
    lacking = [s for s in sights if s.obstacle or not s.nccl]
    why = ''
    if lacking:
        why = f'{lacking[0]} {lacking[0].obstacle or "has a GPU, but no NCCL for CuPy"}'
    if lacking and name == 'pure_nccl':
        raise CommunicatorError(
            f'the communicator pure_nccl needs a GPU and NCCL on every rank: {why}. '
            'On CPUs choose the communicator mpi'
        )
    if lacking and len(lacking) < len(sights):
        able = next(s for s in sights if s not in lacking)
        raise CommunicatorError(
            f'some ranks can use NCCL and some cannot: {able} can, but {why}. '
            'Give every rank a GPU, or choose the communicator mpi'
        )
    if lacking:
        return 'mpi', f'auto: {why}'
    first = sights[0]
    for sight in sights:
        if sight.nccl < 2000:
            raise CommunicatorError(
                f'{sight} has NCCL {sight.nccl_version}, but pure_nccl needs 2.0 or later: '
                'install a later one, or choose the communicator mpi'
            )
        if sight.nccl != first.nccl:
            raise CommunicatorError(
                f'{first} has NCCL {first.nccl_version}, {sight} has {sight.nccl_version}: '
                'install the same on every host'
            )
    reason = 'asked for' if name == 'pure_nccl' else 'auto: every rank has a GPU and NCCL'
    return 'pure_nccl', f'{reason}, NCCL {first.nccl_version}'


def own_gpus(sights: list[Sight]) -> list[int]:
    """Number of the GPU that each rank takes: the ranks of a host take its GPUs in turn.

    A rank to which the scheduler shows one GPU alone takes that.

    Raises:
        CommunicatorError: Two ranks would share a GPU; both are named.
    """
    n_ranks_on: dict = {}
    taken: dict = {}
    numbers = []
    for sight in sights:
        intra_rank = n_ranks_on.get(sight.host, 0)
        n_ranks_on[sight.host] = intra_rank + 1
        number = intra_rank % len(sight.bus_ids)
        other = taken.setdefault((sight.host, sight.bus_ids[number]), sight)
        if other is not sight:
            raise CommunicatorError(
                f'{other} and {sight} would share the GPU on PCI bus {sight.bus_ids[number]}: '
                'start as many ranks per host as it has GPUs (slots in the hostfile), or have the '
                'scheduler show each rank a GPU of its own'
            )
        numbers.append(number)
    return numbers
