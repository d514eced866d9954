"""Rank 1 fails in one part: one_rank_fails.py WHERE. Each rank prints what it raises."""

import sys

import extensions  # isort: skip
import chainer
import numpy as np
from chainer import links as L
from tests_common import BATCH, Network, minibatch, validation_set

where = sys.argv[1]
comm = extensions.create_communicator('mpi')


def fails_here(part):
    return comm.rank == 1 and where == part


def batches(iteration, worker):
    if fails_here('training') and iteration == 1:
        raise OSError('cannot read')
    return minibatch(iteration, worker)


def evaluator():
    x, t = validation_set()
    model = Network(0)

    def shards(start, stop):
        for i in range(start, stop - 4 * fails_here('images'), 4):
            yield x[i : min(i + 4, stop)], t[i : min(i + 4, stop)] - fails_here('label') * 9

    def predictor(x):
        if fails_here('predictor'):
            raise MemoryError('too much')
        return model(x)

    return extensions.ExactEvaluator(shards, predictor, comm, len(t), 4)


def statistics():
    model = chainer.Chain(bn=L.BatchNormalization(axis=0, decay=0))
    if comm.rank == 0:
        model.bn(np.ones((2, 3), np.float32))
    return extensions.AllreduceBatchStatistics(model, comm)


if where == 'training':
    model = L.Classifier(Network(0))
    optimizer = extensions.RMSpropWarmup(0.1).setup(model)
    updater = extensions.VirtualWorkersUpdater(
        batches, optimizer, model, comm, comm.size, (comm.size * BATCH, 100)
    )
    for _ in range(3):
        updater.update()
try:
    (statistics if where == 'statistics' else evaluator)()()
except (RuntimeError, MemoryError, ValueError) as error:
    print(f'rank {comm.rank} raises {type(error).__name__}: {error}', flush=True)
