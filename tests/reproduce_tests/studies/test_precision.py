"""The study of the wire's precision, against the same gradients summed by hand."""

import functools
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from reproduce.dataset import write_digits
from reproduce.listing import list_images
from reproduce.studies import precision

STUDY = precision.Study(workers=(1, 3), local_batch_size=2, steps=1)
KINDS = {'convolution': '/conv', 'batch normalization': '/bn', 'fully connected': '/fc'}


# ---------------------------------------------------------------- other orders of the sum


def nearest_half(value):
    """A fraction's nearest float16, by halves of the distance to its neighbours: ties to even."""
    if abs(value) >= 65520:
        return math.copysign(math.inf, value)
    exponent = max(-24, math.frexp(float(value))[1] - 11)
    unit = Fraction(2) ** exponent
    return float(round(value / unit) * unit)


def chain(values):
    total = values[0]
    for value in values[1:]:
        total = nearest_half(Fraction(total) + Fraction(value))
    return total


# Children of each host, as NCCL's source draws its tree of 14 hosts.
OF_14 = {8: (4, 12), 4: (2, 6), 12: (10, 13), 2: (1, 3), 6: (5, 7), 10: (9, 11), 0: (None, 8)}


def sum_of_tree(host, hosts, children):
    total = hosts[host]
    for child in children.get(host, ()):
        if child is not None:
            below = sum_of_tree(child, hosts, children)
            total = nearest_half(Fraction(total) + Fraction(below))
    return total


def sent(function, gradients):
    """The mean that a simulated sum returns; it must end with the last worker."""
    running = function(len(gradients))
    next(running)
    for gradient in gradients[:-1]:
        running.send(gradient)
    with pytest.raises(StopIteration) as end:
        running.send(gradients[-1])
    return end.value.value


def test_the_tree_is_that_of_nccl():
    found = {host: precision.children(host, 14) for host in range(14)}
    assert {host: pair for host, pair in found.items() if pair != (None, None)} == OF_14
    for n in (1, 2, 3, 8, 100, 128):  # every host but the root is the child of one other
        pairs = [precision.children(host, n) for host in range(n)]
        assert sorted(c for pair in pairs for c in pair if c is not None) == list(range(1, n))


@pytest.mark.parametrize('n', [1, 7, 8, 20, 112])
def test_other_orders_against_fractions(n):
    """Halves that round often: 40 numbers of each of n workers."""
    rng = np.random.RandomState(n)
    gradients = [(rng.randn(40) * 10.0 ** rng.randint(-6, 2, 40)).astype('e') for _ in range(n)]
    before = [gradient.copy() for gradient in gradients]
    values = [list(map(float, column)) for column in zip(*gradients)]
    by_tree, divided = (sent(f, gradients) for f in precision.SIMULATED.values())
    assert by_tree.dtype == divided.dtype == np.float16
    tree = OF_14 if n == 112 else {0: (None, 2), 2: (1, None)} if n == 20 else {}
    for column, one, other in zip(values, by_tree, divided):
        hosts = [chain(column[i : i + 8]) for i in range(0, n, 8)]
        total = sum_of_tree(0, hosts, tree)
        assert one == nearest_half(Fraction(total) / n)
        assert other == chain([nearest_half(Fraction(value) / n) for value in column])
    for gradient, same in zip(gradients, before):
        np.testing.assert_array_equal(gradient, same)
    if n == 112:
        assert not np.array_equal(by_tree, divided)


def test_dividing_first_does_not_overflow():
    gradients = [np.array([60000.0, -60000.0, 1e-7], 'e')] * 8
    by_tree, divided = (sent(f, gradients) for f in precision.SIMULATED.values())
    assert list(by_tree[:2]) == [np.inf, -np.inf] and by_tree[2] > 0
    np.testing.assert_allclose(divided, [60000, -60000, 0], rtol=1e-3)  # it loses what is small


def test_a_sum_is_rounded_as_numpy_rounds_it():
    rng = np.random.RandomState(0)
    a, b = rng.randint(0, 1 << 16, (2, 1 << 18)).astype(np.uint16).view(np.float16)
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    with np.errstate(over='ignore'):
        expected = a + b
    precision.add_rounded(a, b)
    np.testing.assert_array_equal(a, expected)


