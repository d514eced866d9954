"""The paired t test of the miniature, against Student's own data, tables and an integral."""

import math

import numpy as np
import pytest

from reproduce.studies.miniature import paired


@pytest.mark.parametrize(
    'confidence, df, t',
    [
        *((0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776)),
        *((0.95, 9, 2.262), (0.95, 30, 2.042), (0.99, 4, 4.604), (0.99, 5, 4.032)),
    ],
)
def test_quantiles_are_those_of_the_tables(confidence, df, t):
    assert paired.quantile(confidence, df) == pytest.approx(t, abs=5e-4)


@pytest.mark.parametrize('df', [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize('t', [0.3, 1.0, -2.5, 7.0])
def test_p_is_the_integral_of_the_density(df, t):
    x = np.linspace(0, abs(t), 200_001)
    constant = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    density = constant * (1 + x**2 / df) ** (-(df + 1) / 2)
    inside = np.sum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])
    assert paired.two_sided_p(t, df) == pytest.approx(1 - 2 * inside, abs=1e-9)


def test_a_difference_is_that_of_students_sleep_data():
    """R's t.test(..., paired=TRUE): t = -4.0621, df = 9, p = 0.002833, -2.4598858 to -0.7001142."""
    first = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
    second = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)
    seeds = [7, 3, 1, 0, 2, 4, 5, 6, 8, 9]  # pairs go by seed, not by place
    backwards = dict(reversed(list(zip(seeds, second))))
    found = paired.difference({**dict(zip(seeds, first)), 77: 100.0}, backwards)
    assert (found.n, found.mean) == (10, pytest.approx(-1.58))
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert found.mean - found.half_width == pytest.approx(-2.4598858, abs=1e-7)
    assert found.mean + found.half_width == pytest.approx(-0.7001142, abs=1e-7)


def test_differences_without_a_deviation():
    assert paired.difference({0: 1.0}, {1: 1.0}) is None
    one = paired.difference({0: 3.0, 1: 9.0}, {0: 1.0})
    assert (one.n, one.mean) == (1, 2.0) and math.isnan(one.p) and math.isnan(one.half_width)
    same = paired.difference({0: 1.5, 1: 2.5}, {0: 1.5, 1: 2.5})
    assert (same.mean, same.half_width, same.p) == (0, 0, 1)
    shifted = paired.difference({0: 1.5, 1: 2.5}, {0: 1.0, 1: 2.0})
    assert (shifted.mean, shifted.half_width, shifted.p) == (0.5, 0, 0)


def test_holm_is_that_of_r():
    p = dict(zip('abcd', (0.01, 0.04, 0.03, 0.005)))
    # p.adjust(c(0.01, 0.04, 0.03, 0.005), 'holm')
    expected = dict(zip('abcd', (0.03, 0.06, 0.06, 0.02)))
    assert paired.holm(p, 4) == pytest.approx(expected)
    # Of six planned, two without a p: those that were tested are corrected for six.
    found = paired.holm({**p, 'e': math.nan}, 6)
    assert math.isnan(found.pop('e'))
    assert found == pytest.approx(dict(zip('abcd', (0.05, 0.12, 0.12, 0.03))))
    assert paired.holm({'a': 0.6}, 2) == {'a': 1.0}
