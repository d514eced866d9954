"""Trains with a sleep in one part on the last rank, for each part in turn: timed.py.

Rank 0 prints what the TimeReport reports, and every rank how its own parts sum, against the clock.
"""

import json
import time

import extensions  # isort: skip
import chainer
import chainer.functions as F
from tests_common import BATCH, Network, minibatch, validation_set

SLEEP, SKIP, ITERATIONS = 0.1, 3, 7
comm = extensions.create_communicator('mpi')


def run(where, each=1):
    """``each`` workers a process; the sleep comes in each of ``where``'s calls."""
    n_workers = each * comm.size
    model = Network(seed=0)
    optimizer = extensions.RMSpropWarmup(0.01).setup(model)
    is_late = comm.rank == comm.size - 1

    def sleepy(part, function):
        def late(*args):
            first = where == 'first' and part == 'data' and updater.iteration < SKIP
            if is_late and (part == where or first):
                time.sleep(SLEEP * (5 if first else 1))
            return function(*args)

        return late

    updater = extensions.VirtualWorkersUpdater(
        sleepy('data', minibatch),
        optimizer,
        sleepy('forward_backward', lambda x, t: F.softmax_cross_entropy(model(x), t)),
        comm,
        n_workers,
        (n_workers * BATCH, ITERATIONS * n_workers * BATCH),
    )
    for name, part in (('_pack', 'pack'), ('_unpack', 'pack'), ('_exact_mean', 'allreduce')):
        if hasattr(comm, name):
            vars(comm).pop(name, None)  # of the run before
            setattr(comm, name, sleepy(part, getattr(comm, name)))
    optimizer.add_hook(sleepy('update', lambda optimizer: None), 'sleep')
    evaluator = extensions.ExactEvaluator(
        sleepy('validation', lambda start, stop: [validation_set()] if start < stop else []),
        model,
        comm,
        len(validation_set()[1]),
        len(validation_set()[1]),
    )
    trainer = chainer.training.Trainer(updater, (ITERATIONS, 'iteration'), 'unused')
    report = extensions.TimeReport(comm, evaluator, SKIP)
    moments, taken, reported = [], [], {}

    def note(trainer):
        """Right after each update, and, when it is the report's turn, once more."""
        moments.append(time.perf_counter())

    trainer.extend(note, name='note', trigger=(1, 'iteration'), priority=10**6)
    trainer.extend(
        sleepy('extensions', lambda trainer: None), name='late', trigger=(1, 'iteration')
    )
    trainer.extend(evaluator)
    trainer.extend(report)

    def look(trainer):
        reported.update(trainer.observation)

    trainer.extend(look, name='look', trigger=(1, 'epoch'), priority=0)
    original = report.gather

    def gather():
        take = report._timer.take

        def noted():
            seconds, n = take()
            taken.append((sum(seconds.values()), n, time.perf_counter()))
            return seconds, n

        report._timer.take = noted
        original()

    report.gather = gather
    trainer.run()
    seconds, n, now = taken[0]
    ratio = seconds / (now - moments[SKIP - 1])
    times = {name: value for name, value in reported.items() if name.startswith('time/')}
    print(json.dumps([where, each, comm.rank, n, ratio, times]), flush=True)


for where in (
    'nowhere',
    'first',
    'data',
    'forward_backward',
    'pack',
    'allreduce',
    'update',
    'extensions',
    'validation',
):
    run(where)
run('data', each=2)
