"""The systems of "benchmark systems" that are PyTorch's: the twin, and torchvision's recipe."""

from __future__ import annotations

import time

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from extensions.timing import PARTS, Timer
from reproduce.studies.speed.iteration_program import loader_of, settings_of
from reproduce.twin import processes
from reproduce.twin import train as twin
from reproduce.twin.resnet50 import ResNet50
from reproduce.twin.rmsprop_warmup import RMSpropWarmup

_LARGE = 1 << 16  # elements; below, the call of a compiled function costs more than it saves
_EXCHANGE = 300  # seconds until an exchange ends the job


class System:
    """Runs iterations of a training, as the systems of iteration_program.py do.

    DistributedDataParallel all-reduces while the backward pass goes on, so that the two are one
    part.

    Args:
        training (~reproduce.twin.train.Training): The training.
        batches (ImageLoader): Its images.
        job (~reproduce.twin.processes.Processes): PyTorch's job.
        mpi (mpi4py.MPI.Comm): The ranks.
    """

    def __init__(self, training, batches, job, mpi):
        self.batches, self.losses, self.close = batches, training.losses, job.close
        self.on_gpu = training.device.type != 'cpu'
        self._training, self._mpi = training, mpi
        batches.train_batch = self._timed('data', batches.train_batch)
        training.convert = self._timed('data', training.convert)
        training.optimizer.step = self._timed('update', training.optimizer.step)
        training.check_gradients = self._timed('extensions', training.check_gradients)

    def _timed(self, part, function):
        def timed(*args):
            with self._timer(part):
                return function(*args)

        return timed

    def run(self, folder, n_iterations) -> np.ndarray:
        """Runs so many iterations; returns what ``run`` of iteration_program.py returns."""
        self._mpi.Barrier()
        self._timer = Timer(self.on_gpu, skip=0)
        start = time.perf_counter()
        for _ in range(n_iterations):
            with self._timer('forward_backward'):  # the rest of update()
                self._training.update()
        if self.on_gpu:
            torch.cuda.synchronize()
        whole = time.perf_counter() - start
        seconds, _ = self._timer.take()
        return np.array([*(seconds[part] for part in PARTS), whole, 0.0]) / n_iterations


class Torchvision(twin.Training):
    """The step of torchvision's reference recipe, in our own words.

    That is ``references/classification/train.py`` with its default options: SGD, cross entropy,
    DistributedDataParallel as it is. Its model is torchvision's ResNet-50, which has the stride in
    the 3x3 convolution, as the twin's has. So this is the twin's, with its initial values, and with
    torchvision's moving averages. As there, the host reads loss, top-1 and top-5 of each minibatch.
    The learning rate is 0.1 for 256 images.
    """

    def __init__(self, settings, job, train, val):
        model = ResNet50(len(train.classes), settings.width, settings.stem, settings.seed)
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 0.1
        model.to(job.device)
        torch.backends.cudnn.benchmark = True
        optimizer = torch.optim.SGD(
            model.parameters(), settings.lr_base, momentum=0.9, weight_decay=1e-4
        )
        batches = loader_of(settings, train, val, job.rank)
        network = DistributedDataParallel(model)
        super().__init__(
            settings, model, network, range(job.rank, job.rank + 1), optimizer, batches
        )

    def update(self):
        (worker,) = self.workers
        x, t = self.convert(self.batches.train_batch(self.iteration, worker))
        output = self.network(x)
        loss = F.cross_entropy(output, t)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        hits = output.detach().topk(5).indices == t[:, None]
        self.metrics = loss.item(), hits[:, 0].sum().item(), hits.sum().item()
        self.losses.append(loss.detach())
        self.iteration += 1


class CompiledRule(RMSpropWarmup):
    """The twin's rule, by one loop over each large tensor, which torch.compile makes.

    Small tensors stay with the ``foreach`` operators.
    """

    def __init__(self, params, lr, **values):
        super().__init__(params, lr, **values)
        self._fused = torch.compile(_rule, dynamic=True)

    def _update(self, params, **values):
        large = [param for param in params if param.numel() >= _LARGE]
        if small := [param for param in params if param.numel() < _LARGE]:
            super()._update(small, **values)
        for param in large:
            if not self.state[param]:
                self.state[param].update(m=torch.zeros_like(param), delta=torch.zeros_like(param))
            state = self.state[param].values()
            self._fused(*(a.detach().view(-1) for a in (param, param.grad, *state)), **values)


def _rule(p, g, m, delta, lr, alpha_sgd, alpha_rmsprop, mu1, mu2, eps, weight_decay):
    g = g + weight_decay * p
    m.mul_(mu2).addcmul_(g, g, value=1 - mu2)
    delta.mul_(mu1).sub_((alpha_sgd + alpha_rmsprop / (m.sqrt() + eps)) * g)
    p.add_(lr * delta)


def why_not(options) -> str:
    """Returns why the system cannot run here; else nothing."""
    if options.system == 'twin-compiled':
        param = torch.nn.Parameter(torch.zeros(_LARGE))
        param.grad = torch.zeros(_LARGE)
        try:
            CompiledRule([param], 0.1, weight_decay=1e-4).step()
        except Exception as error:  # noqa: BLE001  (of many kinds: no compiler, no headers, ...)
            return f'torch.compile fails: {str(error).strip().splitlines()[0]}; install g++'
    return ''


def system_of(options, train, val, mpi) -> System:
    """Makes the system ``options.system``. Collective."""
    job = processes.Processes(_EXCHANGE)
    settings = settings_of(options, mpi.size)
    if options.system == 'torchvision':
        training = Torchvision(settings, job, train, val)
    else:
        training, _ = twin.experiment(settings, job, train, val)
    if options.system == 'twin-compiled':
        training.optimizer = CompiledRule(training.optimizer.param_groups, settings.lr_base)
    options.functions = f'PyTorch {torch.__version__}'
    return System(training, training.batches, job, mpi)
