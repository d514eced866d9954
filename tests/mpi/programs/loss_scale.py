"""Trains with a loss scale, StandardUpdater and ChainerMN's optimizer: loss_scale.py OUT NAME.

NAME is the communicator's. Saves the parameters, the learning rates and the scale at the end, with
no loss scale, a static one, a dynamic one, and a dynamic one with an infinite gradient on rank 1.
"""

import sys

import extensions  # isort: skip
import chainer
import chainermn
import numpy as np
from chainer.training import extensions as chainer_extensions

out, name = sys.argv[1:]


def train(how):
    comm = extensions.create_communicator(name, 'float32', stop_on_nonfinite=how != 'overflow')
    device = extensions.device_of(comm)
    model = chainer.links.Linear(3, 1, nobias=True, initialW=0.25)
    model.to_device(device)
    optimizer = chainermn.create_multi_node_optimizer(extensions.RMSpropWarmup(0.1), comm)
    optimizer.setup(model)
    if how == 'static':
        optimizer.set_loss_scale(64)
    elif how != 'none':
        optimizer.loss_scaling()
    x = np.random.RandomState(comm.rank).randn(8, 3).astype(np.float32)
    calls = []

    def loss(*batch):
        calls.append(batch)
        infinite = how == 'overflow' and comm.rank == 1 and len(calls) == 4
        y = model(device.send(np.stack(batch[0]) if isinstance(batch[0], list) else batch[0]))
        return chainer.functions.mean(y * y) * np.float32(np.inf if infinite else 1)

    iterator = chainer.iterators.SerialIterator(x, 2, shuffle=False)
    updater = chainer.training.StandardUpdater(iterator, optimizer, loss_func=loss)
    trainer = chainer.training.Trainer(updater, (6, 'iteration'), out)
    trainer.extend(extensions.AlphaSGDSchedule(64, 1437))
    trainer.extend(extensions.StepLearningRate(64, 1437))
    log = chainer_extensions.LogReport(trigger=(1, 'iteration'), filename=None)
    trainer.extend(log)
    trainer.run()
    np.savez(
        f'{out}/{how}-{comm.rank}.npz',
        W=chainer.backends.cuda.to_cpu(model.W.array),
        lr=[entry.get('lr', 0) for entry in log.log],
        t=optimizer.t,
        scale=optimizer.actual_optimizer._loss_scale or 0,
        growth=getattr(optimizer.actual_optimizer, '_loss_scaling_multiplier', 0),
    )


for how in ('none', 'static', 'dynamic', 'overflow'):
    train(how)
