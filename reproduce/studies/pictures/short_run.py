"""Starts a training of train.py, watches its updates, and stops it early."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import extensions  # isort: skip  (makes Chainer importable on NumPy 2)
from chainer import training

from reproduce import train
from reproduce.dataset import write_digits
from reproduce.job import functions
from reproduce.listing import list_images
from reproduce.settings import Settings


def run(settings: Settings, n_updates: int, watch: Callable):
    """Trains for some updates. This process plays all workers; it writes and validates nothing.

    The model's functions are the compiled ones, or the same in NumPy: the numbers do not depend on
    the processor.

    Args:
        settings (Settings): Of the training. Without ``train_root`` it has the digits.
        n_updates (int): Stop after so many updates. The schedules are those of the whole training.
        watch (callable): ``watch(trainer, batches)`` is called after each update, before the
            schedules set the values of the next one. ``batches`` is the ImageLoader.
    """
    comm = extensions.create_communicator('mpi')
    device = extensions.device_of(comm)
    functions.use(functions.resolve('auto', device), device)
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder, 'digits')
        if settings.train_root is None:
            write_digits(digits)
        roots = settings.train_root or digits / 'train', settings.val_root or digits / 'val'
        images = [list_images(Path(root)) for root in roots]
        trainer, batches = train.experiment(settings, comm, *images)
        for name in ('validation', 'AllreduceBatchStatistics'):
            trainer.get_extension(name).trigger = lambda trainer: False
        trainer.stop_trigger = training.get_trigger((n_updates, 'iteration'))
        trainer.extend(
            lambda trainer: watch(trainer, batches),
            name='watch',
            trigger=(1, 'iteration'),
            priority=training.PRIORITY_WRITER + 1,  # before the losses are collected
        )
        with batches:
            trainer.run(show_loop_exception_msg=False)
