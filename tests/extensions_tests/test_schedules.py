import math

import extensions  # noqa: F401  isort: skip
import chainer
import chainermn
import numpy as np
import pytest
from chainer.training import extensions as chainer_extensions

from extensions import (
    AlphaSGDSchedule,
    RMSpropWarmup,
    StepLearningRate,
    alpha_rmsprop,
    alpha_sgd,
    base_learning_rate,
    create_communicator,
    learning_rate,
    slow_start_factor,
)

TABLE = {  # [W5] epoch: printed, continuous
    0: (math.exp(-4) / 2, math.exp(-4) / 2),
    8: (math.exp(-0.8) / 2, math.exp(-0.8) / 2),
    10: (0.5, 0.5),
    11: (0.9, 0.7),
    11.25: (1.0, 0.75),
    12: (1.3, 0.9),
    np.nextafter(12.5, 0): (1.5, 1.0),
    12.5: (1.0, 1.0),
    90: (1.0, 1.0),
}


@pytest.mark.parametrize('epoch', TABLE)
def test_alpha_sgd_in_both_forms(epoch):
    for form, expected in zip(('printed', 'continuous'), TABLE[epoch]):
        assert alpha_sgd(epoch, form=form) == pytest.approx(expected, abs=1e-12)
        assert isinstance(alpha_sgd(epoch, form=form), float)


def test_printed_is_the_default_and_arrays_go_through():
    epochs = np.array([[0.0, 8, 10], [11, 12, 12.5]])
    np.testing.assert_array_equal(
        alpha_sgd(epochs), [[alpha_sgd(e) for e in row] for row in epochs]
    )
    assert alpha_sgd(12) == alpha_sgd(12, form='printed') != alpha_sgd(12, form='continuous')


def test_continuous_has_no_jump_and_no_kink_at_the_centre():
    h = 1e-6
    for epoch in (10, 12.5):
        left, here, right = (alpha_sgd(epoch + d, form='continuous') for d in (-h, 0, h))
        assert abs(here - left) < 1e-6 and abs(right - here) < 1e-6
    slopes = [(alpha_sgd(10 + d, form='continuous') - 0.5) / d for d in (-h, h)]
    assert slopes == pytest.approx([0.2, 0.2], abs=1e-6)


def test_continuous_is_the_elu():
    epochs = np.linspace(0, 12.4, 100)
    u = 2 * (epochs - 10) / 5
    elu = np.where(u < 0, np.expm1(u), u)
    np.testing.assert_allclose(alpha_sgd(epochs, form='continuous'), (elu + 1) / 2, atol=1e-12)


def test_other_centre_and_period():
    assert alpha_sgd(3, beta_center=4, beta_period=8) == pytest.approx(
        math.exp(-0.25) / 2, abs=1e-12
    )
    assert alpha_sgd(5, beta_center=4, beta_period=8) == 0.75
    assert alpha_sgd(8, beta_center=4, beta_period=8) == 1


def test_bad_form_and_period():
    with pytest.raises(ValueError, match='smooth'):
        alpha_sgd(0, form='smooth')
    with pytest.raises(ValueError, match='beta_period'):
        alpha_sgd(0, beta_period=0)


def test_alpha_rmsprop():
    assert alpha_rmsprop(0.25, 6.4) == pytest.approx(0.75 * 3e-4 / 6.4, rel=1e-15)
    assert alpha_rmsprop(0.25, 6.4, lr_rmsprop=1) == pytest.approx(0.75 / 6.4, rel=1e-15)
    assert alpha_rmsprop(1.3, 6.4) == 0
    epochs = np.linspace(0, 90, 9001)
    assert np.all(alpha_rmsprop(alpha_sgd(epochs), 0.1) >= 0)
    assert np.all(alpha_rmsprop(alpha_sgd(epochs), 0.1)[epochs >= 11.25] == 0)
    with pytest.raises(ValueError, match='lr'):
        alpha_rmsprop(0.5, 0)


def test_learning_rates_of_the_paper():
    assert base_learning_rate(1024 * 32) == pytest.approx(12.8, rel=1e-15)
    assert base_learning_rate(256) == 0.1
    epochs = [0, np.nextafter(40, 0), 40, 70, np.nextafter(85, 0), 85, 90.006]
    factors = [0.5, 0.5, 0.075, 0.01, 0.01, 0.001, 0.001]
    np.testing.assert_array_equal(slow_start_factor(epochs), factors)
    np.testing.assert_allclose(
        12.8 * slow_start_factor(np.array([0, 40, 70, 85])), [6.4, 0.96, 0.128, 0.0128], rtol=1e-12
    )
    assert isinstance(slow_start_factor(3), float)


