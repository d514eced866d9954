"""Averages N gradients once and prints how far the process's memory rose: send_and_hold.py N."""

import resource
import sys

import extensions  # isort: skip
import chainer
import numpy as np

n = int(sys.argv[1])


def average(comm, n):
    model = chainer.Link()
    with model.init_scope():
        model.a = chainer.Parameter(np.ones(n, np.float32))
    model.a.grad = np.ones(n, np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    comm.multi_node_mean_grad(model)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


comm = extensions.create_communicator('mpi')
if n > 1_000_000:
    average(extensions.create_communicator('mpi'), n // 100)  # MPI makes its own buffers
print(f'rank {comm.rank}: {1024 * average(comm, n)} bytes')
