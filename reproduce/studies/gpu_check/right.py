"""What a GPU computes, against the CPU: the programs of the steps that ask whether it is right.

python -m reproduce.studies.gpu_check.right STEP FILE FUNCTIONS
    FUNCTIONS is chainer or torch, as train.py's --functions. Each check prints a line. FILE gets
    their numbers, in JSON. The exit status is 1 if one fails.
"""

from __future__ import annotations

from reproduce.job import start

if __name__ == '__main__':
    start.before_mpi()

import argparse
import dataclasses
import os
import sys
import tempfile
import time

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer.backends import cuda
from mpi4py import MPI

from extensions.timing import Timer
from reproduce import dataset, images, settings
from reproduce.job import functions, ranks
from reproduce.resnet50 import ResNet50
from reproduce.studies.gpu_check import checks
from reproduce.train import experiment

# Relative errors, of the norm. float32 has 6e-8; a sum of thousands errs some times as much.
_UPDATE = {np.float32: 1e-6, np.float64: 1e-14}
_PRODUCT = 1e-5  # TF32 has 3e-4
_STATISTICS = 1e-5
_NETWORK = 5e-3  # ReLUs near 0 fall on the other side: seen to be 3e-4
_LOSS = 1e-5  # of a worker in the first iteration: seen to be 2e-7
_GRADIENT = 2e-2  # of eight workers: one maximum that falls on the other side is 1.1e-2


def gpu():
    """Makes the first GPU the current device, and returns it."""
    device = chainer.get_device('@cupy:0')
    device.use()
    return device


def error_of(ours, exact) -> float:
    """Returns the norm of the difference over the norm of ``exact``."""
    ours, exact = (np.asarray(cuda.to_cpu(a), np.float64) for a in (ours, exact))
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


# ---------------------------------------------------------------- kernels


def update() -> dict:
    """The update of several parameters against the equations in float64."""
    worst = {}
    for dtype, most in _UPDATE.items():
        errors = [
            _error_of_update(dtype, alphas, decay)
            for alphas in ((1, 0), (0.3, 2e-2), (0, 1))
            for decay in (0.0, 1e-4)
        ]
        worst[np.dtype(dtype).name] = max(errors)
        checks.require_below(most, {f'{np.dtype(dtype)} {i}': e for i, e in enumerate(errors)})
    return worst


def _error_of_update(dtype, alphas, decay, n_updates=3) -> float:
    rng = np.random.RandomState(3)
    model = chainer.ChainList(*(chainer.Link() for _ in range(4)))
    for link, shape in zip(model, ((257, 33), (1,), (64, 3, 7, 7), (5000,))):
        with link.init_scope():
            link.p = chainer.Parameter(rng.standard_normal(shape).astype(dtype))
    exact = [[link.p.array.astype(np.float64), 0.0, 0.0] for link in model]
    model.to_device(gpu())
    lr, mu1, mu2, eps = 0.1, 0.9, 0.99, 1e-8
    optimizer = extensions.RMSpropWarmup(lr, alphas[0], alphas[1], mu1, mu2, eps, decay)
    optimizer.setup(model)
    for _ in range(n_updates):
        for link, state in zip(model, exact):
            grad = rng.standard_normal(link.p.shape).astype(dtype)
            link.p.grad = cuda.to_gpu(grad)
            param, m, delta = state
            g = grad + decay * param
            m = mu2 * m + (1 - mu2) * g * g
            delta = mu1 * delta - (alphas[0] + alphas[1] / (np.sqrt(m) + eps)) * g
            state[:] = param + lr * delta, m, delta
        optimizer.update()
    rules = [(link.p.array, link.p.update_rule.state) for link in model]
    ours = [(array, state['m'], state['delta']) for array, state in rules]
    # All parameters together: one number alone can be near 0.
    return max(error_of(_flat(o), _flat(e)) for o, e in zip(zip(*ours), zip(*exact)))


def normalization() -> str:
    """The images that the network sees, bit by bit."""
    rng = np.random.RandomState(0)
    for shape in ((32, 224, 224, 3), (3, 5, 7, 3), (1, 1, 1, 3)):
        x = rng.randint(0, 256, shape).astype(np.uint8)
        ours = images.normalize(cuda.to_gpu(x), xp=cuda.cupy)
        same = np.array_equal(cuda.to_cpu(ours), images.normalize(x))
        checks.require(same, f'images of {shape} differ from NumPy')
    return "NumPy's bits"


