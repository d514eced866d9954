import math

import chainer
import numpy as np
import pytest

from extensions import (
    AlphaSGDSchedule,
    RMSpropWarmup,
    StepLearningRate,
    alpha_rmsprop,
    alpha_sgd,
    base_learning_rate,
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
