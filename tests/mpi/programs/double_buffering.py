"""Trains with ChainerMN's double buffering: double_buffering.py HOW.

HOW says what the communicator is asked for: scale, check or neither. Prints the parameter at the
end, or what is raised.
"""

import sys

import extensions  # isort: skip
import chainer
import chainermn
import numpy as np

how = sys.argv[1]
comm = extensions.create_communicator(
    'pure_nccl', gradient_scale=8 if how == 'scale' else 1, stop_on_nonfinite=how == 'check'
)
link = chainer.Link()
with link.init_scope():
    link.p = chainer.Parameter(np.zeros(2, np.float32))
link.to_device(extensions.device_of(comm))
optimizer = chainermn.create_multi_node_optimizer(
    extensions.RMSpropWarmup(1, mu1=0), comm, double_buffering=True
).setup(link)
try:
    for iteration in range(4):  # the first is a broadcast
        factor = float(iteration + comm.rank)
        optimizer.update(lambda: chainer.functions.sum(link.p * factor))  # noqa: B023
except extensions.CommunicatorError as error:
    print(f'rank {comm.rank}: CommunicatorError: {error}', flush=True)
else:
    print(f'rank {comm.rank}: {link.p.array.tolist()}', flush=True)