def half_precision() -> str:
    """Gradients of all sizes through pack, NCCL with one rank, division and unpack, bit by bit."""
    gpu()
    comm = extensions.create_communicator('pure_nccl', mpi_comm=MPI.COMM_SELF)
    model = ResNet50(10, 16, 'imagenet', 0)
    model.to_device(extensions.device_of(comm))
    comm.bcast_data(model)
    rng = np.random.RandomState(0)
    sent = {}
    for name, param in model.namedparams():
        grad = rng.standard_normal(param.shape) * 10.0 ** rng.uniform(-8, 2, param.shape)
        sent[name] = grad.astype(np.float32)
        param.grad = cuda.to_gpu(sent[name])
    comm.multi_node_mean_grad(model)
    for name, param in model.namedparams():
        rounded = sent[name].astype(np.float16).astype(np.float32)
        same = np.array_equal(cuda.to_cpu(param.grad), rounded)
        checks.require(same, f'{name} is not float16(g)')
    model.fc.b.grad[3] = np.inf
    try:
        comm.multi_node_mean_grad(model)
    except extensions.NonFiniteGradients as error:
        checks.require('/fc/b (1 inf' in str(error), f'the error names another place: {error}')
        return 'float16(g), and an infinite gradient is found'
    raise checks.Failed('an infinite gradient went through')


def evaluation() -> dict:
    """Counts of the evaluator on the GPU and on the CPU: ties, NaN, images without a label."""
    rng = np.random.RandomState(0)
    y = np.round(rng.standard_normal((64, 20)) * 2).astype(np.float32)
    y[3] = np.nan
    t = rng.randint(0, 20, 64).astype(np.int32)
    t[::9] = -1
    comm = extensions.create_communicator('mpi', mpi_comm=MPI.COMM_SELF)
    found = []
    for device in (chainer.get_device('@numpy'), gpu()):
        evaluator = extensions.ExactEvaluator(
            lambda start, stop: [(y[i : i + 16], t[i : i + 16]) for i in range(0, 64, 16)],
            chainer.Variable,
            comm,
            64,
            16,
            converter=lambda batch, device=device: tuple(map(device.send, batch)),
        )
        result = evaluator.evaluate()
        found.append({k: result[k] for k in ('main/accuracy', 'main/top5_accuracy', 'images')})
    checks.require(found[0] == found[1], f'the CPU counts {found[0]}, the GPU {found[1]}')
    return found[1]


def timer() -> dict:
    """The parts of an iteration sum to the whole, by CUDA's events."""
    gpu()
    a = cuda.cupy.ones((2048, 2048), np.float32)
    a.dot(a)
    cuda.Stream.null.synchronize()
    begin, clock = time.perf_counter(), Timer(on_gpu=True, skip=0)
    for _ in range(5):
        with clock('data'):
            time.sleep(0.02)
        with clock('forward_backward'):
            a.dot(a)
        with clock('update'):
            cuda.Stream.null.synchronize()
    whole = time.perf_counter() - begin
    seconds, _ = clock.take()
    share = sum(seconds.values()) / whole
    checks.require(abs(share - 1) < 0.1, f'the parts are {share:.2f} of the whole')
    checks.require(seconds['data'] >= 0.08, f'a wait of 0.1 s is {seconds["data"]:.3f} s')
    return {'parts / whole': share}


# ---------------------------------------------------------------- network


def products() -> dict:
    """A convolution and a matrix product: float32, unless NVIDIA_TF32_OVERRIDE=1 asks for TF32."""
    device = gpu()
    rng = np.random.RandomState(0)
    x, W = (rng.rand(*shape).astype(np.float32) for shape in ((4, 64, 14, 14), (64, 64, 3, 3)))
    a = rng.rand(256, 512).astype(np.float32)
    wide = [array.astype(np.float64) for array in (x, W, a)]
    errors = {
        'convolution': error_of(
            F.convolution_2d(device.send(x), device.send(W), pad=1).array,
            F.convolution_2d(*wide[:2], pad=1).array,
        ),
        'matrices': error_of(
            F.matmul(device.send(a), device.send(a.T.copy())).array, wide[2] @ wide[2].T
        ),
    }
    if os.environ.get('NVIDIA_TF32_OVERRIDE') != '1':
        checks.require_below(_PRODUCT, errors)
    return errors


