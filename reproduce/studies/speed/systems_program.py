"""How fast is one system? The program that systems.py starts on the ranks of a job.

python -m reproduce.studies.speed.systems_program OPTIONS

OPTIONS is JSON: those of iteration_program.py, the name of the ``system``, ``n_classes``, and how
many iterations are ``timed``. An epoch is longer than the job, so that it never ends. Rank 0 writes
the file ``result``. All jobs train from the same initial values, on the same images.
"""

from __future__ import annotations

from reproduce.job import start

if __name__ == '__main__':
    start.before_mpi()

import argparse
import json
import sys
from pathlib import Path

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import numpy as np
from chainer.backends import cuda
from mpi4py import MPI

from reproduce import listing
from reproduce.dataset import write_digits
from reproduce.job import functions, ranks, report
from reproduce.settings import InputError
from reproduce.studies.speed.functions import blas, memory
from reproduce.studies.speed.iteration_program import ChainerMN, Ours, repeated

IN_PYTORCH = ('twin', 'twin-compiled', 'torchvision')


class Losses(chainer.training.Extension):
    """Keeps this rank's loss of each iteration, on its device: the host does not wait for it."""

    trigger = (1, 'iteration')
    priority = chainer.training.PRIORITY_WRITER + 1  # before ours hands them over

    def __init__(self):
        self.found: list = []

    def __call__(self, trainer):
        losses = getattr(trainer.updater, 'losses', None)  # StandardUpdater only reports them
        self.found.append(losses[-1] if losses else trainer.observation['main/loss'].array)


def system_of(options, train, val, mpi):
    """Makes the system ``options.system``.

    Returns:
        tuple: The system, which has ``run(folder, n_iterations)`` of iteration_program.py, and
            ``batches``; and the list that gets a loss per iteration.
    """
    if options.system in IN_PYTORCH:
        from reproduce.studies.speed import systems_in_pytorch  # PyTorch may be absent

        system = systems_in_pytorch.system_of(options, train, val, mpi)
        return system, system.losses
    losses = Losses()
    if options.system.startswith('chainermn'):
        device = device_of(mpi)
        options.functions = functions.choose(mpi, options.functions, device)
        system = ChainerMN(options, train, val, mpi, device.xp is not np)
    else:
        system = Ours(options, train, val, mpi, options.allreduce_grad_dtype)
    system.entries.append((losses,))
    return system, losses.found


def device_of(mpi):
    """Returns the device that ours takes in this process. Collective."""
    return extensions.device_of(extensions.create_communicator(mpi_comm=mpi))


def why_not(options, mpi) -> str:
    """Returns why the system cannot run on this rank, or is another one; else nothing."""
    if options.system in IN_PYTORCH:
        try:
            from reproduce.studies.speed import systems_in_pytorch
        except (ImportError, OSError) as error:  # OSError: a library that Torch loads
            reason = ' '.join(str(error).split())
            return f'{sys.executable} cannot import PyTorch: {reason}; start with EXTRAS=twin'
        return systems_in_pytorch.why_not(options)
    device = device_of(mpi)
    if options.system == f'ours-{functions.resolve("auto", device)}':
        return 'it is the same as ours'
    try:
        functions.use(functions.resolve(options.functions, device), device)
    except InputError as error:
        return str(error)
    return ''


def images_of(options, mpi) -> tuple:
    """Returns the listings for training and validation: the digits, in ``n_classes`` classes.

    Those for training are an epoch of ``iterations``.
    """
    folders = []
    for name in ('train', 'val'):
        packed = ranks.on_rank_zero(mpi, lambda name=name: _digits(options, name).pack())
        folders.append(listing.ImageFolder.unpack(packed))
    total = mpi.size * options.local_batch_size
    return repeated(folders[0], options.iterations * total), repeated(folders[1], total)


def _digits(options, name) -> listing.ImageFolder:
    write_digits(options.folder)
    found = listing.list_images(Path(options.folder, name))
    others = range(len(found.classes), options.n_classes)
    classes = (*found.classes, *(f'without images, {n}' for n in others))
    counts = np.pad(found.counts, (0, len(others)))
    return listing.ImageFolder(found.root, classes, counts, found.files)


def device_name(options, system) -> str:
    """Returns the name of this rank's device."""
    if not system.on_gpu:
        return 'CPU'
    if options.system in IN_PYTORCH:
        return sys.modules['torch'].cuda.get_device_name()
    number = extensions.device_of(system.comm).device.id
    return cuda.cupy.cuda.runtime.getDeviceProperties(number)['name'].decode()


def measure(options, mpi) -> dict:
    """Trains as many iterations as are timed, which do not count, and then those.

    Returns:
        dict: ``left_out``, the reason, if the system cannot run here. Else its figures, as means
            over the ranks; of the memory, in bytes, the most of a rank.
    """
    for rank, reason in enumerate(mpi.allgather(why_not(options, mpi))):
        if reason:
            return {'left_out': reason if rank == 0 else f'rank {rank}: {reason}'}
    train, val = images_of(options, mpi)
    before = memory('VmRSS')
    system, losses = ranks.on_every_rank(mpi, lambda: system_of(options, train, val, mpi))
    with system.batches:
        system.run(options.folder, options.timed)
        seconds = system.run(options.folder, options.timed)
        own = np.array([float(loss.mean()) for loss in losses])
        grown = report.device_memory() if system.on_gpu else memory('VmHWM') - before
    if options.system in IN_PYTORCH:
        system.close()
    return {
        'device': device_name(options, system),
        'blas': blas(),
        'functions': options.functions,
        'seconds': (mpi.allreduce(seconds) / mpi.size).tolist(),
        'losses': (mpi.allreduce(own) / mpi.size).tolist(),
        'memory': mpi.allreduce(grown, MPI.MAX),
        'peak': mpi.allreduce(memory('VmHWM'), MPI.MAX),
    }


def main():
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    mpi = MPI.COMM_WORLD
    result = measure(options, mpi)
    if mpi.rank == 0:
        Path(options.result).write_text(json.dumps(result))


if __name__ == '__main__':
    ranks.run(main)
