"""Times an iteration with its all-reduce, ours beside ChainerMN's: a program of each rank.

python -m reproduce.iteration_rank OPTIONS runs in turn, a round each, what the JSON of OPTIONS
names, and rank 0 writes the seconds of all rounds to the file that it names, too. A round is an
epoch of a few iterations: at its end come the BN statistics and the evaluator, on both sides.
"""

from __future__ import annotations

from reproduce import loader

if __name__ == '__main__':
    loader.start_forkserver()  # before MPI, as train.py does

from reproduce import abort

if __name__ == '__main__':
    abort.on_uncaught_exception()

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
from reproduce import images, job, listing, loading, train
from reproduce.order import ImageOrder
from reproduce.report import duration
from reproduce.resnet50 import ResNet50

_N_MADE = 64  # files


class _System:
    """What both sides have alike: the model, the images, who loads them, and the rounds.

    Attributes:
        comm (~chainermn.CommunicatorBase): The processes; a subclass makes it before.
        updater (~chainer.training.Updater), extensions (list): A subclass makes them.
        timer (Timer): Of the round under way.
    """

    comm: typing.Any
    updater: typing.Any
    extensions: list

    def __init__(self, options, data):
        comm, self.timer = self.comm, untimed
        self.device = extensions.device_of(comm)
        self.n_iterations = options.iterations
        side = options.image_size
        self.batch_size = batch_size = options.local_batch_size
        self.total_batch_size = comm.size * batch_size
        self.epoch_size = (self.total_batch_size, self.n_iterations * self.total_batch_size)
        order = ImageOrder(len(data), comm.size, batch_size, seed=0)
        self.batches = loader.ImageLoader(
            data,
            data,
            order,
            images.Preprocessing(side, side * 256 // 224),
            0,
            range(comm.rank, comm.rank + 1),
            options.loader,
            batch_size,
        )
        n_classes = len(data.classes) if options.image_root else 1000
        self.model = ResNet50(n_classes, options.width, options.stem, seed=0)
        self.model.to_device(self.device)

    def to_device(self, batch, device=None):
        x, t = (self.device.send(array) for array in batch)
        return images.normalize(x, images.MEAN, images.STD, self.device.xp), t

    def give_timer(self):
        """Hands on ``timer`` where it is not asked for in every call."""
        raise NotImplementedError

    def run(self, out) -> np.ndarray:
        """A round.

        Returns:
            array: Seconds of an iteration's parts, and of the whole iteration by the host's clock;
                seconds of the validation, once a round.
        """
        last = self.updater.iteration + self.n_iterations
        trainer = chainer.training.Trainer(
            self.updater, lambda trainer: trainer.updater.iteration >= last, out
        )
        for extension in self.extensions:
            trainer.extend(extension)
        self.comm.mpi_comm.Barrier()
        self.timer = Timer(self.device.xp is not np, skip=0)
        self.give_timer()
        start = time.perf_counter()
        trainer.run(show_loop_exception_msg=False)
        if self.device.xp is not np:
            cuda.Stream.null.synchronize()
        whole = time.perf_counter() - start
        seconds, _ = self.timer.take()
        validation = seconds['validation']
        parts = [seconds[part] for part in PARTS]
        return np.array([*np.divide([*parts, whole - validation], self.n_iterations), validation])


class Ours(_System):
    """What train.py puts together, without what it prints and writes."""

    def __init__(self, options, data, mpi, dtype):
        self.comm = comm = extensions.create_communicator('auto', dtype, mpi)
        super().__init__(options, data)
        model = self.model
        self.comm.bcast_data(model)
        lr = extensions.base_learning_rate(self.total_batch_size)
        optimizer = extensions.RMSpropWarmup(lr).setup(model)
        for param in train.decayed_parameters(model):
            param.update_rule.hyperparam.weight_decay_rate = 1e-4
        statistics = extensions.AllreduceBatchStatistics(model, comm)
        self.updater = extensions.VirtualWorkersUpdater(
            self.batches.train_batch,
            optimizer,
            lambda x, t: F.softmax_cross_entropy(model(x), t),
            comm,
            comm.size,
            self.epoch_size,
            converter=self.to_device,
            batch_statistics=statistics,
        )
        self._evaluator = extensions.ExactEvaluator(
            self.batches.validation_batches,
            model,
            comm,
            self.total_batch_size,
            options.local_batch_size,
            converter=self.to_device,
        )
        # Long enough to stay in the warm-up, where the update does most.
        schedule = (*self.epoch_size, 10 * (options.repeat + 1))
        self.extensions = [
            extensions.StepLearningRate(*schedule),
            extensions.AlphaSGDSchedule(*schedule),
            statistics,
            self._evaluator,
            extensions.MeanTrainingLoss(comm),
            chainer_extensions.LogReport(filename=None),
            extensions.Checkpointer(comm, options.folder, {}, every='1000000'),
        ]
        if hasattr(comm, 'cast_counts'):
            self.extensions.append(extensions.CastReport(comm))

    def give_timer(self):
        for timed in (self.updater, self.comm, self._evaluator):
            timed.timer = self.timer


class _TimedPureNccl(TimedSteps, pure_nccl_communicator.PureNcclCommunicator):
    pass


class ChainerMN(_System):
    """ChainerMN's own way: its multi-node optimizer around Chainer's CorrectedMomentumSGD, its
    AllreducePersistent and its evaluator, on its communicator: ``naive``, in float32, on CPUs,
    ``pure_nccl`` with the dtype that is asked for on GPUs."""

    def __init__(self, options, data, mpi, on_gpu):
        if on_gpu:
            self.comm = _TimedPureNccl(mpi)
            self.comm.set_config('batched_copy', True)
            self.comm.set_config('allreduce_grad_dtype', options.allreduce_grad_dtype)
        else:
            self.comm = chainermn.create_communicator('naive', mpi_comm=mpi)
        super().__init__(options, data)
        comm, model = self.comm, self.model
        lr = extensions.base_learning_rate(self.total_batch_size)
        optimizer = chainermn.create_multi_node_optimizer(
            chainer.optimizers.CorrectedMomentumSGD(lr, 0.9), comm
        ).setup(model)
        for param in train.decayed_parameters(model):
            param.update_rule.add_hook(WeightDecay(1e-4))

        def loss_function(x, t):
            loss = F.softmax_cross_entropy(model(x), t)
            chainer.report({'loss': loss}, model)
            return loss

        self.updater = chainer.training.StandardUpdater(
            _TrainingIterator(self),
            optimizer,
            self._timed('data', self.to_device),
            loss_func=loss_function,
        )
        evaluator = chainermn.create_multi_node_evaluator(
            chainer_extensions.Evaluator(
                _ValidationIterator(self), chainer.links.Classifier(model), self.to_device
            ),
            comm,
        )
        # Where ours has its parts, too. All else that is in update() is forward and backward.
        object.__setattr__(optimizer, 'update', self._timed('forward_backward', optimizer.update))
        object.__setattr__(optimizer, 'is_changed', self._timed('allreduce', optimizer.is_changed))
        comm.multi_node_mean_grad = self._timed('allreduce', comm.multi_node_mean_grad)
        rule = optimizer.actual_optimizer
        rule.update = self._timed('update', rule.update)
        evaluator.evaluate = self._timed('validation', evaluator.evaluate)
        self.extensions = [
            AllreducePersistent(model, comm),
            evaluator,
            chainer_extensions.LogReport(filename=None),
        ]

    def _timed(self, part, function):
        def timed(*args, **kwargs):
            with self.timer(part):
                return function(*args, **kwargs)

        return timed

    def give_timer(self):
        self.comm.timer = self.timer


class _TrainingIterator(chainer.dataset.Iterator):
    """The same minibatches, as Chainer's updater takes them."""

    epoch_detail = previous_epoch_detail = 0.0

    def __init__(self, system):
        self._system = system
        self._n = 0

    def __next__(self):
        system = self._system
        with system.timer('data'):
            batch = system.batches.train_batch(self._n, system.comm.rank)
        self._n += 1
        self.previous_epoch_detail, self.epoch_detail = (
            self.epoch_detail,
            self._n / system.n_iterations,
        )
        return batch

    @property
    def epoch(self):
        return int(self.epoch_detail)

    @property
    def is_new_epoch(self):
        return int(self.previous_epoch_detail) < self.epoch


class _ValidationIterator(chainer.dataset.Iterator):
    """The same minibatches, as Chainer's evaluator takes them."""

    def __init__(self, system):
        self._system = system

    def reset(self):
        system = self._system
        comm, batch_size = system.comm, system.batch_size
        bounds = shard(comm.rank, comm.size, system.total_batch_size, batch_size)
        self._batches = system.batches.validation_batches(*bounds)

    def __next__(self):
        return next(self._batches)


def made_images(folder, side, n_images) -> listing.ImageFolder:
    """JPEG files in the proportion to ``side`` that ImageNet's have to 224 pixels; where more
    images are wanted than files are made, they come again."""
    folder = Path(folder)
    classes = tuple('0123456789')
    names = [f'{i}.jpg' for i in range(_N_MADE // len(classes) + 1)]
    for number, name in enumerate(classes):
        (folder / name).mkdir()
        for i, file in enumerate(names):
            size = (side * 500 // 224, side * 375 // 224)
            loading.write_jpeg(folder / name / file, 1000 * number + i, size)
    each = -(-n_images // len(classes))
    files = ''.join(f'{names[i % len(names)]}\0' for i in range(each)) * len(classes)
    return listing.ImageFolder(str(folder), classes, np.full(len(classes), each), files.encode())


def systems_of(options, data, mpi) -> dict:
    """Name to what is timed; ours in the dtype that was asked for is the first."""
    dtypes = [options.allreduce_grad_dtype]
    if options.peer and 'float32' not in dtypes:
        dtypes.append('float32')
    systems: dict = {f'ours, {dtype}': Ours(options, data, mpi, dtype) for dtype in dtypes}
    if options.peer:
        on_gpu = next(iter(systems.values())).device.xp is not np
        dtype = options.allreduce_grad_dtype if on_gpu else 'float32'
        systems[f'ChainerMN, {dtype}'] = ChainerMN(options, data, mpi, on_gpu)
    return systems


def measure(options, mpi) -> dict | None:
    """Runs the rounds.

    Returns:
        dict: On rank 0: the machine, and for each system the seconds of the rounds that count, a
            mean over the ranks for each part; None on the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        n_images = mpi.size * options.local_batch_size
        if options.image_root:
            data = listing.ImageFolder.unpack(
                job.on_rank_zero(mpi, lambda: listing.list_images(options.image_root).pack())
            )
        else:
            data = made_images(folder, options.image_size, n_images)
        systems = job.on_every_rank(mpi, lambda: systems_of(options, data, mpi))
        seconds: dict = {name: [] for name in systems}
        start = said = time.monotonic()
        for round_ in range(options.repeat + 1):  # the first does not count
            for name, system in systems.items():
                own = system.run(folder)
                if round_ > 0:
                    seconds[name].append(own)
            now = time.monotonic()
            if mpi.rank == 0 and (round_ == 0 or now - said > 10):
                left = duration((now - start) / (round_ + 1) * (options.repeat - round_))
                print(f'  {mpi.size} workers: round {round_} of {options.repeat}, {left} left')
                sys.stdout.flush()
                said = now
        for system in systems.values():
            system.batches.close()
    comm = next(iter(systems.values())).comm
    means = {name: mpi.reduce(np.array(values)) for name, values in seconds.items()}
    if mpi.rank > 0:
        return None
    return {
        'processes': mpi.size,
        'hosts': comm.inter_size,
        'cores_of_a_host': os.cpu_count(),
        'parameters': system.model.count_params(),
        'seconds': {name: (sums / mpi.size).tolist() for name, sums in means.items()},
    }


def main():
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    result = measure(options, MPI.COMM_WORLD)
    if result:
        Path(options.result).write_text(json.dumps(result))


if __name__ == '__main__':
    job.run(main)
