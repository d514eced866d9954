"""Virtual workers: P processes play the paper's n workers, n / P each, one after the other."""

from __future__ import annotations

import collections
import contextlib
import signal
import threading

import chainer
import numpy as np
from chainer import reporter, training
from chainer.training import extension

from extensions.communicator_base import NonFiniteGradients
from extensions.gradients import joined_gradients, parts_of
from extensions.timing import untimed


class VirtualWorkersUpdater(training.Updater):
    """Updater in which each process plays its share of the workers in every iteration.

    Each worker has its own minibatch, and this minibatch's statistics normalize it. Each worker's
    gradient is rounded to the communicator's dtype separately, as if the worker were a process. One
    all-reduce and one update follow, so ``t`` rises by exactly one per iteration. When n = P, the
    usual case, the loop runs once.

    Process r of P plays the workers r n / P to (r + 1) n / P - 1.

    A communicator with the methods ``add_grad``, ``mean_grad`` and ``discard``, such as
    :class:`~extensions.exact_mpi.HalfPrecisionMpiCommunicator`, gives the same bits for every P, if
    ``batches``, ``converter`` and ``loss_function`` depend on nothing but the iteration, the worker
    and the parameters. Dropout breaks this: it draws from one generator per process. To keep it,
    seed that generator in ``batches``, from the iteration and the worker.

    Communicators based on ChainerMN's own, such as ``pure_nccl``, have no such methods. With them,
    each worker's gradient is rounded, and the gradients are added in float32 on the device. The
    communicator then all-reduces the mean over the process's workers.

    The optimizer's loss scale is honoured: each worker's gradient is multiplied by it before the
    rounding. What ``loss_function`` reports is that of the process's last worker.

    An exception or Ctrl-C before the parameters are updated discards the iteration: a further call
    of :meth:`update` plays it again, with the same bits. During the parameters' update, Ctrl-C
    waits. An exception in the optimizer itself, as in one of its hooks, can leave some parameters
    updated. An exception on one rank only does not reach the other ranks, which wait for it: end
    all ranks, as :func:`~extensions.half_precision.create_communicator` does by default.

    Args:
        batches (callable): ``batches(iteration, worker)`` returns the worker's minibatch, as
            ``converter`` takes it. To resume, only ``iteration`` must be saved.
        optimizer (~chainer.Optimizer): A plain optimizer, not a multi-node optimizer, that is set
            up.
        loss_function (callable): Takes the converted minibatch, as Chainer's StandardUpdater passes
            it (the items of a tuple or dict as arguments), and returns the scalar loss, averaged
            over the minibatch.
        comm (~chainermn.CommunicatorBase): The processes.
        n_workers (int): n, a multiple of the number of processes.
        epoch_size (tuple of int): Total batch size and number of training images. An epoch is the
            number of iterations, with its fraction, in which the workers see this many images.
        converter (callable): Turns a minibatch into arrays on the model's device.
        batch_statistics (~extensions.batch_statistics.AllreduceBatchStatistics): Is notified of
            each worker's forward pass.

    Attributes:
        iteration (int): Number of completed updates.
        workers (range): The workers that this process plays.
        batch_statistics: The argument.
        images_done (int): Number of images used by all workers. In the current iteration, this
            process assumes that the others are as far as itself.
        after_worker (callable): Called after each of this process's workers; None by default.
        losses (list): One array per iteration since the list was last cleared: the losses of this
            process's workers. Kept for :class:`MeanTrainingLoss`; None without it.
        timer (~extensions.timing.Timer): Times the parts of an iteration; set by
            :class:`~extensions.timing.TimeReport`.

    Raises:
        ValueError: ``n_workers`` is not a multiple of the number of processes.
        ValueError: A parameter has no size yet. The message names it.
        ValueError: A number of ``epoch_size`` is not above 0.
        TypeError: ``optimizer`` is a multi-node optimizer, or is not set up.
        ValueError: The optimizer's loss scale is dynamic, which needs infinite gradients, and the
            communicator stops at these.
        TypeError, ValueError: In the first update: the loss is not one number, or depends on no
            parameter of the optimizer's model.
        RuntimeError: In an update: ``chainer.config.train`` is False, with ``batch_statistics``.
    """

    def __init__(
        self,
        batches,
        optimizer,
        loss_function,
        comm,
        n_workers,
        epoch_size,
        converter=lambda batch: batch,
        batch_statistics=None,
    ):
        self.workers = workers_of(comm.rank, comm.size, n_workers)
        self._total_batch_size, self._n_images = epoch_size
        if not (self._total_batch_size > 0 and self._n_images > 0):
            raise ValueError(f'the numbers of epoch_size must be above 0, not {epoch_size}')
        _check_optimizer(optimizer, comm)
        sizeless = [n for n, p in sorted(optimizer.target.namedparams()) if p.array is None]
        if sizeless:
            raise ValueError(
                'every process would initialize its own values. First give these parameters a '
                'size, or send a minibatch through the model and broadcast the model: '
                f'{", ".join(sizeless)}'
            )
        optimizer.use_auto_new_epoch = True
        self.iteration = 0
        self.losses = None
        self.after_worker = None
        self.timer = untimed
        self._n_played = 0  # workers played in the current iteration
        self._batches = batches
        self._optimizer = optimizer
        self._loss_function = loss_function
        self._comm = comm
        self._converter = converter
        self.batch_statistics = self._notified = batch_statistics
        if batch_statistics and len(self.workers) == 1 and not batch_statistics.wants_every_worker:
            self._notified = None  # the links hold all that counts
        self._gradients = comm if hasattr(comm, 'add_grad') else _LocalMean(comm, len(self.workers))

    @property
    def epoch(self):
        return self.iteration * self._total_batch_size // self._n_images

    @property
    def epoch_detail(self):
        return self.iteration * self._total_batch_size / self._n_images

    @property
    def previous_epoch_detail(self):
        return max(self.iteration - 1, 0) * self._total_batch_size / self._n_images

    @property
    def images_done(self):
        share = self._n_played * self._total_batch_size // len(self.workers)
        return self.iteration * self._total_batch_size + share

    @property
    def is_new_epoch(self):
        return int(self.previous_epoch_detail) < self.epoch

    def connect_trainer(self, trainer):
        pass

    def get_optimizer(self, name):
        return {'main': self._optimizer}[name]

    def get_all_optimizers(self):
        return {'main': self._optimizer}

    def finalize(self):
        pass

    def update(self):
        if self.batch_statistics and not chainer.config.train:
            raise RuntimeError(
                'chainer.config.train is False: BatchNormalization then keeps no statistics of its '
                'minibatches, but the updater has batch_statistics'
            )
        model = self._optimizer.target
        losses = []
        self._n_played = 0
        if self._notified:
            self._notified.clear()
        with self._discarded_if_it_fails():
            for worker in self.workers:
                losses.append(self._play(worker, model))
            with self.timer('allreduce'):
                self._mean_grad(model)
        with _interrupted_only_afterwards():
            with self._discarded_if_it_fails(), self.timer('update'):
                self._optimizer.update()
            self.iteration, self._n_played = self.iteration + 1, 0
            if self.is_new_epoch:
                self._optimizer.new_epoch(auto=True)
            if self.losses is not None:
                self.losses.append(chainer.backend.get_array_module(losses[0]).stack(losses))

    def _play(self, worker, model):
        """Adds the worker's gradients, and returns its loss."""
        with self.timer('data'):
            batch = self._converter(self._batches(self.iteration, worker))
        with self.timer('forward_backward'):
            loss = self._backward(batch, model)
        with self.timer('pack'):
            self._gradients.add_grad(model)
        if self._notified:
            self._notified.add_worker()
        self._n_played += 1
        if self.after_worker:
            self.after_worker()
        return loss

    def _backward(self, batch, model):
        model.cleargrads()
        loss = _call(self._loss_function, batch)
        if not isinstance(loss, chainer.Variable) or loss.size != 1:
            raise TypeError(f'loss_function must return one number as a Variable, not {loss!r}')
        loss.backward(loss_scale=self._optimizer._loss_scale)
        if all(param.grad is None for param in model.params()):
            raise ValueError(
                "no parameter of the optimizer's model has a gradient: does loss_function use "
                'another model?'
            )
        return loss.array

    def _mean_grad(self, model):
        try:
            self._gradients.mean_grad(model)
        except NonFiniteGradients as error:
            raise NonFiniteGradients(f'iteration {self.iteration + 1}: {error}') from None

    @contextlib.contextmanager
    def _discarded_if_it_fails(self):
        """Leaves nothing of an iteration that fails for the next one."""
        config = vars(chainer.config._local)
        before = dict(config)
        try:
            yield
        except BaseException:
            # Ctrl-C at the border of a ``with chainer.using_config(...)`` leaves its value.
            config.clear()
            config.update(before)
            self._n_played = 0
            self._gradients.discard()
            if self.batch_statistics:
                self.batch_statistics.discard()
            raise

    def serialize(self, serializer):
        self._optimizer.serialize(serializer['optimizer:main'])
        self._optimizer.target.serialize(serializer['model:main'])
        self.iteration = serializer('iteration', self.iteration)


