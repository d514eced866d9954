"""How long does each part of an iteration take? The program that iteration.py starts on each rank.

python -m reproduce.studies.speed.iteration_program OPTIONS

OPTIONS is JSON: the options of iteration.py, and the name of the file ``result``. The systems, ours
and ChainerMN's, take turns, a round each. A round is an epoch of a few iterations. Both systems end
a round with the BN statistics and the evaluator. Rank 0 writes the seconds of all rounds to
``result``.
"""

from __future__ import annotations

from reproduce.job import start

if __name__ == '__main__':
    start.before_mpi()

import argparse
import json
import os
import sys
import tempfile
import time
import typing
from pathlib import Path

import extensions  # isort: skip
import chainer
import chainer.functions as F
import chainermn
import numpy as np
from chainer.backends import cuda
from chainer.optimizer_hooks import WeightDecay
from chainer.training import extensions as chainer_extensions
from chainermn.communicators import pure_nccl_communicator
from chainermn.extensions import AllreducePersistent
from mpi4py import MPI

from extensions.evaluation import shard
from extensions.timing import PARTS, TimedSteps, Timer, untimed
from reproduce import images, listing
from reproduce.job import functions, ranks
from reproduce.job.countdown import duration
from reproduce.loader import ImageLoader
from reproduce.order import ImageOrder
from reproduce.resnet50 import ResNet50
from reproduce.settings import Settings
from reproduce.studies.speed.decoding import write_jpeg
from reproduce.train import decayed_parameters, experiment

_N_MADE = 64  # JPEG files, at least


def settings_of(options, n_workers) -> Settings:
    """Returns the settings of a training in which a round is an epoch."""
    side = options.image_size
    return Settings(
        workers=n_workers,
        local_batch_size=options.local_batch_size,
        epochs=10 * (options.repeat + 1),  # stays in the warm-up, where the update costs most
        allreduce_grad_dtype=options.allreduce_grad_dtype,
        width=options.width,
        stem=options.stem,
        functions=options.functions,
        image_size=side,
        resize=side * 256 // 224,
        loader=options.loader,
        validation_batch_size=options.local_batch_size,
        out=options.folder,
    )


def loader_of(settings, train, val, rank) -> ImageLoader:
    """Returns the images that ours would give to a rank that is one worker."""
    return ImageLoader(
        train,
        val,
        ImageOrder(len(train), settings.workers, settings.local_batch_size, settings.seed),
        settings.preprocessing,
        settings.seed,
        range(rank, rank + 1),
        settings.loader,
        settings.validation_batch_size,
    )


class _System:
    """A training that runs in rounds of ``n_iterations``.

    A subclass makes all attributes except ``timer``.

    Attributes:
        comm (~chainermn.CommunicatorBase): The processes.
        batches (ImageLoader): The images.
        updater (~chainer.training.Updater): Trains.
        entries (list): The extensions. Each entry is the arguments of
            :meth:`~chainer.training.Trainer.extend`.
        timer (Timer): Times the present round.
    """

    comm: typing.Any
    batches: ImageLoader
    updater: typing.Any
    entries: list
    timer: typing.Any = staticmethod(untimed)

    def __init__(self, n_iterations):
        self._n_iterations = n_iterations
        self.on_gpu = extensions.device_of(self.comm).xp is not np

    def give_timer(self):
        """Passes ``timer`` on to the objects that keep a timer of their own."""
        raise NotImplementedError

    def run(self, out, n_iterations=None) -> np.ndarray:
        """Runs a round, or so many iterations.

        Returns:
            array: Seconds per iteration of each part, seconds per iteration by the host's clock,
                and seconds of the round's validation.
        """
        n_iterations = n_iterations or self._n_iterations
        last = self.updater.iteration + n_iterations
        trainer = chainer.training.Trainer(
            self.updater, lambda trainer: trainer.updater.iteration >= last, out
        )
        for arguments in self.entries:
            trainer.extend(*arguments)
        self.comm.mpi_comm.Barrier()
        self.timer = Timer(self.on_gpu, skip=0)
        self.give_timer()
        start = time.perf_counter()
        trainer.run(show_loop_exception_msg=False)
        if self.on_gpu:
            cuda.Stream.null.synchronize()
        whole = time.perf_counter() - start
        seconds, _ = self.timer.take()
        validation = seconds['validation']
        parts = [seconds[part] for part in PARTS]
        return np.array([*np.divide([*parts, whole - validation], n_iterations), validation])


