"""train.py, but a rank hangs in its start: train_that_hangs.py WHERE RANK [preflight] OPTIONS..."""

import os
import signal
import sys
import time

from reproduce.job import start

start.before_mpi()

import chainermn

from reproduce import dataset, listing, resnet50, train
from reproduce.job import agreement, functions, options, output, preflight, ranks

where, rank = sys.argv.pop(1), int(sys.argv.pop(1))
mpi = train.MPI.COMM_WORLD


def hang(*arguments, **keywords):
    print(f'hangs at {time.time()}', flush=True)
    time.sleep(600)


def stop(*arguments, **keywords):
    print(f'hangs at {time.time()}', flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)  # mpiexec lets it go on before it kills it


def slow(entry):
    time.sleep(0.6)
    return True


def stop_later(entry):
    time.sleep(0.1)
    return hang_later(entry, stop)


def hang_later(entry, how=hang):
    if entry.path.endswith('dog/9.png'):
        how()
    return True


PLACES = {
    'options': (options, 'parse', hang),
    'plan': (dataset, 'count_images', hang),
    'communicator': (train.extensions, 'create_communicator', hang),
    'functions': (functions, 'use', hang),
    'list': (listing, '_is_image', hang_later),
    'slow list': (listing, '_is_image', slow),
    'stopped list': (listing, '_is_image', stop_later),
    'model': (train, 'ResNet50', hang),
    'stopped model': (train, 'ResNet50', stop),
    'NCCL': (chainermn.nccl, 'NcclCommunicator', hang),
    'NCCL broadcast': (getattr(chainermn.nccl, 'NcclCommunicator', None), 'bcast', hang),
    'trainer': (train.extensions, 'RMSpropWarmup', hang),
    'checkpoint': (output, 'find_checkpoint', hang),
    'going on': (train.extensions.checkpoint, 'resume', hang),
    'agreement': (agreement, 'items', hang),
    'stopped agreement': (agreement, 'items', stop),
    'clocks': (preflight.Preflight, '_clocks', hang),
}
resnet50.BLOCKS = dict.fromkeys(resnet50.BLOCKS, 1)
program = train.main
if sys.argv[1:2] == ['preflight']:
    sys.argv.pop(1)
    program = preflight.main
mpi.barrier()  # the ranks may need more time than the watchdog gives for their imports
if mpi.rank == rank:
    if where in ('imports', 'stopped imports'):
        (hang if where == 'imports' else stop)()
    setattr(*PLACES[where])
ranks.run(program)