def workers_of(rank, n_processes, n_workers) -> range:
    """Returns the workers that a process plays."""
    if n_workers < 1 or n_workers % n_processes:
        raise ValueError(
            f'{n_workers} workers cannot be spread evenly over {n_processes} processes: choose a '
            'multiple of the number of processes'
        )
    each = n_workers // n_processes
    return range(rank * each, (rank + 1) * each)


def _check_optimizer(optimizer, comm):
    if not isinstance(optimizer, chainer.Optimizer) or optimizer.target is None:
        raise TypeError(
            'VirtualWorkersUpdater needs a plain Chainer optimizer that is set up, '
            f'optimizer.setup(model), not {optimizer!r}: it averages the gradients itself'
        )
    if optimizer._loss_scaling_is_dynamic and getattr(comm, 'stop_on_nonfinite', False):
        raise ValueError(
            'a dynamic loss scale tries scales until gradients are infinite: create the '
            'communicator with stop_on_nonfinite=False, or set a fixed scale'
        )


def _call(function, batch):
    if isinstance(batch, dict):
        return function(**batch)
    return function(*batch) if isinstance(batch, (tuple, list)) else function(batch)


@contextlib.contextmanager
def _interrupted_only_afterwards():
    """Lets Ctrl-C wait: half an update of the parameters could not be undone."""
    handler = signal.getsignal(signal.SIGINT)
    # Only the main thread gets signals. None is a handler that Python cannot put back.
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    caught: list = []
    signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for _ in caught:
            signal.raise_signal(signal.SIGINT)


