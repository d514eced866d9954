"""How fast a GPU is: the programs of the steps that measure.

python -m reproduce.studies.gpu_check.speed STEP FILE FUNCTIONS
    As reproduce.studies.gpu_check.right.
"""

from __future__ import annotations

from reproduce.job import start

if __name__ == '__main__':
    start.before_mpi()

import sys
import time

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer.functions as F
import numpy as np
from chainer.backends import cuda
from mpi4py import MPI

from extensions.timing import Timer
from reproduce.job import functions, ranks, report
from reproduce.resnet50 import ResNet50
from reproduce.studies.gpu_check import checks
from reproduce.studies.gpu_check.right import gpu

N_STREAMS = 7  # of the update: four arrays are read, and three are written


def milliseconds(function, n=20, warm=3, queue=None) -> tuple[float, float, float]:
    """Times a function.

    Args:
        function (callable): Launches work on the device.
        n, warm (int): Calls that are timed, and calls before these.
        queue (callable): Launches work before each call, so that the device is still busy when the
            host has launched all of ``function``. The first result then has no waits for the host.

    Returns:
        tuple of float: Medians, in milliseconds: of the device, by CUDA's events; of the host until
            the device is done; and of the host until it has launched everything.
    """
    times = []
    for i in range(warm + n):
        cuda.Stream.null.synchronize()
        if queue:
            queue()
        before, after = cuda.Event(), cuda.Event()
        begin = time.perf_counter()
        before.record()
        function()
        after.record()
        launched = time.perf_counter() - begin
        after.synchronize()
        whole = time.perf_counter() - begin
        device = cuda.cupy.cuda.get_elapsed_time(before, after) / 1000
        if i >= warm:
            times.append((device, whole, launched))
    return tuple(1000 * np.median(times, axis=0))


def copy() -> dict:
    """A copy on the device, the measure of memory-bound work."""
    gpu()
    source = cuda.cupy.ones(2**28, np.float32)
    target = cuda.cupy.empty_like(source)
    device, _, _ = milliseconds(lambda: cuda.cupy.copyto(target, source))
    return {'GB/s, read and written': 2 * source.nbytes / device / 1e6}


def update() -> dict:
    """The update of ResNet-50's parameters, against a copy of as many bytes."""
    model = ResNet50(1000, 64, 'imagenet', 0)
    model.to_device(gpu())
    for param in model.params():
        param.grad = cuda.cupy.full_like(param.array, 1e-3)
    optimizer = extensions.RMSpropWarmup(0.1, 0.5, 0.01).setup(model)
    half = cuda.cupy.ones(N_STREAMS * 4 * model.count_params() // 8, np.float32)
    other = cuda.cupy.empty_like(half)

    def copies(n=50):  # some 10 ms
        for _ in range(n):
            cuda.cupy.copyto(other, half)

    _, whole, launched = milliseconds(optimizer.update)
    device, _, _ = milliseconds(optimizer.update, queue=copies)
    ideal, _, _ = milliseconds(lambda: cuda.cupy.copyto(other, half), queue=copies)
    return {'device ms': device, 'copy ms': ideal, 'host ms': whole, 'launches ms': launched}


def all_reduce() -> dict:
    """Pack, NCCL with one rank, division, unpack and the check, on ResNet-50's gradients."""
    gpu()
    comm = extensions.create_communicator('pure_nccl', mpi_comm=MPI.COMM_SELF)
    model = ResNet50(1000, 64, 'imagenet', 0)
    model.to_device(extensions.device_of(comm))
    comm.bcast_data(model)
    for param in model.params():
        param.grad = cuda.cupy.full_like(param.array, 1e-3)
    found = {}
    for check in (True, False):
        comm.set_config('stop_on_nonfinite', check)
        _, whole, _ = milliseconds(lambda: comm.multi_node_mean_grad(model))
        found['ms, checked' if check else 'ms, unchecked'] = whole
    comm.timer = Timer(on_gpu=True, skip=2)
    for _ in range(10):
        with comm.timer('extensions'):
            comm.multi_node_mean_grad(model)
        with comm.timer('update'):
            pass
    cuda.Stream.null.synchronize()
    parts, n = comm.timer.take()
    return {**found, **{f'{part} ms': 1000 * parts[part] / n for part in ('pack', 'allreduce')}}


def iteration() -> dict:
    """Forward, backward and update of 32 and of 128 images at 224 pixels, without loading.

    The GPU waits for the host in the share of the time that the same launches save if the GPU is
    still busy with other work when they come.
    """
    model = ResNet50(1000, 64, 'imagenet', 0)
    model.to_device(gpu())
    optimizer = extensions.RMSpropWarmup(0.01).setup(model)
    steps = {n: _step_of(model, optimizer, n) for n in (32, 128)}
    times = {n: milliseconds(step, 8, 2) for n, step in steps.items()}
    found = {f'images/s, {n}': 1000 * n / whole for n, (_, whole, _) in times.items()}
    found['GiB'] = report.device_memory() / 2**30
    source = cuda.cupy.ones(2**27, np.float32)
    target = cuda.cupy.empty_like(source)
    of_copy, _, _ = milliseconds(lambda: cuda.cupy.copyto(target, source))
    for n, (_, whole, launched) in times.items():
        n_copies = round(1.5 * launched / of_copy)

        def copies(n_copies=n_copies):
            for _ in range(n_copies):
                cuda.cupy.copyto(target, source)

        device, _, _ = milliseconds(steps[n], 4, 1, queue=copies)
        found[f'GPU waits, {n}'] = max(0.0, 1 - device / whole)
    return found


def _step_of(model, optimizer, n_images):
    rng = np.random.RandomState(0)
    x = cuda.to_gpu(rng.rand(n_images, 3, 224, 224).astype(np.float32))
    t = cuda.to_gpu(rng.randint(0, 1000, n_images).astype(np.int32))

    def step():
        model.cleargrads()
        F.softmax_cross_entropy(model(x), t).backward()
        optimizer.update()

    return step


STEPS = {
    'memory': (copy, update, all_reduce),
    'iteration': (iteration,),
}


def main():
    step, path, implementation = sys.argv[1:]
    ranks.on_every_rank(MPI.COMM_WORLD, lambda: functions.use(implementation, gpu()))
    failed = checks.run(STEPS[step], path, MPI.COMM_WORLD)
    if failed:
        raise ranks.AgreedExit(1)


if __name__ == '__main__':
    ranks.run(main)
