"""The update on a GPU, and what else an iteration launches there.

tests/mpi/test_cupy_on_host.py runs these tests on the CuPy of host memory, which counts launches
and the host's waits.
"""

import collections
import contextlib

import chainer
import numpy as np
import pytest
from chainer.backends import cuda
from mpi4py import MPI

from extensions import (
    AllreduceBatchStatistics,
    RMSpropWarmup,
    RMSpropWarmupRule,
    VirtualWorkersUpdater,
    create_communicator,
    rmsprop_warmup_gpu,
)
from extensions.virtual_workers import _LocalMean
from reproduce.resnet50 import ResNet50

try:
    import host_calls  # counts, where CuPy is the one of host memory
except ImportError:
    host_calls = None

SHAPES = {
    'none': (0,),
    'empty': (3, 0, 2),
    'number': (),
    'one': (1,),
    'odd': (3, 5, 7),
    'block': (2048,),
    'less': (2047,),
    'more': (2049,),
    'blocks': (4096,),
    'convolution': (64, 3, 7, 7),
    'long': (100_003,),
    'last': (0,),
}


def chain_of(shapes, dtype, device):
    rng = np.random.RandomState(0)
    chain = chainer.Chain()
    with chain.init_scope():
        for name, shape in shapes.items():
            value = np.asarray(rng.standard_normal(shape), dtype)
            setattr(chain, name, chainer.Parameter(value))
    chain.to_device(device)
    return chain


def give_gradients(model, rng, device):
    for param in {id(param): param for param in model.params()}.values():
        scale = 10.0 ** rng.randint(-3, 1)
        gradient = np.asarray(scale * rng.standard_normal(param.shape), param.dtype)
        param.grad = device.send(gradient)


def arrays_of(model):
    """All parameters, m and delta on the CPU, and the rules' t."""
    send = chainer.get_device('@numpy').send
    params = list(model.params())
    states = [p.update_rule.state or {} for p in params]
    arrays = [p.array for p in params] + [array for s in states for array in s.values()]
    return [send(array) for array in arrays], [p.update_rule.t for p in params]


def assert_same(one, other):
    assert one[1] == other[1] and len(one[0]) == len(other[0])
    for a, b in zip(one[0], other[0]):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def at_once(monkeypatch):
    """Notes whether each update on a GPU was done in one launch."""
    done = []
    update = rmsprop_warmup_gpu.update
    monkeypatch.setattr(
        rmsprop_warmup_gpu, 'update', lambda *args: done.append(update(*args)) or done[-1]
    )
    return done


def trained(update, device, dtype='float32', shapes=SHAPES, prepare=lambda *args: None, n_steps=4):
    device = chainer.get_device(device)
    chain = chain_of(shapes, dtype, device)
    optimizer = RMSpropWarmup(0.1, 0.7, 0.3, weight_decay_rate=0.01)
    if dtype == 'float16':
        optimizer.eps = 1e-3
    optimizer.setup(chain)
    changes = prepare(optimizer, chain)
    rng = np.random.RandomState(1)
    for step in range(n_steps):
        give_gradients(chain, rng, device)
        optimizer.lr = 0.1 / (1 + step)
        optimizer.alpha_rmsprop = 0.3 * (step % 3)
        if changes:
            changes(step)
        update(optimizer)
    return arrays_of(chain)


def different_rules(optimizer, chain):
    for i, param in enumerate(chain.params()):
        hyperparam = param.update_rule.hyperparam
        if i % 3 == 0:
            hyperparam.weight_decay_rate = 0
        if i % 4 == 1:
            hyperparam.lr, hyperparam.mu1 = 0.05, 0.8
    chain.odd.update_rule.enabled = False
    return lambda step: chain.long.cleargrad() if step == 2 else None


@pytest.mark.gpu
@pytest.mark.parametrize('prepare', [lambda *args: None, different_rules])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_one_launch_has_the_bits_of_many_and_of_the_cpu(gpu, at_once, dtype, prepare):
    ours = trained(RMSpropWarmup.update, gpu, dtype, prepare=prepare)
    assert at_once == [True] * 3  # the first update makes the states
    alone = trained(chainer.GradientMethod.update, gpu, dtype, prepare=prepare)
    assert len(at_once) == 3
    assert_same(ours, alone)
    assert_same(ours, trained(RMSpropWarmup.update, '@numpy', dtype, prepare=prepare))


@pytest.mark.gpu
def test_resnet50_is_updated_in_one_launch(gpu, at_once):
    results = []
    for update in (RMSpropWarmup.update, chainer.GradientMethod.update):
        model = ResNet50(1000, 16, 'imagenet', 0)
        model.to_device(gpu)
        optimizer = RMSpropWarmup(0.1, 0.5, 0.2, weight_decay_rate=1e-4).setup(model)
        give_gradients(model, np.random.RandomState(0), gpu)
        for _ in range(2):
            count = launches(lambda update=update, optimizer=optimizer: update(optimizer))
        results.append(arrays_of(model))
        if host_calls:
            assert count == ({'launch': 161} if len(results) > 1 else {'launch': 1, 'copy': 1})
    assert at_once == [True] and len(results[0][0]) == 3 * 161
    assert_same(*results)