class _LocalMean:
    """Mean over a process's workers on the device; ChainerMN then averages over the processes.

    With one worker, the mean is the gradient itself. The communicator rounds it when packing.
    """

    def __init__(self, comm, n_workers):
        self._comm = comm
        self._n_workers = n_workers
        self._dtype = getattr(comm, 'allreduce_grad_dtype', None) or np.dtype(np.float32)
        self._scale = getattr(comm, 'gradient_scale', 1)
        self.discard()

    def discard(self):
        self._names = []  # of the first worker's gradients
        self._sum = None  # float32, of these gradients, one after the other
        self._counts = collections.Counter()

    def add_grad(self, model):
        if self._n_workers == 1:
            return
        with_grad = [(n, p) for n, p in model.namedparams() if p.grad is not None]
        if not with_grad:
            return
        names, params = zip(*with_grad)
        self._counts.update(names)
        if self._sum is None:
            self._names, self._sum = names, self._rounded(params)
        elif self._names == names:
            self._sum += self._rounded(params)

    def _rounded(self, params):
        """Returns the gradients one after the other. On a GPU, a few kernels process them all."""
        with chainer.using_device(params[0].device):
            gradients = joined_gradients(params)
            if self._scale != 1:
                gradients *= self._scale
            rounded = gradients.astype(self._dtype, copy=False)
            return rounded.astype(np.float32, copy=False)

    def mean_grad(self, model):
        differing = sorted(n for n, count in self._counts.items() if count != self._n_workers)
        if differing:
            raise ValueError(
                f'the workers of rank {self._comm.rank} have gradients of different parameters: '
                + ', '.join(differing)
            )
        if self._names:
            params = dict(model.namedparams())
            self._give_mean([params[name] for name in self._names])
        self.discard()
        self._comm.multi_node_mean_grad(model)

    def _give_mean(self, params):
        with chainer.using_device(params[0].device):
            mean = self._sum / (self._n_workers * self._scale)
            for param, part in zip(params, parts_of(mean, params)):
                param.grad = part.astype(param.dtype, copy=False)


class MeanTrainingLoss(training.Extension):
    """Reports ``main/loss``: the mean over all workers and the iterations since the last call.

    Each call sends one message. The sum is in float64, by iteration and in the order of the
    workers, for every P. After :meth:`gather`, losses that were not reported yet can be saved, and
    loaded on another number of processes. Chainer's ``snapshot`` does not call it: let both have
    the same trigger.

    A loss function that reports ``main/loss`` itself, as Chainer's Classifier does, reports that of
    one worker in each iteration, and a LogReport averages these in: give the updater a function
    that does not report.

    Args:
        comm (~chainermn.CommunicatorBase): The processes of a :class:`VirtualWorkersUpdater`.

    Raises:
        TypeError: When the training starts: the updater collects no losses, as Chainer's
            StandardUpdater.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_WRITER

    def __init__(self, comm):
        self._comm = comm
        self._local: list = []  # this process's, since the last gather
        self._losses = None  # [iterations, workers], for all processes

    def initialize(self, trainer):
        if not hasattr(trainer.updater, 'losses'):
            raise TypeError(
                f'MeanTrainingLoss needs VirtualWorkersUpdater: {type(trainer.updater).__name__} '
                'does not collect the losses of its workers'
            )
        trainer.updater.losses = self._local

    def __call__(self, trainer=None):
        self.gather()
        if self._losses is not None:
            reporter.report({'main/loss': float(self._losses.mean())})
        self._losses = None

    def gather(self):
        """Gives every process the losses of all processes. Collective; call it before saving."""
        losses = self._local
        if not losses:
            return
        xp = chainer.backend.get_array_module(losses[0])
        local = np.ascontiguousarray(
            chainer.backends.cuda.to_cpu(xp.stack(losses)), dtype=np.float64
        )
        losses.clear()
        everyone = np.empty((self._comm.size, *local.shape))
        self._comm.mpi_comm.Allgather(local, everyone)
        gathered = [np.concatenate(list(everyone), axis=1)]
        if self._losses is not None:
            gathered.insert(0, self._losses)
        self._losses = np.concatenate(gathered)

    def serialize(self, serializer):
        if isinstance(serializer, chainer.Serializer):
            serializer('losses', np.empty((0, 0)) if self._losses is None else self._losses)
        else:
            losses = serializer('losses', None)
            self._losses = losses if losses.size else None
            self._local.clear()  # of iterations after the saved one
