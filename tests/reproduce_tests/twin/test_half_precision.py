"""The communication hooks of the twin, on two real processes of gloo."""

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
from extensions import kernels
from reproduce.twin.virtual_workers import rounded_once

PROGRAM = Path(__file__).parent / 'programs' / 'hooks.py'


@pytest.fixture(scope='module')
def gradients():
    """Of two workers: from those that float16 cannot hold up to large ones. No two are equal."""
    rng = np.random.RandomState(0)
    scale = 10 ** rng.uniform(-9, 4.8, (2, 500_000))
    return (scale * rng.choice([-1, 1], len(scale[0]))).astype(np.float32)


@pytest.mark.slow
def test_each_hook_rounds_where_it_says(gradients, torchrun, tmp_path):
    np.savez(tmp_path / 'gradients.npz', gradients=gradients)
    done = torchrun(2, PROGRAM, tmp_path / 'gradients.npz', tmp_path / 'of')
    assert done.returncode == 0, done.stdout
    found, other = (dict(np.load(tmp_path / f'of{rank}.npz')) for rank in range(2))
    for name, values in found.items():
        assert np.array_equal(values, other[name]), name
    sent = gradients.astype(np.float16)
    half = np.float16(2)
    total = sent.astype(np.float64).sum(axis=0)
    expected = {
        'exact_sum-float16': (total / 2).astype(np.float16),
        'cast_sum_divide-float16': (sent[0] + sent[1]) / half,
        'divide_first-float16': sent[0] / half + sent[1] / half,
        'exact_sum-float32': (gradients.astype(np.float64).sum(axis=0) / 2).astype(np.float32),
        'cast_sum_divide-float32': (gradients[0] + gradients[1]) / np.float32(2),
        'divide_first-float32': gradients[0] / np.float32(2) + gradients[1] / np.float32(2),
    }
    for name, values in expected.items():
        assert np.array_equal(found[name], values.astype(np.float32)), name
    assert np.array_equal(found['torch'], found['divide_first-float16'])
    # The exact mean is that of the communicator for CPUs, bit by bit.
    mean = np.empty(total.size, np.float16)
    kernels.mean(sent, 2, mean)
    assert np.array_equal(found['exact_sum-float16'], mean.astype(np.float32))
    # Each gradient is 2**-24: the mean is, too, unless it is divided before the sum.
    both = (sent == np.float16(2**-24)).all(axis=0)
    assert both.any() and (found['exact_sum-float16'][both] == np.float32(2**-24)).all()
    assert (found['divide_first-float16'][both] == 0).all()
    names = [name for name in expected if name.endswith('16')]
    assert all(
        not np.array_equal(found[one], found[two])
        for i, one in enumerate(names)
        for two in names[i + 1 :]
    )


def test_float64_is_rounded_to_float16_once():
    """Above the middle between two float16, by less than a float32 can tell."""
    x = torch.tensor([1 + 2**-11 + 2**-40, 1e6, 2**-25 + 2**-60], dtype=torch.float64)
    assert rounded_once(x, torch.float16).tolist() == [1 + 2**-10, float('inf'), 2**-24]
    assert x.half().tolist()[0] == 1  # PyTorch's own way rounds twice