def test_learning_rate_is_the_product():
    epochs = [0, 39.9, 40, 70, 85, 90]
    for batch in (64, 256, 8192):
        expected = base_learning_rate(batch) * slow_start_factor(epochs)
        np.testing.assert_array_equal(learning_rate(epochs, batch), expected)
        assert isinstance(learning_rate(3, batch), float)


def test_the_extension_follows_another_schedule(tmp_path):
    trainer, updater, _ = counting_trainer(
        tmp_path,
        24,
        batch=8192,
        images=20_000,
        epochs=10,
        schedule=lambda epoch, batch: 1e-3 * batch / (1 + epoch),
    )
    trainer.run()
    expected = [8.192 / (1 + i * 8192 / 20_000 * 9) for i in range(24)]
    np.testing.assert_allclose([lr for lr, _, _ in updater.used], expected, rtol=1e-12)


class Counter(chainer.training.Updater):
    """An updater with a model of one parameter, whose iterator has its own idea of an epoch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.iteration = 0
        self.used = []
        self.epoch_detail = self.epoch = 10**6

    def connect_trainer(self, trainer):
        pass

    def get_optimizer(self, name):
        return self.optimizer

    def get_all_optimizers(self):
        return {'main': self.optimizer}

    def update(self):
        self.optimizer.target.p.grad = np.zeros(1)
        self.used.append(
            (self.optimizer.lr, self.optimizer.alpha_sgd, self.optimizer.alpha_rmsprop)
        )
        self.optimizer.update()
        self.iteration += 1

    def finalize(self):
        pass


def counting_trainer(
    tmp_path,
    n_iterations,
    start=0,
    batch=32768,
    images=1281167,
    schedule=learning_rate,
    **options,
):
    link = chainer.Link()
    with link.init_scope():
        link.p = chainer.Parameter(np.zeros(1))
    updater = Counter(RMSpropWarmup(0.1).setup(link))
    updater.iteration = start
    trainer = chainer.training.Trainer(updater, (n_iterations, 'iteration'), str(tmp_path))
    seen = []

    @chainer.training.make_extension(trigger=(1, 'iteration'))
    def observe(trainer):
        optimizer = trainer.updater.optimizer
        hyperparameters = (optimizer.lr, optimizer.alpha_sgd, optimizer.alpha_rmsprop)
        seen.append((dict(trainer.observation), hyperparameters))

    trainer.extend(AlphaSGDSchedule(batch, images, **options))  # the wrong way round, on purpose
    trainer.extend(StepLearningRate(batch, images, options.get('epochs', 90), schedule=schedule))
    trainer.extend(observe)
    return trainer, updater, seen


def expected_sequence(start, stop, batch=32768, images=1281167, epochs=90, form='printed'):
    """(lr, alpha_sgd, alpha_rmsprop) of each update: [L], [W5], [W4], as the paper has them."""
    sequence = []
    for iteration in range(start, stop):
        epoch = iteration * batch / images * 90 / epochs
        factor = 0.5 if epoch < 40 else 0.075 if epoch < 70 else 0.01 if epoch < 85 else 0.001
        lr = 0.1 * batch / 256 * factor
        if epoch < 10:
            alpha = 0.5 * math.exp(2 * (epoch - 10) / 5)
        elif epoch < 12.5:
            alpha = 0.5 + (2 if form == 'printed' else 1) * (epoch - 10) / 5
        else:
            alpha = 1
        sequence.append((lr, alpha, max(0, 1 - alpha) * 3e-4 / lr))
    return sequence


@pytest.mark.parametrize('form', ['printed', 'continuous'])
def test_all_3519_updates_of_the_paper(tmp_path, form):
    trainer, updater, seen = counting_trainer(tmp_path, 3519, form=form)
    trainer.run()
    expected = expected_sequence(0, 3519, form=form)
    np.testing.assert_allclose(updater.used, expected, rtol=1e-12, atol=1e-15)
    for (observation, hyperparameters), used in zip(seen, updater.used):
        assert hyperparameters == used  # observers see what the update used, not what the next will
        assert tuple(observation[k] for k in ('lr', 'alpha_sgd', 'alpha_rmsprop')) == used
    assert len(seen) == 3519


def test_a_resumed_run_continues_the_sequence(tmp_path):
    trainer, updater, _ = counting_trainer(tmp_path, 520, start=400)
    trainer.run()
    np.testing.assert_allclose(updater.used, expected_sequence(400, 520), rtol=1e-12, atol=1e-15)


def test_an_optimizer_can_serve_two_trainers_one_after_the_other(tmp_path):
    first, updater, _ = counting_trainer(tmp_path, 3)
    first.run()
    second, its_updater, _ = counting_trainer(tmp_path, 6, start=3)
    its_updater.optimizer = updater.optimizer
    second.run()
    expected = expected_sequence(0, 6)
    used = [*updater.used, *its_updater.used]
    np.testing.assert_allclose(used, expected, rtol=1e-12, atol=1e-15)


def test_schedules_of_another_than_the_main_optimizer(tmp_path):
    trainer, updater, _ = counting_trainer(tmp_path, 2)
    other = RMSpropWarmup(0.1).setup(chainer.Link())
    for schedule in (StepLearningRate, AlphaSGDSchedule):
        trainer.extend(schedule(64, 1437, optimizer=other), name=f'other {schedule.__name__}')
    trainer.run()
    [*_, (lr, alpha_sgd, alpha_rmsprop)] = expected_sequence(0, 3, batch=64, images=1437)
    assert other.lr == pytest.approx(lr) and other.alpha_sgd == pytest.approx(alpha_sgd)
    assert other.alpha_rmsprop == pytest.approx(alpha_rmsprop)
    np.testing.assert_allclose(updater.used, expected_sequence(0, 2), rtol=1e-12)


def test_fewer_epochs_stretch_the_schedules(tmp_path):
    trainer, updater, _ = counting_trainer(tmp_path, 225, batch=64, images=1437, epochs=10)
    trainer.run()
    expected = expected_sequence(0, 225, batch=64, images=1437, epochs=10)
    np.testing.assert_allclose(updater.used, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('schedule', [StepLearningRate, AlphaSGDSchedule])
@pytest.mark.parametrize('arguments', [(0, 10), (10, 0), (10, 10, 0)])
def test_nothing_can_be_zero(schedule, arguments):
    with pytest.raises(ValueError, match='above 0'):
        schedule(*arguments)


# --- Beside Chainer's own updaters, optimizers and snapshots --------------------------------------


class Program:
    """A program of another Chainer user, from its beginning: a linear model on eight numbers."""

    optimizer = RMSpropWarmup

    def __init__(self, out, stop, wrap=lambda optimizer: optimizer, batch=32768, images=1281167):
        self.model = chainer.links.Linear(1, 1, initialW=0.5)
        self.used = []
        optimizer = self.optimizer(0.1).setup(self.model)
        optimizer.add_hook(self.record, 'record', timing='post')
        data = np.arange(8, dtype=np.float32).reshape(8, 1)
        iterator = chainer.iterators.SerialIterator(data, 2)
        self.updater = chainer.training.StandardUpdater(
            iterator, wrap(optimizer), loss_func=lambda x: chainer.functions.mean(self.model(x))
        )
        self.trainer = chainer.training.Trainer(self.updater, (stop, 'iteration'), str(out))
        self.schedules = [StepLearningRate(batch, images), AlphaSGDSchedule(batch, images)]

    def record(self, optimizer):
        names = ('lr', 'alpha_sgd', 'alpha_rmsprop')
        self.used.append(tuple(getattr(optimizer, name) for name in names))

    def extend(self):
        for schedule in self.schedules:
            self.trainer.extend(schedule)
        return self


def multi_node(optimizer):
    return chainermn.create_multi_node_optimizer(optimizer, create_communicator('mpi'))


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot of a program that stopped after iteration 3,326 of the paper's 3,519."""
    first = Program(tmp_path, 3326).extend()
    first.updater.iteration = 3324
    first.trainer.extend(chainer_extensions.snapshot(), trigger=(1, 'iteration'))
    first.trainer.run()
    np.testing.assert_allclose(first.used, expected_sequence(3324, 3326), rtol=1e-12)
    assert [lr for lr, _, _ in first.used] == pytest.approx([0.0128] * 2, rel=1e-12)
    return tmp_path / 'snapshot_iter_3326'


