"""What do 8 virtual workers cost in one process? ./run_mpi.sh benchmark workers"""

from __future__ import annotations

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import numpy as np

from reproduce.resnet50 import ResNet50
from reproduce.studies.speed.side_by_side import side_by_side, table


def run(repeat: int) -> dict:
    """Times 8 virtual workers with 32 images each against 8 updates by Chainer's StandardUpdater.

    Args:
        repeat (int): Rounds that are timed.

    Returns:
        dict: The table.
    """
    n, b = 8, 32
    rng = np.random.RandomState(0)
    x = rng.standard_normal((b, 3, 32, 32)).astype(np.float32)
    t = rng.randint(10, size=b).astype(np.int32)
    comm = extensions.create_communicator('mpi')

    def optimizer():
        return extensions.RMSpropWarmup(0.01).setup(ResNet50(10, width=16, seed=0))

    def virtual(n_workers):
        target = optimizer()
        updater = extensions.VirtualWorkersUpdater(
            lambda iteration, worker: (x, t),
            target,
            lambda x, t: F.softmax_cross_entropy(target.target(x), t),
            comm,
            n_workers,
            (n_workers * b, 10**6),
            batch_statistics=extensions.AllreduceBatchStatistics(target.target, comm),
        )
        return lambda: [updater.update() for _ in range(n // n_workers)]

    def standard():
        target = optimizer()
        iterator = chainer.iterators.SerialIterator(
            chainer.datasets.TupleDataset(x, t), b, shuffle=False
        )
        updater = chainer.training.StandardUpdater(
            iterator,
            target,
            converter=lambda batch, device: (x, t),
            loss_func=lambda x, t: F.softmax_cross_entropy(target.target(x), t),
        )
        return lambda: [updater.update() for _ in range(n)]

    ours = f'VirtualWorkersUpdater, {n} workers'
    candidates = {
        ours: virtual(n),
        f'the same, 1 worker, {n} updates': virtual(1),
        f'chainer StandardUpdater, {n} updates': standard(),
    }
    title = f'{n} x {b} images through a ResNet-50 of width 16'
    return table(title, side_by_side(candidates, repeat), ours)
