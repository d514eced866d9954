"""The tables of the miniature: results by variant, and the planned comparisons."""

from __future__ import annotations

import math
import statistics

from reproduce.studies.miniature import paired, variants


def all_tables(logs: dict, first_losses: dict) -> str:
    """Returns all tables as Markdown.

    Args:
        logs (dict): Variant, then seed, to Chainer's log of a finished run.
        first_losses (dict): Variant, then seed, to the training losses of the first updates.
    """
    top1 = {v: {seed: _top1(log) for seed, log in seeds.items()} for v, seeds in logs.items()}
    first = {
        v: {seed: statistics.mean(losses) for seed, losses in seeds.items()}
        for v, seeds in first_losses.items()
    }
    families = (
        ('main: top-1, points', top1, variants.MAIN_COMPARISONS, '.2f'),
        ('others: top-1, points', top1, variants.OTHER_COMPARISONS, '.2f'),
        ('loss, first 5 %', first, variants.EARLY_COMPARISONS, '.3f'),
        ('ResNet-10: top-1, points', top1, variants.MAIN_AGAIN_COMPARISONS, '.2f'),
        ('ResNet-10: loss, first 5 %', first, variants.EARLY_AGAIN_COMPARISONS, '.3f'),
    )
    return '\n\n'.join((results(logs, top1, first), *(comparisons(*family) for family in families)))


def results(logs: dict, top1: dict, first: dict) -> str:
    """Returns a row per variant: n, and means with 95 % intervals over the seeds."""
    lines = [
        '| | variant | n | top-1, % | loss, first 5 % | training loss | validation loss |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, variant in variants.VARIANTS.items():
        seeds = logs.get(name, {})
        cells = ['not run'] + [''] * 3
        if seeds:
            last = [log[-1] for log in seeds.values()]
            cells = [
                _mean(top1[name].values(), '.2f'),
                _mean(first[name].values(), '.3f'),
                _mean((entry['main/loss'] for entry in last), '.3f'),
                _mean((entry['validation/main/loss'] for entry in last), '.3f'),
            ]
        lines.append(f'| {name} | {variant.title} | {len(seeds)} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def comparisons(title: str, values: dict, planned, form: str) -> str:
    """Returns a row per planned comparison.

    Args:
        title (str): Title of the difference's column.
        values (dict): Variant, then seed, to a number.
        planned (tuple of Comparison): One family, for whose size p-values are corrected.
        form (str): Format of a difference.
    """
    differences = {
        c: paired.difference(values.get(c.variant, {}), values.get(c.other, {})) for c in planned
    }
    p_values = {f'{c.variant} - {c.other}': d.p for c, d in differences.items() if d}
    corrected = paired.holm(p_values, len(planned))
    lines = [
        f'| {title} | expected | n | mean, 95 % interval | p | p, Holm | verdict |',
        '|---|---|---|---|---|---|---|',
    ]
    for c, d in differences.items():
        name = f'{c.variant} - {c.other}'
        if d is None:
            lines.append(f'| {name} | {c.expected} | 0 | not run | | | |')
            continue
        p = corrected[name]
        cells = [_interval(d.mean, d.half_width, f'+{form}'), _p(d.p), _p(p), verdict(c, d, p)]
        lines.append(f'| {name} | {c.expected} | {d.n} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def verdict(comparison, difference, p: float) -> str:
    """Returns what a comparison shows, or ``'incomplete'`` before all seeds are there.

    Args:
        comparison (Comparison): What was planned.
        difference (Difference): What was found.
        p (float): The corrected p-value.
    """
    if difference.n < variants.N_SEEDS:
        return 'incomplete'
    if comparison.expected == 'near':
        if abs(difference.mean) + difference.half_width <= variants.NEAR:
            return 'as expected'
        return 'against' if p < variants.SIGNIFICANCE else 'open'
    if p >= variants.SIGNIFICANCE:
        return 'open'
    return 'as expected' if (difference.mean > 0) == (comparison.expected == 'above') else 'against'


def _top1(log) -> float:
    return 100 * log[-1]['validation/main/accuracy']


def _mean(values, form) -> str:
    values = list(values)
    n = len(values)
    if n == 1:
        return f'{values[0]:{form}}'
    half_width = paired.quantile(0.95, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return _interval(statistics.mean(values), half_width, form)


def _interval(mean, half_width, form) -> str:
    if math.isnan(half_width):
        return f'{mean:{form}}'
    return f'{mean:{form}} +- {half_width:{form.lstrip("+")}}'


def _p(p) -> str:
    if math.isnan(p):
        return ''
    return f'{p:.3f}' if p >= 0.001 else '< 0.001'
