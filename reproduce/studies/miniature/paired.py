"""Paired t tests over seeds, corrected for the number of comparisons."""

from __future__ import annotations

import dataclasses
import math
import statistics


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences, by Student's t with n - 1 degrees of freedom.

    Attributes:
        n (int): Number of pairs.
        mean (float): Mean difference.
        half_width (float): The interval is ``mean`` -+ this; NaN for one pair.
        p (float): Two-sided p-value of "the mean is 0"; NaN for one pair.
    """

    n: int
    mean: float
    half_width: float
    p: float


def difference(values: dict, others: dict, confidence=0.95) -> Difference | None:
    """Compares two variants over the seeds that both have::

        t = mean(d) / (s / sqrt(n))        d: value - other by seed, s: their deviation (n - 1)

    Args:
        values, others (dict): Seed to a number.
        confidence (float): Of the interval.

    Returns:
        Difference: None without a common seed.
    """
    d = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    if not d:
        return None
    mean = statistics.mean(d)
    if len(d) == 1:
        return Difference(1, mean, math.nan, math.nan)
    error = statistics.stdev(d) / math.sqrt(len(d))
    if error == 0:
        return Difference(len(d), mean, 0.0, 1.0 if mean == 0 else 0.0)
    half_width = quantile(confidence, len(d) - 1) * error
    return Difference(len(d), mean, half_width, two_sided_p(mean / error, len(d) - 1))


def two_sided_p(t: float, df: int) -> float:
    """Returns P(|T| >= |t|) of Student's t.

    For a whole number of degrees of freedom the distribution is a finite sum (Abramowitz and
    Stegun, 26.7.3 and 26.7.4).

    Args:
        t (float): The statistic.
        df (int): Degrees of freedom, at least 1.
    """
    theta = math.atan(abs(t) / math.sqrt(df))
    cosine = math.cos(theta)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(1 + odd, df, 2):
        total += term
        term *= k / (k + 1) * cosine**2
    inside = math.sin(theta) * total
    if odd:
        inside = 2 / math.pi * (theta + inside)
    return max(0.0, 1 - inside)


def quantile(confidence: float, df: int) -> float:
    """Returns the t with P(|T| <= t) = ``confidence``: 2.776 for 0.95 and 4 degrees of freedom."""
    low, high = 0.0, 1.0
    while two_sided_p(high, df) > 1 - confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, df) > 1 - confidence else (low, middle)
    return high


def holm(p_values: dict, n_comparisons: int) -> dict:
    """Corrects p-values for their number, by Holm's method.

    Args:
        p_values (dict): Name to p-value. NaN stays, and is not counted as tested.
        n_comparisons (int): Number of comparisons that were planned, tested or not.

    Returns:
        dict: Name to the corrected p-value, at most 1.
    """
    corrected, highest = dict(p_values), 0.0
    tested = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    for rank, (p, name) in enumerate(tested):
        highest = max(highest, (n_comparisons - rank) * p)
        corrected[name] = min(1.0, highest)
    return corrected