class Ours(_System):
    """Our system: ``experiment()`` of reproduce/train.py, with a job's silent extensions.

    These are the log, the checkpoints and the report of the cast. A job's printing is left out.
    """

    def __init__(self, options, train, val, mpi, dtype):
        settings = settings_of(options, mpi.size)
        communicator_options = {**settings.communicator_options, 'allreduce_grad_dtype': dtype}
        self.comm = extensions.create_communicator(mpi_comm=mpi, **communicator_options)
        device = extensions.device_of(self.comm)
        options.functions = functions.choose(mpi, options.functions, device)
        trainer, self.batches = experiment(settings, self.comm, train, val)
        self.updater = trainer.updater
        self.model = self.updater.get_optimizer('main').target
        self._evaluator = trainer.get_extension('validation')
        # A trainer can run only once, so each round makes its own with these extensions. Under its
        # own name, the evaluator would make the Checkpointer save each model that is the best.
        self.entries = [
            (entry.extension, f'round_{name}', entry.trigger, entry.priority)
            for name, entry in trainer._extensions.items()
        ]
        self.entries.append((chainer_extensions.LogReport(filename=None),))
        self.entries.append(
            (extensions.Checkpointer(self.comm, options.folder, {}, every='1000000'),)
        )
        if hasattr(self.comm, 'cast_counts'):
            self.entries.append((extensions.CastReport(self.comm),))
        super().__init__(options.iterations)

    def give_timer(self):
        for timed in (self.updater, self.comm, self._evaluator):
            timed.timer = self.timer


class _TimedPureNccl(TimedSteps, pure_nccl_communicator.PureNcclCommunicator):
    pass


class ChainerMN(_System):
    """ChainerMN's own way.

    It has ChainerMN's multi-node optimizer around Chainer's CorrectedMomentumSGD, ChainerMN's
    AllreducePersistent and its evaluator. On CPUs the communicator is ``naive``, in float32. On
    GPUs it is ``pure_nccl``, with the dtype of ``--allreduce-grad-dtype``.
    """

    def __init__(self, options, train, val, mpi, on_gpu):
        settings = settings_of(options, mpi.size)
        self.batch_size, self.n_images = settings.local_batch_size, len(val)
        if on_gpu:
            self.comm = _TimedPureNccl(mpi)
            self.comm.set_config('batched_copy', True)
            self.comm.set_config('allreduce_grad_dtype', options.allreduce_grad_dtype)
        else:
            self.comm = chainermn.create_communicator('naive', mpi_comm=mpi)
        super().__init__(options.iterations)
        comm = self.comm
        self.batches = loader_of(settings, train, val, comm.rank)
        device = extensions.device_of(comm)
        converter = images.converter_to(device)
        model = ResNet50(
            len(train.classes), settings.width, settings.stem, settings.seed, settings.shallow
        )
        model.to_device(device)
        optimizer = chainermn.create_multi_node_optimizer(
            chainer.optimizers.CorrectedMomentumSGD(settings.lr_base, settings.mu1), comm
        ).setup(model)
        for param in decayed_parameters(model):
            param.update_rule.add_hook(WeightDecay(settings.weight_decay))

        def loss_function(x, t):
            loss = F.softmax_cross_entropy(model(x), t)
            chainer.report({'loss': loss}, model)
            return loss

        self.updater = chainer.training.StandardUpdater(
            _TrainingIterator(self, options.iterations),
            optimizer,
            self._timed('data', converter),
            loss_func=loss_function,
        )
        evaluator = chainermn.create_multi_node_evaluator(
            chainer_extensions.Evaluator(
                _ValidationIterator(self), chainer.links.Classifier(model), converter
            ),
            comm,
        )
        # The same parts as in ours. The rest of update() is forward and backward.
        object.__setattr__(optimizer, 'update', self._timed('forward_backward', optimizer.update))
        object.__setattr__(optimizer, 'is_changed', self._timed('allreduce', optimizer.is_changed))
        comm.multi_node_mean_grad = self._timed('allreduce', comm.multi_node_mean_grad)
        rule = optimizer.actual_optimizer
        rule.update = self._timed('update', rule.update)
        evaluator.evaluate = self._timed('validation', evaluator.evaluate)
        self.entries = [
            (AllreducePersistent(model, comm),),
            (evaluator,),
            (chainer_extensions.LogReport(filename=None),),
        ]

    def _timed(self, part, function):
        def timed(*args, **kwargs):
            with self.timer(part):
                return function(*args, **kwargs)

        return timed

    def give_timer(self):
        self.comm.timer = self.timer


class _TrainingIterator(chainer.dataset.Iterator):
    """Gives the loader's training minibatches to Chainer's updater."""

    epoch_detail = previous_epoch_detail = 0.0

    def __init__(self, system, n_iterations):
        self._system = system
        self._n_iterations = n_iterations
        self._n = 0

    def __next__(self):
        system = self._system
        with system.timer('data'):
            batch = system.batches.train_batch(self._n, system.comm.rank)
        self._n += 1
        self.previous_epoch_detail, self.epoch_detail = (
            self.epoch_detail,
            self._n / self._n_iterations,
        )
        return batch

    @property
    def epoch(self):
        return int(self.epoch_detail)

    @property
    def is_new_epoch(self):
        return int(self.previous_epoch_detail) < self.epoch


