"""The clock is the test's own: on the host, and that of a pretended device."""

import types

import chainer
import numpy as np
import pytest
from mpi4py import MPI

import extensions
from extensions import Timer, TimeReport, timing


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(timing._HostClock, 'now', lambda self: clock.now)
    return clock


class Device:
    """Works off what the host gives it, in order, while the host goes on; times in seconds."""

    def __init__(self):
        self.host = self.busy_until = 50.0
        self.n_events = 0
        self.cupy = types.SimpleNamespace(
            cuda=types.SimpleNamespace(get_elapsed_time=self._elapsed_time)
        )

    def kernel(self, seconds):
        self.busy_until = max(self.busy_until, self.host) + seconds

    def Event(self):
        self.n_events += 1
        device = self

        class Event:
            def record(self):
                self.time = max(device.busy_until, device.host)

            @property
            def done(self):
                return device.host >= self.time

            def synchronize(self):
                raise AssertionError('the host waits')

        return Event()

    @staticmethod
    def _elapsed_time(start, end):
        return 1000 * (end.time - start.time)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(timing, 'cuda', device)
    return device


def iterate(timer, clock, seconds):
    for part in ('data', 'forward_backward', 'pack', 'allreduce', 'update'):
        with timer(part):
            clock.now += seconds[part]
    clock.now += seconds['extensions']


SECONDS = dict(zip(timing.PARTS, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)))


def test_each_moment_belongs_to_the_innermost_part(clock):
    timer = Timer(skip=0)
    clock.now += 0.5
    with timer('allreduce'):
        clock.now += 1
        with timer('pack'):
            clock.now += 2
        clock.now += 4
    clock.now += 8
    with timer('update'):
        clock.now += 16
        with timer('pack'):
            clock.now += 32
    clock.now += 64
    seconds, n = timer.take()
    assert n == 1
    assert {name: s for name, s in seconds.items() if s} == {
        'allreduce': 5,
        'pack': 34,
        'update': 16,
        'extensions': 72.5,
    }
    assert sum(seconds.values()) == clock.now - 100


def test_parts_sum_to_the_whole_when_an_iteration_fails(clock):
    timer = Timer(skip=0)
    with pytest.raises(ArithmeticError), timer('allreduce'):
        clock.now += 1
        raise ArithmeticError
    iterate(timer, clock, SECONDS)
    seconds, n = timer.take()
    assert n == 1 and seconds == {**SECONDS, 'allreduce': 9, 'validation': 0}
    with pytest.raises(ArithmeticError), timer('update'):
        raise ArithmeticError
    assert timer.take()[1] == 0


def test_the_first_iterations_are_left_out(clock):
    timer = Timer(skip=3)
    for factor in (1000, 500, 70):
        iterate(timer, clock, {part: s * factor for part, s in SECONDS.items()})
        nothing, n = timer.take()
        assert n == 0 and not any(nothing.values())
    for _ in range(2):
        iterate(timer, clock, SECONDS)
    seconds, n = timer.take()
    assert n == 2
    # The third iteration's extensions came after its update.
    assert seconds.pop('extensions') == 70 * 32 + 2 * 32
    assert seconds == {
        **{p: 2 * s for p, s in SECONDS.items() if p != 'extensions'},
        'validation': 0,
    }
    iterate(timer, clock, SECONDS)
    assert timer.take() == ({**SECONDS, 'validation': 0}, 1)


def test_a_gpus_parts_are_the_streams_and_the_host_never_waits(device):
    """The device computes for 5 and 3 seconds, for which the host needs 1 each: the minibatch that
    takes the host 2 seconds costs nothing, that of 20 what is left of it."""
    timer = Timer(on_gpu=True, skip=0)
    for loading in (2, 20, 2, 2):
        with timer('data'):
            device.host += loading
        for part, seconds in (('forward_backward', 5), ('update', 3)):
            with timer(part):
                device.kernel(seconds)
                device.host += 1
    early, n_early = timer.take()
    assert n_early < 4  # the device is not done
    device.host += 100
    device.kernel(0)
    late, n_late = timer.take()
    assert n_early + n_late == 4
    total = {part: early[part] + late[part] for part in early}
    # In iteration 2 the device has 8 - 2 = 6 seconds of work left when the host begins to load.
    assert total['data'] == 2 + (20 - 6)
    assert (total['forward_backward'], total['update']) == (4 * 5, 4 * 3)
    device.host += 100
    before = device.n_events
    for _ in range(100):
        with timer('update'):
            device.kernel(3)
            device.host += 4
    assert device.n_events - before < 5  # they are used again