def batch_statistics() -> dict:
    """Statistics of three workers' minibatches: the mean, and the unbiased variance."""
    rng = np.random.RandomState(0)
    model = chainer.ChainList(*(L.BatchNormalization(n, decay=0, eps=1e-5) for n in (16, 24)))
    model.to_device(gpu())
    comm = extensions.create_communicator('mpi', mpi_comm=MPI.COMM_SELF)
    statistics = extensions.AllreduceBatchStatistics(model, comm)
    exact: dict = {bn: [] for bn in model}
    statistics.clear()
    for worker in range(3):
        for bn in model:
            x = 5 + rng.standard_normal((8, bn.gamma.size, 6, 6)) * (1 + worker)
            bn(cuda.to_gpu(x.astype(np.float32)))
            channels = x.astype(np.float32).astype(np.float64).swapaxes(0, 1)
            channels = channels.reshape(bn.gamma.size, -1)
            exact[bn].append((channels.mean(1), channels.var(1, ddof=1)))
        statistics.add_worker()
    statistics()
    worst = max(
        error_of(ours, theirs)
        for bn, each in exact.items()
        for ours, theirs in zip((bn.avg_mean, bn.avg_var), np.mean(each, axis=0))
    )
    checks.require_below(_STATISTICS, {'error': worst})
    return {'error': worst}


def network(side=128, n_images=2) -> dict:
    """Loss, gradient and statistics of ResNet-50 against float64 on the CPU."""
    results = []
    for dtype, device in ((np.float64, chainer.get_device('@numpy')), (np.float32, gpu())):
        model = _network_with_scales(dtype)
        model.to_device(device)
        rng = np.random.RandomState(7)
        x = rng.rand(n_images, 3, side, side).astype(np.float32).astype(dtype)
        t = rng.randint(0, 1000, n_images).astype(np.int32)
        model.cleargrads()
        loss = F.softmax_cross_entropy(model(device.send(x)), device.send(t))
        loss.backward()
        bns = [link for link in model.links() if hasattr(link, 'avg_var')]
        results.append(
            {
                'loss': [loss.array],
                'gradient': [param.grad for param in model.params()],
                'statistics': [a for bn in bns for a in (bn.avg_mean, bn.avg_var)],
            }
        )
    exact, ours = ({k: _flat(v) for k, v in result.items()} for result in results)
    errors = {name: error_of(ours[name], exact[name]) for name in exact}
    checks.require_below(_NETWORK, errors)
    return errors


def _flat(arrays):
    return np.concatenate([np.asarray(cuda.to_cpu(a), np.float64).ravel() for a in arrays])


def _network_with_scales(dtype):
    """ResNet-50 whose last gamma of each block is 0.05: 0, as at the start, hides most layers."""
    with chainer.using_config('dtype', np.dtype(dtype)):
        model = ResNet50(1000, 64, 'imagenet', 0)
    for link in model.links():
        if hasattr(link, 'gamma'):
            link.gamma.array[...] = np.where(link.gamma.array == 0, 0.05, 1)
    for param in model.params():  # float32's values in both
        param.array = param.array.astype(np.float32).astype(dtype)
    return model


# ---------------------------------------------------------------- workers


def workers(n=8) -> dict:
    """The first iteration of 8 workers, which one process plays, on the GPU and on the CPU."""
    gpu()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        s = dataclasses.replace(settings.smoke(), workers=n, loader='serial', out=folder)
        train, val = dataset.save(s, dataset.find(s, 1))
        for name in ('mpi', 'pure_nccl'):
            comm = extensions.create_communicator(name, mpi_comm=MPI.COMM_SELF)
            trainer, batches = experiment(s, comm, train, val)
            updater = trainer.updater
            updater.losses = []
            with batches:
                updater.update()
            params = updater.get_optimizer('main').target.params()
            found.append((updater.losses[0], _flat([param.grad for param in params])))
    (cpu_losses, cpu_grad), (losses, grad) = found
    errors = {'loss': error_of(losses, cpu_losses), 'gradient': error_of(grad, cpu_grad)}
    checks.require_below(_LOSS, {'loss': errors['loss']})
    checks.require_below(_GRADIENT, {'gradient': errors['gradient']})
    return errors