class _ValidationIterator(chainer.dataset.Iterator):
    """Gives the loader's validation minibatches to Chainer's evaluator."""

    def __init__(self, system):
        self._system = system

    def reset(self):
        system = self._system
        comm, batch_size = system.comm, system.batch_size
        bounds = shard(comm.rank, comm.size, system.n_images, batch_size)
        self._batches = system.batches.validation_batches(*bounds)

    def __next__(self):
        return next(self._batches)


def made_images(folder, side) -> listing.ImageFolder:
    """Makes JPEG files in the folders of ten classes, and lists them as ten of 1,000 classes.

    The size of a file is to ``side`` as 500 x 375, a usual size in ImageNet, is to 224.
    """
    n_classes, each = 10, _N_MADE // 10 + 1
    size = (side * 500 // 224, side * 375 // 224)
    for number in range(n_classes):
        (Path(folder) / str(number)).mkdir()
        for i in range(each):
            write_jpeg(Path(folder) / str(number) / f'{i}.jpg', 1000 * number + i, size)
    files = ''.join(f'{i}.jpg\0' for i in range(each)) * n_classes
    counts = np.repeat([each, 0], [n_classes, 1000 - n_classes])
    return listing.ImageFolder(str(folder), tuple(map(str, range(1000))), counts, files.encode())


def repeated(folder, n_images) -> listing.ImageFolder:
    """Returns a listing of exactly ``n_images`` of the images in ``folder``, repeated if needed."""
    picked = np.arange(n_images) * max(1, len(folder) // n_images) % len(folder)
    picked = picked[np.argsort(folder.labels[picked], kind='stable')]
    counts = np.bincount(folder.labels[picked], minlength=len(folder.classes))
    files = b''.join(os.fsencode(os.path.basename(folder.name(i))) + b'\0' for i in picked)
    return listing.ImageFolder(folder.root, folder.classes, counts, files)


def systems_of(options, data, mpi) -> dict:
    """Makes the systems to time, by name. The first is ours with ``--allreduce-grad-dtype``."""
    dtypes = [options.allreduce_grad_dtype]
    if options.peer and 'float32' not in dtypes:
        dtypes.append('float32')
    total = mpi.size * options.local_batch_size
    folders = repeated(data, options.iterations * total), repeated(data, total)
    systems: dict = {f'ours, {dtype}': Ours(options, *folders, mpi, dtype) for dtype in dtypes}
    if options.peer:
        on_gpu = next(iter(systems.values())).on_gpu
        dtype = options.allreduce_grad_dtype if on_gpu else 'float32'
        systems[f'ChainerMN, {dtype}'] = ChainerMN(options, *folders, mpi, on_gpu)
    return systems


def measure(options, mpi) -> dict | None:
    """Runs the rounds of all systems.

    Returns:
        dict: On rank 0, the machine, and for each system the seconds of each timed round as means
            over the ranks. None on the other ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        if options.image_root:
            data = listing.ImageFolder.unpack(
                ranks.on_rank_zero(mpi, lambda: listing.list_images(options.image_root).pack())
            )
        else:
            data = made_images(folder, options.image_size)
        systems = ranks.on_every_rank(mpi, lambda: systems_of(options, data, mpi))
        seconds: dict = {name: [] for name in systems}
        start = printed = time.monotonic()
        for round_ in range(options.repeat + 1):  # round 0 is not timed
            for name, system in systems.items():
                own = system.run(folder)
                if round_ > 0:
                    seconds[name].append(own)
            now = time.monotonic()
            if mpi.rank == 0 and (round_ == 0 or now - printed > 10):
                left = duration((now - start) / (round_ + 1) * (options.repeat - round_))
                print(f'  {mpi.size} workers: round {round_} of {options.repeat}, {left} left')
                sys.stdout.flush()
                printed = now
        for system in systems.values():
            system.batches.close()
    ours = next(iter(systems.values()))
    means = {name: mpi.reduce(np.array(values)) for name, values in seconds.items()}
    if mpi.rank > 0:
        return None
    return {
        'processes': mpi.size,
        'hosts': ours.comm.inter_size,
        'cores_of_a_host': os.cpu_count(),
        'parameters': ours.model.count_params(),
        'functions': options.functions,
        'seconds': {name: (sums / mpi.size).tolist() for name, sums in means.items()},
    }


def main():
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    result = measure(options, MPI.COMM_WORLD)
    if result:
        Path(options.result).write_text(json.dumps(result))


if __name__ == '__main__':
    ranks.run(main)
