"""Who computes on which GPU: decided from what every rank sees, and so without one here."""

import types

import pytest
from chainer.backends import cuda

import extensions
from extensions import CommunicatorError
from extensions.nccl import Gpus, choose, inspect, own_gpus

EIGHT = tuple(f'0000:{bus:02x}:00.0' for bus in range(8))


def job(*hosts, gpus_per_host=EIGHT, nccl=22304):
    return [Gpus(rank, host, gpus_per_host, nccl) for rank, host in enumerate(hosts)]


def without(rank, host):
    return Gpus(rank, host, obstacle='sees no GPU')


def test_gpus_on_every_rank_are_used():
    everyone = job('a', 'a', 'b')
    assert choose('auto', everyone) == (
        'pure_nccl',
        'auto: every rank has a GPU and NCCL, NCCL 2.23.4',
    )
    assert choose('pure_nccl', everyone) == ('pure_nccl', 'asked for, NCCL 2.23.4')


def test_no_gpu_anywhere_means_mpi():
    everyone = [Gpus(i, host, obstacle='no GPU', is_expected=False) for i, host in enumerate('ab')]
    assert choose('auto', everyone) == ('mpi', 'auto: rank 0 on a no GPU')
    with pytest.raises(CommunicatorError, match='needs a GPU and NCCL.*: rank 0 on a no GPU'):
        choose('pure_nccl', everyone)


def test_a_gpu_that_cannot_be_used_is_no_reason_to_train_on_cpus():
    hidden = Gpus(
        0, 'a', obstacle='sees no GPU (CUDA_VISIBLE_DEVICES= hides all)', is_expected=False
    )
    for everyone, reason in (
        ([hidden, without(1, 'b')], 'rank 1 on b sees no GPU'),
        (job('a', nccl=0), 'rank 0 on a has a GPU, but no NCCL for CuPy'),
    ):
        with pytest.raises(CommunicatorError, match=f'{reason}. To train on CPUs, choose') as error:
            choose('auto', everyone)
        assert 'communicator mpi' in str(error.value)


@pytest.mark.parametrize('name', ['auto', 'pure_nccl'])
@pytest.mark.parametrize(
    'everyone, message',
    [
        ([*job('a', 'a'), without(2, 'b')], 'rank 2 on b sees no GPU'),
        ([*job('a'), Gpus(1, 'b', EIGHT)], 'rank 1 on b has a GPU, but no NCCL'),
        (job('a', 'b', nccl=1304), 'rank 0 on a has NCCL 1.3.4, but .* 2.0 or later'),
        ([*job('a'), Gpus(1, 'b', EIGHT, 2708)], 'rank 0 on a has .* 2.23.4, rank 1 on b has 2.7'),
    ],
)
def test_ranks_that_cannot_all_use_nccl_are_an_error(name, everyone, message):
    with pytest.raises(CommunicatorError, match=message):
        choose(name, everyone)


def test_the_ranks_of_a_host_take_its_gpus_in_turn_wherever_they_are():
    assert own_gpus(job('a', 'b', 'a', 'b', 'a')) == [0, 0, 1, 1, 2]
    assert own_gpus(job(*'a' * 8)) == list(range(8))


def test_a_scheduler_may_show_each_rank_its_own():
    everyone = [Gpus(rank, 'a', (EIGHT[rank],), 22304) for rank in range(3)]
    assert own_gpus(everyone) == [0, 0, 0]


def test_two_ranks_on_one_gpu_are_an_error():
    message = r'rank 1 on a and rank 9 on a would share .* 0000:00:00.0: start as many'
    with pytest.raises(CommunicatorError, match=message):
        own_gpus(job('b', *'a' * 9))
    everyone = [Gpus(0, 'a', EIGHT[:1], 22304), Gpus(1, 'a', EIGHT[:1], 22304)]
    with pytest.raises(CommunicatorError, match='rank 0 on a and rank 1 on a would share'):
        own_gpus(everyone)


class CUDARuntimeError(Exception):
    pass


def pretend(monkeypatch, count, nccl=(22304, 22304)):
    runtime = types.SimpleNamespace(
        getDeviceCount=count,
        deviceGetPCIBusId=lambda number: EIGHT[number],
        CUDARuntimeError=CUDARuntimeError,
    )
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cuda, 'available', True)
    monkeypatch.setattr(cuda, 'cupy', cupy, raising=False)
    library = types.SimpleNamespace(
        _available=nccl is not None,
        get_build_version=lambda: nccl[0],
        get_version=lambda: nccl[1],
    )
    monkeypatch.setattr(extensions.nccl.chainermn, 'nccl', library)


@pytest.fixture
def visible(monkeypatch):
    """The tests for CPUs hide the GPUs by this variable."""
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')


def test_what_a_rank_sees(monkeypatch, visible):
    assert inspect(3).rank == 3
    pretend(monkeypatch, lambda: 2, (22304, 2708))
    gpus = inspect(1)
    assert (gpus.bus_ids, gpus.nccl, gpus.obstacle) == (EIGHT[:2], 2708, None)
    pretend(monkeypatch, lambda: 2, None)
    assert inspect(1).nccl == 0 and inspect(1).bus_ids
    pretend(monkeypatch, lambda: 0)
    assert inspect(1).obstacle == 'sees no GPU'

    def no_driver():
        raise CUDARuntimeError('cudaErrorInsufficientDriver')

    pretend(monkeypatch, no_driver)
    assert inspect(1).obstacle == 'sees no GPU (cudaErrorInsufficientDriver)'


@pytest.mark.parametrize(
    ('n_gpus', 'has_cupy', 'obstacle'),
    [
        (0, False, 'has no GPU and no CuPy'),
        (2, False, 'has a GPU, but no CuPy: start with EXTRAS=gpu'),
        (0, True, 'has a CuPy that fails: no libcublas'),
        (2, True, 'has a CuPy that fails: no libcublas'),
    ],
)
def test_why_a_rank_has_no_cupy(n_gpus, has_cupy, obstacle, monkeypatch, visible):
    monkeypatch.setattr(cuda, 'available', False)
    monkeypatch.setattr(cuda, '_resolution_error', ImportError('no\n libcublas'), raising=False)
    compatibility = extensions.nccl.cupy_compatibility
    monkeypatch.setattr(compatibility, 'count_gpus', lambda: n_gpus)
    monkeypatch.setattr(compatibility, 'has_cupy', lambda: has_cupy)
    found = inspect(0)
    assert found.obstacle.startswith(obstacle)
    assert found.is_expected == bool(n_gpus or has_cupy)


@pytest.mark.parametrize('value', ['', '-1', 'NoDevFiles'])
def test_gpus_that_the_user_hides_are_not_expected(value, monkeypatch):
    pretend(monkeypatch, lambda: 0)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', value)
    found = inspect(0)
    assert found.obstacle == f'sees no GPU (CUDA_VISIBLE_DEVICES={value} hides all)'
    assert not found.is_expected
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    assert inspect(0).is_expected