# ---------------------------------------------------------------- twin


def twin(n=2, device='cuda:0') -> dict:
    """The twin's first iteration, of 2 workers, in PyTorch on the GPU and on the CPU."""
    import torch

    from reproduce.twin import train as in_pytorch

    found = []
    with tempfile.TemporaryDirectory() as folder:
        s = dataclasses.replace(settings.smoke(), workers=n, loader='serial', out=folder)
        train, val = dataset.save(s, dataset.find(s, 1))
        for place in ('cpu', device):
            process = argparse.Namespace(rank=0, size=1, device=torch.device(place))
            training, batches = in_pytorch.experiment(s, process, train, val)
            with batches:
                training.update()
            params = training.model.parameters()
            gradient = torch.cat([param.grad.cpu().flatten() for param in params])
            found.append((training.losses[0].cpu().numpy(), gradient.numpy()))
    (cpu_losses, cpu_gradient), (losses, gradient) = found
    errors = {'loss': error_of(losses, cpu_losses), 'gradient': error_of(gradient, cpu_gradient)}
    checks.require_below(_LOSS, {'loss': errors['loss']})
    checks.require_below(_GRADIENT, {'gradient': errors['gradient']})
    return errors


# ---------------------------------------------------------------- nccl


def two_ranks() -> dict:
    """Two ranks on one GPU: NCCL takes them for two hosts, and connects them by sockets."""
    mpi = MPI.COMM_WORLD
    device = gpu()
    comm = extensions.HalfPrecisionNcclCommunicator(mpi, 'float16')
    shapes = {'a': (64, 3, 7, 7), 'b': (1000, 2048), 'c': (17,), 'd': ()}
    model = chainer.Link()
    with model.init_scope():
        for name, shape in shapes.items():
            setattr(model, name, chainer.Parameter(np.full(shape, mpi.rank + 1, np.float32)))
    model.to_device(device)
    comm.bcast_data(model)
    wrong = sum(int((cuda.to_cpu(param.array) != 1).sum()) for param in model.params())
    rngs = [np.random.RandomState(rank) for rank in range(mpi.size)]
    expected = {}
    for name, param in sorted(model.namedparams()):
        size = param.shape
        grads = [r.standard_normal(size) * 10.0 ** r.uniform(-7, 2, size) for r in rngs]
        param.grad = cuda.to_gpu(np.asarray(grads[mpi.rank], np.float32))
        halves = [np.asarray(g, np.float32).astype(np.float16).astype(np.float32) for g in grads]
        # One addition and one division have known roundings, in whatever order.
        total = (halves[0] + halves[1]).astype(np.float16).astype(np.float32)
        expected[name] = (total * np.float32(0.5)).astype(np.float16).astype(np.float32)
    comm.multi_node_mean_grad(model)
    for name, param in model.namedparams():
        wrong += int((cuda.to_cpu(param.grad) != expected[name]).sum())
    if mpi.rank == mpi.size - 1:
        model.c.grad[:2] = np.nan
    try:
        comm.multi_node_mean_grad(model)
    except extensions.NonFiniteGradients as error:
        checks.require('/c (0 inf and 2 NaN from rank 1' in str(error), str(error))
        checks.require(wrong == 0, f'{wrong} numbers are wrong')
        return {'wrong numbers': wrong}
    raise checks.Failed('a NaN went through')


STEPS = {
    'kernels': (update, normalization, half_precision, evaluation, timer),
    'network': (products, batch_statistics, network),
    'workers': (workers,),
    'twin': (twin,),
    'nccl': (two_ranks,),
}


def main():
    step, path, implementation = sys.argv[1:]
    ranks.on_every_rank(MPI.COMM_WORLD, lambda: functions.use(implementation, gpu()))
    if step == 'nccl':
        os.environ['NCCL_HOSTID'] = f'pretended-{MPI.COMM_WORLD.rank}'
        os.environ.setdefault('NCCL_SOCKET_IFNAME', 'lo')
    failed = checks.run(STEPS[step], path, MPI.COMM_WORLD)
    if failed:
        raise ranks.AgreedExit(1)


if __name__ == '__main__':
    ranks.run(main)
