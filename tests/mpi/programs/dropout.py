"""Trains with dropout on four workers, and prints a digest of the parameters on every rank."""

import zlib

import extensions  # isort: skip
import chainer.functions as F
import numpy as np
from tests_common import BATCH, Network, minibatch

comm = extensions.create_communicator('mpi')
model = Network(0)


def batches(iteration, worker):
    np.random.seed([iteration, worker])
    return minibatch(iteration, worker)


updater = extensions.VirtualWorkersUpdater(
    batches,
    extensions.RMSpropWarmup(0.1).setup(model),
    lambda x, t: F.softmax_cross_entropy(model(F.dropout(x)), t),
    comm,
    4,
    (4 * BATCH, 100),
)
for _ in range(3):
    updater.update()
digest = zlib.crc32(b''.join(p.array.tobytes() for _, p in sorted(model.namedparams())))
print(f'digest {digest}', flush=True)
