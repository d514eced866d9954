"""Counts what one iteration of ResNet-50 asks of the GPU: count_calls.py WORKERS.

Runs on tests/cupy_on_host. Prints launches and waits of the host by part of the third iteration.
"""

import contextlib
import json
import sys

import extensions  # isort: skip
import chainer.functions as F
import host_calls
import numpy as np
from mpi4py import MPI

from reproduce import images
from reproduce.resnet50 import ResNet50

n_workers = int(sys.argv[1])
comm = extensions.create_communicator('pure_nccl')
device = extensions.device_of(comm)
model = ResNet50(10, 4, 'cifar')
model.to_device(device)
comm.bcast_data(model)
rng = np.random.RandomState(comm.rank)
updater = extensions.VirtualWorkersUpdater(
    lambda iteration, worker: (
        rng.randint(0, 256, (2, 32, 32, 3)).astype(np.uint8),
        rng.randint(10, size=2, dtype=np.int32),
    ),
    extensions.RMSpropWarmup(0.1, alpha_rmsprop=0.1).setup(model),
    lambda x, t: F.softmax_cross_entropy(model(x), t),
    comm,
    n_workers * comm.size,
    (2 * n_workers * comm.size, 1000),
    converter=images.converter_to(device),
    batch_statistics=extensions.AllreduceBatchStatistics(model, comm),
)
updater.update()
updater.update()
parts, found = ['rest'], {}


@contextlib.contextmanager
def timer(part):
    note()
    parts.append(part)
    yield
    note()
    parts.pop()


def note():
    """Counts the calls since the last note for the innermost part."""
    counts = found.setdefault(parts[-1], {'launch': 0, 'wait': 0})
    for kind in counts:
        counts[kind] += host_calls.count(kind)
    host_calls.calls.clear()


host_calls.calls.clear()
updater.timer = comm.timer = timer
updater.update()
note()
if comm.rank == 0:
    print(json.dumps({part: list(counts.values()) for part, counts in found.items()}))
MPI.COMM_WORLD.Barrier()