@pytest.mark.parametrize('wrap', [lambda optimizer: optimizer, multi_node])
@pytest.mark.parametrize('how', ['autoload', 'autoload last', 'load', 'load before extend'])
def test_the_first_update_after_every_way_of_resuming(snapshot, how, wrap):
    second = Program(snapshot.parent, 3329, wrap)
    autoload = chainer_extensions.snapshot(autoload=True)
    if how == 'autoload':
        second.trainer.extend(autoload, trigger=(1, 'iteration'))
    if how == 'load before extend':
        chainer.serializers.load_npz(snapshot, second.trainer)
    second.extend()
    if how == 'autoload last':
        second.trainer.extend(autoload, trigger=(1, 'iteration'), priority=-10_000)
    if how == 'load':
        chainer.serializers.load_npz(snapshot, second.trainer)
    observed = []
    second.trainer.extend(lambda trainer: observed.append(dict(trainer.observation)), name='look')
    second.trainer.run()
    skipped = wrap is multi_node  # its first iteration is a broadcast, without an update
    expected = expected_sequence(3326 + skipped, 3329)
    np.testing.assert_allclose(second.used, expected, rtol=1e-12)
    assert [seen['lr'] for seen in observed[skipped:]] == [lr for lr, _, _ in second.used]


def test_a_snapshot_that_is_loaded_in_the_middle_of_a_training(snapshot):
    program = Program(snapshot.parent, 3329).extend()

    @chainer.training.make_extension(trigger=(2, 'iteration'), priority=-10_000)
    def jump(trainer):
        if trainer.updater.iteration == 2:
            chainer.serializers.load_npz(snapshot, trainer.updater, path='updater/')

    program.trainer.extend(jump)
    program.trainer.run()
    expected = [*expected_sequence(0, 2), *expected_sequence(3326, 3329)]
    np.testing.assert_allclose(program.used, expected, rtol=1e-12)


