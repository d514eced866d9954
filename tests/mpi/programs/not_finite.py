"""One rank's gradient is not finite: not_finite.py HOW.

HOW: sent, rank 1 has an infinite and NaN gradients; report, the same, to be counted only; workers,
the second of rank 1's two workers has one; sum, the sum of a ring overflows. Prints what each rank
raises, and what was counted.
"""

import sys

import extensions  # isort: skip
import chainer
import numpy as np
from mpi4py import MPI
from tests_common import gradients, model_of

how = sys.argv[1]
comm = extensions.create_communicator(
    'mpi', accumulate='ring' if how == 'sum' else 'exact', stop_on_nonfinite=how != 'report'
)
model = model_of(gradients(0))
for param in model.params():
    param.grad = np.ones(param.shape, np.float32)
if how == 'sum':
    model.edge.grad[2] = 60000
elif comm.rank == 1 and how != 'workers':
    model.conv.grad[0, 0, 0] = 1e9
    model.edge.grad[1:3] = np.nan
try:
    if how == 'workers':
        comm.add_grad(model)
        if comm.rank == 1:
            model.conv.grad[0, 0, 0] = 1e9
        comm.add_grad(model)
        comm.mean_grad(model)
    else:
        comm.multi_node_mean_grad(model)
    print(f'rank {comm.rank}: {np.isnan(model.edge.grad).sum()} NaN', flush=True)
except extensions.NonFiniteGradients as error:
    print(f'rank {comm.rank}: {error}', flush=True)
report = extensions.CastReport(comm)
for _ in range(2):
    with chainer.Reporter().scope(observation := {}):
        report()
    if comm.rank == 0:
        print(sorted(observation.items()), flush=True)
MPI.COMM_WORLD.Barrier()
