"""The compiled conversions against NumPy's, bit by bit."""

import functools

import numpy as np
import pytest

from extensions import kernels

pytestmark = pytest.mark.skipif(
    'mean_float16_float16' not in kernels.compiled,
    reason=kernels.description(),
)
HALVES = np.arange(65536, dtype=np.uint16).view(np.float16)  # all there are


@pytest.fixture
def both(monkeypatch):
    """``both(function, target)`` calls the function, which writes to its argument, compiled and
    not; returns the two results, all NaNs alike."""

    in_c = kernels.compiled

    def call(function, target):
        results = []
        for compiled in (in_c, {}):
            monkeypatch.setattr(kernels, 'compiled', compiled)
            result = target.copy()
            with np.errstate(all='ignore'):
                function(result)
            result[np.isnan(result)] = 1
            results.append(result.view(np.uint8))
        return results

    return call


def test_the_description_follows_what_runs(monkeypatch):
    assert kernels.description() == 'compiled C'
    without = {name: kernels.compiled[name] for name in kernels.compiled if 'float16' not in name}
    monkeypatch.setattr(kernels, 'compiled', without)
    assert kernels.description().startswith('compiled C, float16 in NumPy')
    monkeypatch.setattr(kernels, 'compiled', {})
    assert kernels.description() == 'NumPy'


def finite(values):
    return values[np.isfinite(values)].astype(np.float64)


def test_all_halves_to_doubles(both):
    target = np.empty(65536, np.float64)
    np.testing.assert_array_equal(*both(lambda t: kernels.widen(HALVES, t), target))


@pytest.mark.parametrize('scale', [1.0, 2.0**-10, 2.0**24])
def test_all_halves_to_floats(both, scale):
    bad = []
    target = np.empty((256, 256), np.float32)
    compiled, plain = both(lambda t: bad.extend(kernels.unpack(HALVES, scale, [t])), target)
    np.testing.assert_array_equal(compiled, plain)
    assert bad == [2 + 2 * 1023] * 2  # two infinities; an exponent of NaNs of each sign
    with np.errstate(invalid='ignore'):
        expected = HALVES.astype(np.float64) / scale
    expected[np.isnan(expected)] = 1
    result = plain.reshape(-1).view(np.float32)
    np.testing.assert_array_equal(result, expected.astype(np.float32))


@pytest.mark.parametrize('scale', [1.0, 2.0**-10, 2.0**12])
def test_floats_to_halves(both, scale):
    rng = np.random.RandomState(0)
    any_bits = rng.randint(0, 2**32, 300_001, dtype=np.uint32).view(np.float32)
    exact = np.sort(finite(HALVES))
    ties = (exact[:-1] + exact[1:]) / 2
    near = np.concatenate([exact, ties, [65519, 65520, -65520]]).astype(np.float32)
    source = np.concatenate([any_bits, near, np.nextafter(near, 9e9), np.nextafter(near, -9e9)])
    counts = []

    def pack(target):
        counts.append(np.full(4, 7))
        kernels.pack([source], scale, target, counts[-1][None])

    target = np.empty(source.size, np.float16)
    np.testing.assert_array_equal(*both(pack, target))
    with np.errstate(all='ignore'):
        half = (source.astype(np.float64) * scale).astype(np.float32).astype(np.float16)
    expected = [(source != 0).sum(), (half != 0).sum(), np.isinf(half).sum(), np.isnan(half).sum()]
    assert min(expected) > 0 and expected[0] > expected[1]
    np.testing.assert_array_equal(counts, [np.add(expected, 7)] * 2)


ANY_FLOATS = np.random.RandomState(0).randint(0, 2**32, 300_001, dtype=np.uint32).view(np.float32)


