"""How fast is the update rule on ResNet-50's parameters? ./run_mpi.sh benchmark update"""

from __future__ import annotations

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import numpy as np
from chainer import optimizers

from extensions import kernels
from reproduce.resnet50 import ResNet50
from reproduce.studies.speed.side_by_side import side_by_side, table


def run(repeat: int) -> dict:
    """Times the update rule on one core against its memory traffic and Chainer's optimizers.

    The memory traffic is seven streams: four arrays are read, and three are written.

    Args:
        repeat (int): Rounds that are timed.

    Returns:
        dict: The table.
    """
    rng = np.random.RandomState(0)

    def update_of(optimizer):
        model = ResNet50(seed=0)
        for param in model.params():
            param.grad = rng.standard_normal(param.shape).astype(np.float32) * 1e-3
        return optimizer.setup(model).update

    n = ResNet50(seed=0).count_params()
    streams = {name: np.ones(n, np.float32) for name in ('param', 'grad', 'm', 'delta')}
    plain = {name: array.copy() for name, array in streams.items()}
    block = 65536
    scratch = np.empty(block, np.float32)

    def move_seven_streams():
        for start in range(0, n, block):
            for name, stream in streams.items():
                part = stream[start : start + block]
                np.copyto(scratch[: len(part)], part)
                if name != 'grad':
                    np.copyto(part, scratch[: len(part)])

    def plain_statements():
        p = plain
        p['m'] = 0.99 * p['m'] + (1 - 0.99) * p['grad'] ** 2
        p['delta'] = 0.9 * p['delta'] - (0.5 + 0.1 / (np.sqrt(p['m']) + 1e-8)) * p['grad']
        p['param'] += 0.1 * p['delta']

    update_in_blocks = update_of(extensions.RMSpropWarmup(0.1, 0.5, 0.1))

    def without_c():
        compiled, kernels.compiled = kernels.compiled, {}
        update_in_blocks()
        kernels.compiled = compiled

    ours = f'RMSpropWarmup, {kernels.description()}'
    candidates = {
        ours: update_of(extensions.RMSpropWarmup(0.1, 0.5, 0.1)),
        'the same, NumPy in blocks': without_c,
        'the same, alpha_rmsprop = 0': update_of(extensions.RMSpropWarmup(0.1)),
        'moving the seven streams': move_seven_streams,
        'plain NumPy statements': plain_statements,
        'chainer.optimizers.RMSprop': update_of(optimizers.RMSprop()),
        'chainer.optimizers.CorrectedMomentumSGD': update_of(optimizers.CorrectedMomentumSGD()),
    }
    return table(f'update of {n:,} float32 parameters', side_by_side(candidates, repeat), ours)