@pytest.mark.slow
def test_errors_are_those_of_the_definition(shallow, tmp_path, capsys):
    result = precision.run(STUDY, tmp_path / 'out')
    write_digits(tmp_path / 'digits')
    gradient_of = precision.Gradients(STUDY, list_images(tmp_path / 'digits' / 'train'))
    gradient_of.train()
    gradients = []
    for worker in range(3):
        gradient_of(worker)
        gradients.append({n: p.grad.copy() for n, p in gradient_of.model.namedparams()})
    assert not np.array_equal(gradients[0]['/fc/W'], gradients[1]['/fc/W'])
    flushed = nonzero = 0
    for n in STUDY.workers:
        for kind, mark in KINDS.items():
            names = [name for name in gradients[0] if mark in name]
            wide = [np.concatenate([g[k].ravel() for k in names]) for g in gradients[:n]]
            half = [array.astype(np.float16) for array in wide]
            reference = np.mean(wide, axis=0, dtype=np.float64)
            scaled = [(1024 * array).astype(np.float16) for array in wide]
            mean_of_scaled = (np.sum(scaled, axis=0, dtype=np.float64) / n).astype(np.float16)
            divided = [array / np.float16(n) for array in half]
            means = (
                (np.sum(half, axis=0, dtype=np.float64) / n).astype(np.float16),
                mean_of_scaled.astype(np.float64) / 1024,
                functools.reduce(np.add, half) / np.float16(n),
                functools.reduce(np.add, wide) / np.float32(n),
                functools.reduce(np.add, half) / np.float16(n),  # one host: a chain
                functools.reduce(np.add, divided),
            )
            assert len(precision.SUMS) == len(means)
            for name, mean in zip(precision.SUMS, means):
                error = np.linalg.norm(mean - reference) / np.linalg.norm(reference)
                assert result['errors'][n][kind][name] == pytest.approx(error, rel=1e-6)
        assert sum(map(len, gradients[:n])) == n * len(gradients[0])
        nonzero = sum(np.count_nonzero(a) for g in gradients[:n] for a in g.values())
        kept = sum(
            np.count_nonzero(a.astype(np.float16)) for g in gradients[:n] for a in g.values()
        )
        flushed = (nonzero - kept) / nonzero
        assert flushed > 0
        assert result['cast'][n] == {'flushed': pytest.approx(flushed), 'inf': 0, 'nan': 0}
    written = json.loads((tmp_path / 'out' / 'precision.json').read_text())
    assert written['errors']['3'] == result['errors'][3] and written['images'] == 1437
    assert (tmp_path / 'out' / 'precision.png').read_bytes().startswith(b'\x89PNG')
    out = capsys.readouterr().out
    assert f'{result["errors"][3]["convolution"]["float16, sum of a ring"]:.2e}' in out
    assert f'flushed {flushed:.2%} of the nonzero gradients to zero' in out


@pytest.mark.slow
def test_other_ways_to_a_total_batch(shallow, tmp_path, capsys):
    study = precision.Study(workers=(3,), local_batch_size=2, steps=1)
    result = precision.accumulation(study)
    write_digits(tmp_path / 'digits')
    gradient_of = precision.Gradients(study, list_images(tmp_path / 'digits' / 'train'))
    gradient_of.train()
    links = [link for link in gradient_of.model.links() if hasattr(link, 'avg_mean')]
    gradients, means, variances = [], [], []
    for worker in range(3):
        gradient_of(worker)
        gradients.append(np.concatenate([p.grad.ravel() for p in gradient_of.model.params()]))
        means.append(np.concatenate([link.avg_mean for link in links]))
        variances.append(np.concatenate([link.avg_var for link in links]))
    ours = np.mean([g.astype(np.float16) for g in gradients], axis=0, dtype=np.float64)
    ours = ours.astype(np.float16).astype(np.float64)
    plain = np.mean(gradients, axis=0, dtype=np.float64)
    (grad, mean, variance), whole = result.values()
    assert grad == pytest.approx(np.linalg.norm(plain - ours) / np.linalg.norm(ours), rel=1e-3)
    for found, values in ((mean, means), (variance, variances)):
        average = np.mean(values, axis=0)
        expected = np.linalg.norm(values[-1] - average) / np.linalg.norm(average)
        assert found == pytest.approx(expected, rel=1e-3)
    assert min(whole) > 0.1 > grad
    assert f'{grad:.1e}' in capsys.readouterr().out