@pytest.mark.parametrize('scale', [1.0, 2.0**-10, 2.0**12])
def test_floats_on_the_wire(both, scale):
    odd = np.array([0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 3e38, 1e-42], np.float32)
    source, counts, bad = np.concatenate([ANY_FLOATS, odd]), [], []

    def pack(target):
        counts.append(np.full(4, 7))
        kernels.pack([source], scale, target, counts[-1][None])

    with np.errstate(all='ignore'):
        sent = (source.astype(np.float64) * scale).astype(np.float32)
        back = (source.astype(np.float64) / scale).astype(np.float32)
    expected = [(source != 0).sum(), (sent != 0).sum(), np.isinf(sent).sum(), np.isnan(sent).sum()]
    for function, values in (
        (pack, sent),
        (lambda t: bad.extend(kernels.unpack(source, scale, [t])), back),
    ):
        values[np.isnan(values)] = 1
        for result in both(function, np.empty(source.size, np.float32)):
            np.testing.assert_array_equal(result, values.view(np.uint8))
    np.testing.assert_array_equal(counts, [np.add(expected, 7)] * 2)
    assert min(expected) > 0 and (expected[0] > expected[1]) == (scale < 1)
    assert bad == [(~np.isfinite(source)).sum()] * 2


@pytest.mark.parametrize('k', [1, 2, 5])
def test_mean_of_rows_of_floats(both, k):
    rows = ANY_FLOATS[: (k + 1) * 50_000].reshape(k + 1, -1)[1:, 1:]
    with np.errstate(all='ignore'):
        total = functools.reduce(np.add, rows.astype(np.float64))
        expected = (total / 3).astype(np.float32)
    expected[np.isnan(expected)] = 1
    for result in both(lambda t: kernels.mean(rows, 3, t), np.empty(rows.shape[1], np.float32)):
        np.testing.assert_array_equal(result, expected.view(np.uint8))

    def in_place(target):
        target[...] = rows[k // 2]
        others = np.delete(rows, k // 2, axis=0)
        kernels.mean(others, 3, target, target, k // 2)

    for result in both(in_place, np.empty(rows.shape[1], np.float32)):  # as the all-reduce does it
        np.testing.assert_array_equal(result, expected.view(np.uint8))


def test_gradients_of_any_layout(both):
    rng = np.random.RandomState(0)
    grad = rng.standard_normal((30, 1000)).astype(np.float32).T[::3]
    target = np.empty(grad.size, np.float16)
    for result in both(lambda t: kernels.pack([grad], 1, t, np.zeros((1, 4), np.int64)), target):
        expected = grad.astype(np.float16).ravel()
        np.testing.assert_array_equal(result.view(np.float16), expected)
    halves = rng.standard_normal(grad.size).astype(np.float16)
    into = np.zeros((30, 1000), np.float32).T[::3]
    for result in both(lambda t: kernels.unpack(halves, 1, [t]), into):
        np.testing.assert_array_equal(result.reshape(-1).view(np.float32), halves)


@pytest.mark.parametrize('wire', ['float16', 'float32'])
@pytest.mark.parametrize('shapes', [[(3, 50), (0,), (), (2000,), (7,)], [(5,)], []])
def test_several_gradients_lie_one_after_the_other(both, wire, shapes):
    rng = np.random.RandomState(0)
    grads = [np.asarray(rng.standard_normal(shape), np.float32) for shape in shapes]
    if len(grads) > 1:
        grads[0][0, :4] = [np.inf, np.nan, 0, 0]
        grads[-1][:3] = np.inf
    flat = np.concatenate([np.zeros(0, np.float32), *(grad.ravel() for grad in grads)])
    counts, not_finite, filled = [], [], []

    def pack(target):
        counts.append(np.zeros((len(grads), 4), np.int64))
        kernels.pack(grads, 1, target, counts[-1])

    def unpack(target, transposed=False):
        into = [np.zeros_like(grad) for grad in grads]
        if into and transposed:  # which C does not take
            into[0] = np.zeros(into[0].shape[::-1], np.float32).T
        not_finite.append(kernels.unpack(target, 1, into))
        filled.append(np.concatenate([np.zeros(0, np.float32), *(grad.ravel() for grad in into)]))

    sent = flat.astype(wire)
    sent[np.isnan(sent)] = 1
    for result in both(pack, np.empty(flat.size, wire)):
        np.testing.assert_array_equal(result, sent.view(np.uint8))
    expected = [
        [(g != 0).sum(), (g != 0).sum(), np.isinf(g).sum(), np.isnan(g).sum()] for g in grads
    ]
    np.testing.assert_array_equal(counts, np.reshape(expected * 2, (2, len(grads), 4)))
    both(unpack, flat.astype(wire))
    both(lambda target: unpack(target, transposed=True), flat.astype(wire))
    assert len(filled) == len(not_finite) == 4
    for found in filled:
        np.testing.assert_array_equal(found, flat.astype(wire))
    for found in not_finite:
        np.testing.assert_array_equal(found, [(~np.isfinite(grad)).sum() for grad in grads])


def test_sums_of_halves(both):
    start = np.random.RandomState(0).standard_normal(65536)
    np.testing.assert_array_equal(*both(lambda t: kernels.add(HALVES, t), start))


@pytest.mark.parametrize('n', [1, 2, 3, 7, 1024])
def test_means_are_rounded_once(both, n):
    """Where a float32 in between would round twice: beside the middle between two halves."""
    rng = np.random.RandomState(0)
    exact = np.sort(finite(HALVES))
    ties = (exact[:-1] + exact[1:]) / 2
    sums = n * np.concatenate(
        [exact, ties, np.nextafter(ties, 9e9), np.nextafter(ties, -9e9), ties * (1 + 1e-12)]
    )
    odd = [np.inf, -np.inf, np.nan, -0.0, 65519.9 * n, 65520 * n, 1e30, 1e300, 1e-300, -1e-45]
    wide = 10.0 ** rng.uniform(-12, 6, 100_001)
    source = np.concatenate([sums, odd, wide, -wide])
    target = np.empty(source.size, np.float16)
    np.testing.assert_array_equal(*both(lambda t: kernels.mean(source[None], n, t), target))


@pytest.mark.parametrize('dtype', [np.float16, np.float64])
@pytest.mark.parametrize('k', [1, 2, 5])
def test_mean_of_rows(both, k, dtype):
    rng = np.random.RandomState(k)
    any_bits = rng.randint(0, 2**16, (k + 2, 200_003), dtype=np.uint16).view(np.float16)
    with np.errstate(invalid='ignore'):  # of signalling NaNs
        rows = any_bits.astype(dtype)[1:-1, 1:]
    target = np.empty(rows.shape[1], np.float16)
    compiled, plain = both(lambda t: kernels.mean(rows, 3, t), target)
    np.testing.assert_array_equal(compiled, plain)
    with np.errstate(all='ignore'):
        total = functools.reduce(np.add, rows.astype(np.float64))  # np.sum makes -0 a 0
        expected = (total / 3).astype(np.float16)
    expected[np.isnan(expected)] = 1
    np.testing.assert_array_equal(compiled, expected.view(np.uint8))
    others, own = np.delete(rows, k - 1, axis=0), np.ascontiguousarray(rows[k - 1])
    for result in both(lambda t: kernels.mean(others, 3, t, own, k - 1), target):
        np.testing.assert_array_equal(result, expected.view(np.uint8))


@pytest.mark.parametrize('size', [0, 1, 7, 8, 9, 1023, 1025])
def test_nothing_beyond_the_end_is_written(size):
    target = np.full(size + 8, 7, np.float16)
    kernels.pack([np.zeros(size, np.float32)], 1, target[:size], np.zeros((1, 4), np.int64))
    np.testing.assert_array_equal(target, [0] * size + [7] * 8)
    wide = np.full(size + 8, 7, np.float32)
    kernels.unpack(np.zeros(size, np.float16), 1, [wide[:size]])
    np.testing.assert_array_equal(wide, [0] * size + [7] * 8)
    wide[:size] = 5
    kernels.pack([np.zeros(size, np.float32)], 1, wide[:size], np.zeros((1, 4), np.int64))
    np.testing.assert_array_equal(wide, [0] * size + [7] * 8)
    wide[:size] = 5
    kernels.unpack(np.zeros(size, np.float32), 1, [wide[:size]])
    np.testing.assert_array_equal(wide, [0] * size + [7] * 8)
    wide[:size] = 5
    kernels.mean(np.zeros((3, size), np.float32), 2, wide[:size])
    np.testing.assert_array_equal(wide, [0] * size + [7] * 8)
    for dtype in (np.float16, np.float64):
        target[:size] = 5
        kernels.mean(np.zeros((3, size), dtype), 2, target[:size])
        np.testing.assert_array_equal(target, [0] * size + [7] * 8)
