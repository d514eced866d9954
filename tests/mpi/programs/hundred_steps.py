"""Trains a network with BN on the digits for 100 steps and prints the losses: hundred_steps.py
DTYPE."""

import sys

import extensions  # isort: skip
import chainer
import chainer.functions as F
import numpy as np
from tests_common import DigitsNetwork

from reproduce import dataset
from reproduce.order import ImageOrder

dtype = sys.argv[1]
comm = extensions.create_communicator('mpi', dtype)
model = DigitsNetwork(seed=0)
pixels, labels = dataset.load_digits()
x = (pixels.reshape(len(pixels), -1) / 8 - 1).astype(np.float32)
order = ImageOrder(len(x), comm.size, 32, seed=0)


def minibatch(iteration, worker):
    _, indices = order(iteration, worker)
    return x[indices], labels[indices]


updater = extensions.VirtualWorkersUpdater(
    minibatch,
    extensions.RMSpropWarmup(0.05, alpha_sgd=0.5, alpha_rmsprop=0.003).setup(model),
    lambda x, t: F.softmax_cross_entropy(model(x), t),
    comm,
    comm.size,
    (order.total_batch_size, len(x)),
)
trainer = chainer.training.Trainer(updater, (100, 'iteration'), out='unused')
trainer.extend(extensions.MeanTrainingLoss(comm), trigger=(1, 'iteration'))
losses = []
trainer.extend(
    lambda trainer: losses.append(trainer.observation['main/loss']), trigger=(1, 'iteration')
)
trainer.run()
if comm.rank == 0:
    print('losses', *losses, flush=True)