def test_an_event_is_read_only_when_the_device_has_passed_it(device):
    timer = Timer(on_gpu=True, skip=0)
    with timer('update'):
        device.kernel(10)
    assert timer.iterations == 0 and timer.seconds['update'] == 0
    device.host += 10
    timer.read()
    assert timer.iterations == 1 and timer.seconds['update'] == 10


def report_of(comm=None, skip=1):
    """A TimeReport with everything that it times, and the trainer."""
    comm = comm or extensions.create_communicator('mpi', mpi_comm=MPI.COMM_SELF)
    target = types.SimpleNamespace(device=chainer.get_device('@numpy'))
    optimizer = types.SimpleNamespace(target=target)
    updater = types.SimpleNamespace(get_optimizer=lambda name: optimizer, timer=timing.untimed)
    evaluator = types.SimpleNamespace(timer=timing.untimed)
    report = TimeReport(comm, evaluator, skip)
    report.initialize(types.SimpleNamespace(updater=updater))
    assert updater.timer is comm.timer is evaluator.timer
    return report, updater.timer


def observed(report):
    observation = {}
    with chainer.Reporter().scope(observation):
        report()
    return observation


def test_report_of_an_epoch_and_of_the_run(clock):
    report, timer = report_of()
    iterate(timer, clock, SECONDS)
    assert observed(report) == {} and report.summary()['iterations'] == 0
    for n, factor in ((2, 1), (4, 3)):
        for _ in range(n):
            iterate(timer, clock, {part: factor * s for part, s in SECONDS.items()})
        with timer('validation'):
            clock.now += 100 * factor
        found = observed(report)
        if n == 4:
            expected = {f'time/{part}': 3 * s for part, s in SECONDS.items()}
            expected['time/iteration'] = 3 * 63
            assert found == {**expected, 'time/validation': 300}
    summary = report.summary()
    assert summary['iterations'] == 6 and summary['validation'] == 200
    assert summary['update'] == pytest.approx(16 * (2 + 3 * 4) / 6)
    parts = sum(summary[part] for part in timing.PARTS)
    assert summary['iteration'] == pytest.approx(parts)


def test_a_checkpoint_within_an_epoch_loses_nothing(clock):
    report, timer = report_of(skip=0)
    iterate(timer, clock, SECONDS)
    observed(report)
    iterate(timer, clock, {part: 5 * s for part, s in SECONDS.items()})
    report.gather()
    serializer = chainer.serializers.DictionarySerializer()
    serializer.save(report)
    again, timer = report_of(skip=0)
    again.serialize(chainer.serializers.NpzDeserializer(serializer.target))
    iterate(timer, clock, SECONDS)
    assert observed(again)['time/pack'] == 4 * (5 + 1) / 2
    assert again.summary()['pack'] == pytest.approx(4 * (1 + 5 + 1) / 3)


def test_a_report_that_ends_removes_its_own_timer_only():
    comm = extensions.create_communicator('mpi', mpi_comm=MPI.COMM_SELF)
    report, timer = report_of(comm)
    later, later_timer = report_of(comm)
    report.finalize()
    assert comm.timer is later_timer
    assert all(timed.timer is not timer for timed in report._timed)
    later.finalize()
    assert comm.timer is timing.untimed


def test_without_a_timer_nothing_is_timed():
    with timing.untimed('data') as nothing:
        assert nothing is None
    comm = extensions.create_communicator('mpi', mpi_comm=MPI.COMM_SELF)
    assert comm.timer is timing.untimed
    assert np.all(TimeReport(comm, None)._of_run == 0)