def hooks_of(program):
    hookable = program.updater.get_optimizer('main')._hookable
    return [*hookable._pre_update_hooks, *hookable._post_update_hooks]


def test_a_cell_of_a_notebook_that_is_interrupted_and_run_again(tmp_path):
    program = Program(tmp_path, 6).extend()

    @chainer.training.make_extension(trigger=(1, 'iteration'), priority=10_000)
    def interrupt(trainer):
        if len(program.used) == 3:
            raise KeyboardInterrupt

    program.trainer.extend(interrupt)
    with pytest.raises(KeyboardInterrupt):
        program.trainer.run()
    assert hooks_of(program) == ['record']
    program.trainer.run()
    np.testing.assert_allclose(program.used, expected_sequence(0, 6), rtol=1e-12)
    assert hooks_of(program) == ['record']


@pytest.mark.parametrize('priority', [0, -10_000])  # before and after the schedules
def test_another_extension_that_cannot_be_initialized(tmp_path, priority):
    first = Program(tmp_path, 6).extend()
    failures = [OSError('no such file')]

    def initialize(trainer):
        while failures:
            raise failures.pop()

    other = chainer.training.make_extension(initializer=initialize)(lambda trainer: None)
    first.trainer.extend(other, name='other', priority=priority)
    with pytest.raises(OSError):
        first.trainer.run()
    assert hooks_of(first) == ['record'] or priority == -10_000
    # Outside of its trainer's run, a hook that is left sets nothing.
    optimizer = first.updater.get_optimizer('main')
    optimizer.lr = 7
    optimizer.update(lambda: chainer.functions.sum(first.model.W * 1))
    assert first.used.pop()[0] == 7
    # The same optimizer in another trainer, and then the first trainer again.
    second = Program(tmp_path, 3).extend()
    second.updater._optimizers['main'] = optimizer
    second.trainer.run()
    first.updater.iteration = 3
    first.trainer.run()
    np.testing.assert_allclose(first.used, expected_sequence(0, 6), rtol=1e-12)
    assert hooks_of(first) == ['record']


@pytest.mark.parametrize('priority', [0, -10_000])
def test_an_optimizer_that_is_set_up_again_in_the_middle(tmp_path, priority):
    program = Program(tmp_path, 6).extend()
    optimizer = program.updater.get_optimizer('main')
    reported = []

    @chainer.training.make_extension(trigger=(3, 'iteration'), priority=priority)
    def set_up_again(trainer):
        optimizer.setup(program.model)
        optimizer.add_hook(program.record, 'record', timing='post')

    program.trainer.extend(set_up_again)
    program.trainer.extend(lambda trainer: reported.append('lr' in trainer.observation), name='o')
    program.trainer.run()
    np.testing.assert_allclose(program.used, expected_sequence(0, 6), rtol=1e-12)
    assert sum(reported) >= 5 and reported[-1]


class MomentumProgram(Program):
    optimizer = chainer.optimizers.MomentumSGD


class AdamProgram(Program):
    optimizer = chainer.optimizers.Adam


