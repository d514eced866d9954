"""Trains a small network with virtual workers and saves everything.

train_small.py OUT WORKERS COMMUNICATOR DTYPE STATISTICS [ITERATIONS [STATE]]: STATISTICS is mean,
pooled or moving, STATE what an earlier run has saved as OUT/state.npz.
"""

import sys

import extensions  # isort: skip
import chainer
import chainer.functions as F
import numpy as np
from chainer.training import extensions as chainer_extensions
from tests_common import BATCH, IMAGES, VALIDATION, Network, minibatch, validation_set

out, n_workers, name, dtype, kind = sys.argv[1:6]
n_iterations = int(sys.argv[6]) if len(sys.argv) > 6 else 7
n_workers = int(n_workers)
comm = extensions.create_communicator(name, dtype)
model = Network(seed=comm.rank)  # different on every rank: the broadcast must matter
device = extensions.device_of(comm)
model.to_device(device)
comm.bcast_data(model)
optimizer = extensions.RMSpropWarmup(0.1).setup(model)
if kind == 'moving':
    statistics = extensions.MovingBatchStatistics(model, comm, decay=0.7)
else:
    statistics = extensions.AllreduceBatchStatistics(model, comm, pooled_variance=kind == 'pooled')
epoch_size = (n_workers * BATCH, IMAGES)
updater = extensions.VirtualWorkersUpdater(
    minibatch,
    optimizer,
    lambda x, t: F.softmax_cross_entropy(model(x), t),
    comm,
    n_workers,
    epoch_size,
    converter=device.send,
    batch_statistics=statistics,
)
x, t = validation_set()
evaluator = extensions.ExactEvaluator(
    lambda start, stop: (
        (x[i : min(i + 4, stop)], t[i : min(i + 4, stop)]) for i in range(start, stop, 4)
    ),
    model,
    comm,
    VALIDATION,
    batch_size=4,
    converter=device.send,
)
trainer = chainer.training.Trainer(updater, (n_iterations, 'iteration'), out)
trainer.extend(evaluator)  # the wrong way round, on purpose
reports = [extensions.MeanTrainingLoss(comm)]
if hasattr(comm, 'cast_counts'):
    reports.append(extensions.CastReport(comm))
for report in reports:
    trainer.extend(report)
trainer.extend(statistics)
trainer.extend(extensions.StepLearningRate(*epoch_size, epochs=2))
trainer.extend(extensions.AlphaSGDSchedule(*epoch_size, epochs=2))
log = chainer_extensions.LogReport(filename=None)
trainer.extend(log)
if len(sys.argv) > 7:
    chainer.serializers.load_npz(sys.argv[7], trainer)
trainer.run()
for report in [*reports, *([statistics] if kind == 'moving' else [])]:
    report.gather()
if comm.rank == 0:
    chainer.serializers.save_npz(f'{out}/state.npz', trainer)
model.to_device('@numpy')
rule_states = {
    f'{kind}{n}': chainer.backends.cuda.to_cpu(p.update_rule.state[kind])
    for n, p in model.namedparams()
    for kind in ('m', 'delta')
}
np.savez(
    f'{out}/{comm.rank}.npz',
    **{n: p.data for n, p in model.namedparams()},
    **rule_states,
    mean=model.bn.avg_mean,
    var=model.bn.avg_var,
    t=optimizer.t,
    epochs=[entry['epoch'] for entry in log.log],
    iterations=[entry['iteration'] for entry in log.log],
    flushed=[entry.get('cast/flushed', 0) for entry in log.log],
    loss=[entry['main/loss'] for entry in log.log],
    validation_loss=[entry['validation/main/loss'] for entry in log.log],
    accuracy=[entry['validation/main/accuracy'] for entry in log.log],
    top5=[entry['validation/main/top5_accuracy'] for entry in log.log],
    images=[entry['validation/images'] for entry in log.log],
)
