"""Averages gradients with pure_nccl, and prints the parts in which each step was: nccl_timed.py."""

import contextlib

from tests_common import gradients, model_of

import extensions

comm = extensions.create_communicator('pure_nccl')
device = extensions.device_of(comm)
model = model_of(gradients(0))
model.to_device(device)
comm.bcast_data(model)
for name, param in model.namedparams():
    grad = gradients(comm.rank)[name]
    param.grad = None if grad is None else device.send(grad)
model.edge.grad[...] = 1  # they would overflow
parts = []


@contextlib.contextmanager
def timer(part):
    parts.append(f'{part}(')
    yield
    parts.append(')')


comm.timer = timer
with timer('whole'):
    comm.multi_node_mean_grad(model)
print(f'rank {comm.rank}: {" ".join(parts)}', flush=True)