@pytest.mark.parametrize('wrap', [lambda optimizer: optimizer, multi_node])
def test_hyperparameters_that_the_optimizer_does_not_have(tmp_path, wrap):
    momentum = MomentumProgram(tmp_path, 3, wrap)
    message = 'AlphaSGDSchedule sets alpha_sgd and alpha_rmsprop, which MomentumSGD does not have'
    with pytest.raises(ValueError, match=message):
        AlphaSGDSchedule(64, 1437, optimizer=momentum.updater.get_optimizer('main'))
    momentum.trainer.extend(momentum.schedules[1])
    with pytest.raises(ValueError, match=message):
        momentum.trainer.run()
    assert momentum.updater.iteration == 0
    adam = AdamProgram(tmp_path, 3, wrap)
    adam.trainer.extend(adam.schedules[0])
    with pytest.raises(ValueError, match='StepLearningRate sets lr, which Adam does not have'):
        adam.trainer.run()


def test_the_learning_rate_of_chainers_own_optimizer(tmp_path):
    program = MomentumProgram(tmp_path, 3)
    program.record = lambda optimizer: None
    rates = []
    program.trainer.extend(program.schedules[0])
    program.trainer.extend(lambda trainer: rates.append(trainer.observation['lr']), name='look')
    with pytest.raises(AttributeError):
        program.updater.get_optimizer('main').alpha_sgd  # noqa: B018
    program.updater.get_optimizer('main').remove_hook('record')
    program.trainer.run()
    assert rates == pytest.approx([6.4] * 3)


class EarlyRate(StepLearningRate):
    pass


@pytest.mark.parametrize('second', [StepLearningRate, EarlyRate, AlphaSGDSchedule])
def test_two_schedules_of_one_hyperparameter_are_an_error(tmp_path, second):
    program = Program(tmp_path, 3).extend()
    program.trainer.extend(second(64, 1437))
    for _ in range(2):  # the second time, too
        with pytest.raises(ValueError, match=f'{second.__name__}.* both set .* of one optimizer'):
            program.trainer.run()
    assert program.used == []


def test_several_optimizers_report_under_their_names(tmp_path):
    links = {name: chainer.links.Linear(1, 1) for name in ('main', 'generator')}
    optimizers = {name: RMSpropWarmup(0.1).setup(link) for name, link in links.items()}

    class Updater(chainer.training.StandardUpdater):
        def update_core(self):
            x = self.converter(self.get_iterator('main').next())
            for name, link in links.items():
                self.get_optimizer(name).update(lambda: chainer.functions.mean(link(x)))  # noqa: B023

    iterator = chainer.iterators.SerialIterator(np.ones((8, 1), np.float32), 2)
    updater = Updater(iterator, optimizers)
    trainer = chainer.training.Trainer(updater, (2, 'iteration'), str(tmp_path))
    for batch, name in ((64, 'main'), (128, 'generator')):
        trainer.extend(StepLearningRate(batch, 1437, optimizer=optimizers[name]))
        trainer.extend(AlphaSGDSchedule(batch, 1437, optimizer=optimizers[name]))
    seen = []
    trainer.extend(lambda trainer: seen.append(dict(trainer.observation)), name='look')
    trainer.run()
    for batch, prefix in ((64, ''), (128, 'generator/')):
        names = [prefix + name for name in ('lr', 'alpha_sgd', 'alpha_rmsprop')]
        observed = [[observation[name] for name in names] for observation in seen]
        expected = expected_sequence(0, 2, batch=batch, images=1437)
        np.testing.assert_allclose(observed, expected, rtol=1e-12)


def test_an_updater_without_a_main_optimizer(tmp_path):
    program = Program(tmp_path, 2).extend()
    program.updater._optimizers['generator'] = program.updater._optimizers.pop('main')
    with pytest.raises(ValueError, match='no optimizer named main: give the schedule its'):
        program.trainer.run()


def test_a_learning_rate_that_falls_to_zero_at_the_end(tmp_path):
    program = Program(tmp_path, 4, batch=1, images=4)
    falling = StepLearningRate(1, 4, epochs=1, schedule=lambda epoch, batch: 0.1 * (1 - epoch / 90))
    program.schedules = [falling, AlphaSGDSchedule(1, 4, epochs=1)]
    program.extend().trainer.run()
    assert [lr for lr, _, _ in program.used] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert program.updater.get_optimizer('main').lr == 0
    assert alpha_rmsprop(np.array([1.0, 0.5]), np.array([0.0, 2.0])) == pytest.approx([0, 7.5e-5])
