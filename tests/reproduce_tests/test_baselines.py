import numpy as np
import pytest

from extensions import learning_rate
from reproduce.baselines import LR_SCHEDULES, gradual_warmup, steps


def goyals(epoch, batch, warmup):
    """Their learning rate, written out: eta = 0.1 k n / 256, a tenth of it from 30, 60, 80 on each;
    5 epochs lead to it from 0.1."""
    full = 0.1 * batch / 256
    if warmup and epoch < 5 and full > 0.1:
        return 0.1 + (full - 0.1) * epoch / 5
    return full / 10 ** sum(epoch >= step for step in (30, 60, 80))


@pytest.mark.parametrize('batch', [64, 256, 8192])
@pytest.mark.parametrize('schedule', [steps, gradual_warmup])
def test_learning_rates_to_compare_with(schedule, batch):
    epochs = [0, 1, 2.5, np.nextafter(5, 0), 5, 29, 30, np.nextafter(60, 0), 60, 79, 80, 90]
    expected = [goyals(epoch, batch, schedule is gradual_warmup) for epoch in epochs]
    np.testing.assert_allclose(schedule(epochs, batch), expected, rtol=1e-14)
    np.testing.assert_allclose([schedule(e, batch) for e in epochs], expected, rtol=1e-14)
    assert isinstance(schedule(3, batch), float)


def test_names_are_those_of_the_option():
    expected = {'slow_start': learning_rate, 'steps': steps, 'gradual_warmup': gradual_warmup}
    assert LR_SCHEDULES == expected
