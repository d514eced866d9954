"""How fast is the all-reduce of BN statistics? ./run_mpi.sh benchmark statistics"""

from __future__ import annotations

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
from chainermn.extensions import AllreducePersistent

from reproduce.resnet50 import ResNet50
from reproduce.studies.speed.side_by_side import slowest_rank


def run(repeat: int) -> dict | None:
    """Times our all-reduce of ResNet-50's BN statistics against ``AllreducePersistent``.

    Args:
        repeat (int): Rounds that are timed.

    Returns:
        dict: The table, on rank 0; None on the other ranks.
    """
    comm = extensions.create_communicator('naive', 'float32')
    model = ResNet50(seed=0)
    ours = 'AllreduceBatchStatistics'
    candidates = {
        ours: extensions.AllreduceBatchStatistics(model, comm),
        'chainermn AllreducePersistent': AllreducePersistent(model, comm),
    }
    return slowest_rank('BN statistics of ResNet-50', candidates, repeat, comm, ours)
