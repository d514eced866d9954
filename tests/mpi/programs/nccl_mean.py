"""Broadcasts parameters and averages gradients with pure_nccl: nccl_mean.py OUT SCALE...

A SCALE of inf stands for an infinite gradient on the last rank.
"""

import sys

import numpy as np
from tests_common import gradients, model_of

import extensions

out, *scales = sys.argv[1:]
for scale in map(float, scales):
    stops = scale == np.inf
    comm = extensions.create_communicator(
        'pure_nccl', gradient_scale=1 if stops else scale, stop_on_nonfinite=stops
    )
    device = extensions.device_of(comm)
    model = model_of(gradients(0))
    for param in model.params():
        param.data[...] = comm.rank + 1
    model.to_device(device)
    comm.bcast_data(model)
    for name, param in model.namedparams():
        grad = gradients(comm.rank)[name]
        param.grad = None if grad is None else device.send(grad)
    if stops:
        model.edge.grad[:3] = np.inf if comm.rank == comm.size - 1 else 3
    try:
        comm.multi_node_mean_grad(model)
    except extensions.NonFiniteGradients as error:
        print(f'rank {comm.rank}: {error}', flush=True)
    model.to_device('@numpy')
    np.savez(
        f'{out}/{scale:g} {comm.rank}.npz',
        data=np.concatenate([param.data.ravel() for param in model.params()]),
        **{n: p.grad for n, p in model.namedparams() if p.grad is not None},
    )
    comm.finalize()
