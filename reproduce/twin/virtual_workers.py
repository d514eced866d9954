"""n workers on one GPU or on P processes: each has its own minibatch and its own batch statistics.

A batch of 8 x 32 images on 8 GPUs is not a batch of 256 on one: each GPU normalizes its own 32
images, and rounds its own gradient when it is sent in half precision. Gradient accumulation on one
GPU does the first, but rounds nothing, and validates with the statistics of the last 32 images.
This file gives one process, or P, the step of n GPUs. It needs nothing but PyTorch and NumPy. Take
it into your program::

    model = make_model()  # its BatchNorm layers have momentum=1.0
    workers = VirtualWorkers(model, 8)
    for step in range(100):
        for worker in workers:  # those that this process plays
            x, t = minibatch(step, worker)
            F.cross_entropy(model(x), t).backward()
            workers.add_worker()
        workers.mean_grad()
        optimizer.step()
    workers.average_statistics()  # before a validation
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm


class VirtualWorkers:
    """Plays this process's share of n workers, one after the other. Iterates over their numbers.

    Process r of P plays the workers r n / P to (r + 1) n / P - 1. Give every process the same
    model; DistributedDataParallel must not be around it. With several processes,
    ``torch.distributed`` must be initialized first.

    Each worker's gradient is rounded to ``dtype``. ``exact=True`` sums the rounded gradients in
    float64, on the wire too. A float16 value is a multiple of 2**-24 below 2**16, so the sum of up
    to 8,192 is exact: the mean does not depend on P. ``exact=False`` sums a process's in float32,
    and sends and adds float16, as NCCL on GPUs does.

    Args:
        model (torch.nn.Module): Its parameters that require a gradient take part.
        n_workers (int): n, a multiple of P.
        dtype (torch.dtype): ``torch.float16``, or ``torch.float32`` to round nothing.
        exact (bool): How to add.

    Attributes:
        workers (range): The workers of this process.
        exact (bool): The argument.
        batch_statistics (BatchStatistics): Their batch statistics.

    Raises:
        ValueError: n is not a multiple of P, or as in :class:`BatchStatistics`.
    """

    def __init__(self, model, n_workers, dtype=torch.float16, exact=True):
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.workers = workers_of(rank, size, n_workers)
        self.batch_statistics = BatchStatistics(model)
        self._params = [param for param in model.parameters() if param.requires_grad]
        self._n_processes, self._dtype, self.exact = size, dtype, exact
        self._sum = None
        self._n_added = 0

    def __iter__(self):
        """Begins an iteration: discards gradients, and what an iteration that failed has left."""
        for param in self._params:
            param.grad = None
        self._n_added = 0
        self.batch_statistics.clear()
        return iter(self.workers)

    @torch.no_grad()
    def add_worker(self):
        """Takes the gradients and the batch statistics of the worker that was just played.

        Raises:
            ValueError: A parameter has no gradient.
        """
        if any(param.grad is None for param in self._params):
            raise ValueError('a parameter has no gradient: call backward() before add_worker()')
        gradients = torch.cat([param.grad.flatten() for param in self._params])
        rounded = gradients.to(self._dtype).to(torch.float64 if self.exact else torch.float32)
        self._sum = rounded if self._n_added == 0 else self._sum.add_(rounded)
        self._n_added += 1
        self.batch_statistics.add_worker()
        for param in self._params:
            param.grad = None

    @torch.no_grad()
    def mean_grad(self):
        """Sets the gradients to their mean over all n workers. Collective.

        Raises:
            ValueError: Not every worker of this process was added.
        """
        each = len(self.workers)
        if self._n_added != each:
            raise ValueError(f'add_worker() was called {self._n_added} times, not {each}')
        total, self._sum, self._n_added = self._sum, None, 0
        if not self.exact:
            total = (total / each).to(self._dtype)
            each = 1
        if self._n_processes > 1:
            dist.all_reduce(total)
        mean = rounded_once(total / (each * self._n_processes), self._dtype)
        sizes = [param.numel() for param in self._params]
        for param, part in zip(self._params, mean.to(self._params[0].dtype).split(sizes)):
            param.grad = part.view_as(param)

    def average_statistics(self):
        """Gives every process the mean of all workers' batch statistics. Collective."""
        self.batch_statistics.average()


def workers_of(rank, n_processes, n_workers) -> range:
    """Returns the workers that a process plays."""
    if n_workers < 1 or n_workers % n_processes:
        raise ValueError(
            f'{n_workers} workers cannot be spread evenly over {n_processes} processes'
        )
    each = n_workers // n_processes
    return range(rank * each, (rank + 1) * each)


class BatchStatistics:
    """Averages the last minibatch's mean and variance over all workers::

        mean = 1/n sum_w mean_w        var = 1/n sum_w var_w

    Sums are in float64, and carry all layers in one message. Without :meth:`add_worker`, each
    process is one worker.

    Args:
        model (torch.nn.Module): Contains the BatchNorm layers.

    Raises:
        ValueError: A layer keeps moving averages: its momentum is not 1. The message names it.
    """

    def __init__(self, model):
        self._layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
        for name, layer in model.named_modules():
            if isinstance(layer, _BatchNorm) and layer.momentum != 1:
                raise ValueError(
                    f'{name} has momentum {layer.momentum}, so that its statistics mix the '
                    'workers of a process; set momentum=1.0, for those of the last minibatch'
                )
        self.clear()

    def clear(self):
        """Discards the workers added so far."""
        self._sum, self._n_workers = None, 0

    @torch.no_grad()
    def add_worker(self):
        """Adds the statistics of the minibatch that has just passed through the model."""
        if self._layers:
            statistics = torch.cat([array.double() for array in self._arrays()])
            self._sum = statistics if self._sum is None else self._sum + statistics
            self._n_workers += 1

    @torch.no_grad()
    def average(self):
        """Gives every process the average. Collective; every process has as many workers."""
        if not self._layers:
            return
        if self._n_workers == 0:
            self.add_worker()
        total, n_workers = self._sum, self._n_workers
        self.clear()
        if dist.is_initialized():
            dist.all_reduce(total)
            n_workers *= dist.get_world_size()
        total /= n_workers
        arrays = self._arrays()
        for array, part in zip(arrays, total.split([array.numel() for array in arrays])):
            array.copy_(part)

    def _arrays(self):
        return [array for b in self._layers for array in (b.running_mean, b.running_var)]


def rounded_once(x, dtype):
    """Returns ``x`` in ``dtype``. From float64 to float16, PyTorch would round to float32 first."""
    if x.dtype == torch.float64 and dtype == torch.float16 and x.device.type == 'cpu':
        with np.errstate(over='ignore'):
            return torch.from_numpy(x.numpy().astype(np.float16))
    return x.to(dtype)