def counted():
    """How many launches, waits of the host and copies from it there have been, if that is known."""
    calls = host_calls.calls if host_calls else ()
    return collections.Counter(call.split()[0] for call in calls)


def launches(function):
    """What a call of the function counted."""
    before = counted()
    function()
    return dict(counted() - before)


@pytest.mark.gpu
def test_updates_that_the_host_does_not_wait_for(gpu, at_once):
    """The table of an update in progress is not overwritten by later ones."""
    shapes = {'a': (1 << 20,), **{f'p{i}': (i,) for i in range(50)}}
    ours = trained(RMSpropWarmup.update, gpu, shapes=shapes, n_steps=20)
    assert at_once == [True] * 19
    assert_same(ours, trained(RMSpropWarmup.update, '@numpy', shapes=shapes, n_steps=20))


@pytest.mark.gpu
def test_the_update_runs_on_the_current_stream(gpu, at_once):
    stream = cuda.Stream(non_blocking=True)
    with stream:
        ours = trained(RMSpropWarmup.update, gpu)
    stream.synchronize()
    assert at_once == [True] * 3
    assert_same(ours, trained(RMSpropWarmup.update, '@numpy'))


@pytest.mark.gpu
def test_the_update_runs_on_the_parameters_gpu(gpu, at_once, monkeypatch):
    runtime = cuda.cupy.cuda.runtime
    if runtime.getDeviceCount() < 2:
        pytest.skip('needs two GPUs')
    devices, raw = [], cuda.raw
    monkeypatch.setattr(
        cuda, 'raw', lambda *args: devices.append(runtime.getDevice()) or raw(*args)
    )
    ours = trained(RMSpropWarmup.update, '@cupy:1')
    assert at_once == [True] * 3 and devices == [1] * 3 and runtime.getDevice() == 0
    assert_same(ours, trained(RMSpropWarmup.update, '@numpy'))

    def two_gpus(optimizer, chain):
        chain.odd.to_device('@cupy:1')

        def change(step):
            chain.odd.grad = chain.odd.device.send(chain.odd.grad)

        return change

    ours = trained(RMSpropWarmup.update, gpu, prepare=two_gpus)
    assert not any(at_once[3:])
    assert_same(ours, trained(RMSpropWarmup.update, '@numpy'))


class OtherRule(RMSpropWarmupRule):
    pass


def other_rule(optimizer, chain):
    chain.odd.update_rule = OtherRule(optimizer.hyperparam)


def hook(optimizer, chain):
    chain.odd.update_rule.add_hook(lambda rule, param: None, name='nothing')


def loss_scale(optimizer, chain):
    def change(step):
        chain.odd._loss_scale = 4

    return change


def gradient_in_fortran_order(optimizer, chain):
    def change(step):
        chain.odd.grad = chain.xp.asfortranarray(chain.odd.grad)

    return change


def two_dtypes(optimizer, chain):
    double = chainer.Parameter(chain.odd.array.astype('float64'))
    double.update_rule = optimizer.create_update_rule()
    with chain.init_scope():
        chain.double = double


def two_names(optimizer, chain):
    with chain.init_scope():
        chain.other_name = chain.odd


def one_array_for_two(optimizer, chain):
    chain.one.array = chain.number.array.reshape(1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    'prepare',
    [
        *(other_rule, hook, loss_scale, gradient_in_fortran_order),
        *(two_dtypes, two_names, one_array_for_two),
    ],
)
def test_what_one_launch_cannot_update_is_updated_one_after_the_other(gpu, at_once, prepare):
    ours = trained(RMSpropWarmup.update, gpu, prepare=prepare)
    assert not any(at_once)
    assert_same(ours, trained(chainer.GradientMethod.update, gpu, prepare=prepare))


@pytest.mark.gpu
@pytest.mark.parametrize('odd', range(4))
def test_arrays_of_different_shapes_are_not_updated(gpu, odd):
    shapes = [(3,)] * 4
    shapes[odd] = (1,)
    device = chainer.get_device(gpu)
    arrays = [device.send(np.ones(shape, 'f')) for shape in shapes]
    assert not rmsprop_warmup_gpu.update(arrays, [(0.1,) * 8])
    assert all((array == 1).all() for array in arrays)


@pytest.mark.gpu
def test_float16_is_updated_one_after_the_other(gpu, at_once):
    ours = trained(RMSpropWarmup.update, gpu, 'float16')
    assert not at_once
    assert_same(ours, trained(chainer.GradientMethod.update, gpu, 'float16'))


@pytest.mark.gpu
def test_a_model_of_empty_parameters_is_updated(gpu, at_once):
    trained(RMSpropWarmup.update, gpu, shapes={'a': (0,), 'b': (0, 3)})
    assert at_once == [True] * 3


