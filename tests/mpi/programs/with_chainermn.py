"""Trains with ChainerMN's own optimizer, evaluator and extensions: with_chainermn.py OUT NAME
DTYPE."""

import sys

import extensions  # isort: skip
import chainer
import chainer.links as L
import chainermn
import numpy as np
from chainer.training import extensions as chainer_extensions
from chainermn.extensions import AllreducePersistent, ObservationAggregator
from tests_common import Network, minibatch, validation_set

from reproduce.job import start

sys.excepthook = lambda kind, error, trace: start.abort(error)
out, name, dtype = sys.argv[1:4]
comm = extensions.create_communicator(name, dtype)
model = L.Classifier(Network(seed=comm.rank))
optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.MomentumSGD(0.05), comm).setup(
    model
)


def iterator(batches, repeat):
    x, t = map(np.concatenate, zip(*batches))
    return chainer.iterators.SerialIterator(
        chainer.datasets.TupleDataset(x, t), 4, repeat=repeat, shuffle=False
    )


updater = chainer.training.StandardUpdater(
    iterator([minibatch(i, comm.rank) for i in range(10)], True), optimizer
)
trainer = chainer.training.Trainer(updater, (20, 'iteration'), out)
evaluator = chainer_extensions.Evaluator(iterator([validation_set()], False), model)
trainer.extend(chainermn.create_multi_node_evaluator(evaluator, comm))
trainer.extend(AllreducePersistent(model, comm))
trainer.extend(
    lambda trainer: chainer.report({'rank': float(comm.rank)}),
    trigger=(1, 'iteration'),
    priority=chainer.training.PRIORITY_WRITER,
)
trainer.extend(ObservationAggregator(comm, 'rank', 'mean_rank'), trigger=(1, 'iteration'))
checkpointer = chainermn.create_multi_node_checkpointer('test', comm, path=out)
trainer.extend(checkpointer, trigger=(10, 'iteration'))
log = chainer_extensions.LogReport(filename=None, trigger=(10, 'iteration'))
trainer.extend(log)
trainer.run()

half = comm.split(comm.rank % 2, comm.rank)
objects = [
    comm.bcast_obj('from rank 0' if comm.rank == 0 else None),
    comm.gather_obj(comm.rank),
    comm.allreduce_obj(comm.rank + 1),
    half.size,
    [array.tolist() for array in comm.allgather(np.full(2, comm.rank, np.float32))],
    comm.allreduce(np.ones(3, np.float32)).tolist(),
]
if comm.rank == 0:
    comm.send_obj('hello', 1)
elif comm.rank == 1:
    objects.append(comm.recv_obj(0))
print(f'rank {comm.rank}: {objects}', flush=True)
np.savez(
    f'{out}/{name}-{comm.rank}.npz',
    **{name: param.data for name, param in model.namedparams()},
    loss=[entry['main/loss'] for entry in log.log],
    accuracy=[entry['validation/main/accuracy'] for entry in log.log if entry['iteration'] == 20],
    mean_rank=[entry['mean_rank'] for entry in log.log],
    mean=model.predictor.bn.avg_mean,
)
half.finalize()
comm.finalize()