# --- Several workers in one process, and a scale of the gradients ---------------------------------


class OneProcess:
    """A communicator of one rank, as far as the sum over a process's own workers goes."""

    rank, size = 0, 1

    def __init__(self, dtype, scale):
        self.allreduce_grad_dtype, self.gradient_scale = np.dtype(dtype), scale

    def multi_node_mean_grad(self, model):
        pass


def mean_by_parameter(gradients, dtype, scale):
    """Each gradient rounded and added on its own."""
    rounded = [(g.reshape(-1) * scale).astype(dtype).astype(np.float32) for g in gradients]
    total = rounded[0]
    for each in rounded[1:]:
        total = total + each
    mean = total / (len(gradients) * scale)
    return mean.astype(gradients[0].dtype).reshape(gradients[0].shape)


@pytest.mark.parametrize('device', ['@numpy', pytest.param('@cupy:0', marks=pytest.mark.gpu)])
@pytest.mark.parametrize('scale', [1, 2.0**12])
@pytest.mark.parametrize('wire', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_workers_of_a_process_are_rounded_and_added_as_one_by_one(
    request, device, dtype, wire, scale
):
    if device != '@numpy':
        request.getfixturevalue('gpu')
    device = chainer.get_device(device)
    chain = chain_of(SHAPES, dtype, device)
    with chain.init_scope():
        chain.other_name = chain.odd
        chain.never = chainer.Parameter(np.ones(3, dtype))
    chain.never.to_device(device)
    local = _LocalMean(OneProcess(wire, scale), 3)
    rng = np.random.RandomState(0)
    for _ in range(2):  # iterations
        given = collections.defaultdict(list)
        for _ in range(3):  # workers
            give_gradients(chain, rng, device)
            chain.odd.grad = device.xp.asfortranarray(chain.odd.grad)
            chain.never.cleargrad()
            for name, param in chain.namedparams():
                if param.grad is not None:
                    given[name].append(param.grad.copy())
            local.add_grad(chain)
        local.mean_grad(chain)
        send = chainer.get_device('@numpy').send
        for name, param in chain.namedparams():
            if name != '/never':
                expected = mean_by_parameter(given[name], wire, scale)
                assert param.grad.dtype == expected.dtype
                np.testing.assert_array_equal(send(param.grad), send(expected), name)
        assert chain.never.grad is None


class Parts:
    """A timer that counts instead."""

    def __init__(self):
        self.counts, self.open = collections.defaultdict(collections.Counter), []

    @contextlib.contextmanager
    def __call__(self, part):
        before = counted()
        self.open.append(collections.Counter())
        yield
        whole, inner = counted() - before, self.open.pop()
        self.counts[part] += whole - inner
        if self.open:
            self.open[-1] += whole


@pytest.mark.gpu
@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('n_workers, scale', [(1, 1), (1, 2.0**8), (3, 1), (3, 2.0**8)])
def test_launches_and_waits_of_an_iteration(gpu, n_workers, scale):
    comm = create_communicator('pure_nccl', mpi_comm=MPI.COMM_SELF, gradient_scale=scale)
    model = ResNet50(10, 4, 'cifar', 0)
    model.to_device(gpu)
    comm.bcast_data(model)
    rng = np.random.RandomState(0)
    x = gpu.send(rng.standard_normal((2, 3, 32, 32)).astype(np.float32))
    t = gpu.send(np.array([3, 7], np.int32))
    updater = VirtualWorkersUpdater(
        lambda iteration, worker: (x, t),
        RMSpropWarmup(0.1, 0.5, 0.2).setup(model),
        lambda x, t: chainer.functions.softmax_cross_entropy(model(x), t),
        comm,
        n_workers,
        (2 * n_workers, 100),
        batch_statistics=AllreduceBatchStatistics(model, comm),
    )
    updater.losses = []
    updater.update()  # makes the optimizer's state
    updater.timer = comm.timer = parts = Parts()
    with parts('others'):
        updater.update()
    counts = {part: dict(count) for part, count in parts.counts.items()}
    del counts['forward_backward']  # Chainer's
    if host_calls:
        launched = {part: count.get('launch', 0) for part, count in counts.items()}
        several, scaled = n_workers > 1, scale != 1
        assert launched == {
            # The gradients of each of several workers are joined, scaled, rounded, widened and,
            # but the first worker's, added. Their mean is packed and unpacked.
            'pack': several * ((4 + scaled) * n_workers - 1) + 2,
            # Divided by the workers; joined and scaled; divided by the ranks; scaled; checked.
            'allreduce': several + 2 * scaled + 1 + scaled + 2,
            'update': 1,
            # The batch statistics of each of several workers are joined, widened and, but the
            # first worker's, added. The losses are joined.
            'others': several * (3 * n_workers - 1) + 1,
            'data': 0,
        }, launched
        assert sum(count.get('wait', 0) for count in counts.values()) == 1
        assert counts['update'] == {'launch': 1, 'copy': 1}
