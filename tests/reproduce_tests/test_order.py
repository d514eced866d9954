import numpy as np
import pytest

from reproduce.order import ImageOrder


def test_known_sequence():
    """Two epochs of five images with batches of 2 x 2: NumPy's frozen stream, written down once."""
    order = ImageOrder(5, 2, 2, seed=3)
    first = np.random.RandomState([3, 0]).permutation(5)
    assert first.tolist() == [1, 4, 2, 0, 3]  # a NumPy that draws otherwise would change every run
    second = np.random.RandomState([3, 1]).permutation(5)
    stream = [*first, *second]
    seen = [order(i, w) for i in range(2) for w in range(2)]
    assert [i for _, indices in seen for i in indices] == stream[:8]
    assert [e for epochs, _ in seen for e in epochs] == [0] * 5 + [1] * 3


def test_imagenet_on_1024_workers_sees_each_image_once_an_epoch():
    n_images, n_workers, b = 1_281_167, 1024, 32
    order = ImageOrder(n_images, n_workers, b, seed=0)
    counts = np.zeros((3, n_images), np.int64)
    for iteration in range(2 * n_images // (n_workers * b) + 1):
        for worker in range(n_workers):
            epochs, indices = order(iteration, worker)
            assert len(indices) == b
            np.add.at(counts, (epochs, indices), 1)
    assert counts.max() == 1
    np.testing.assert_array_equal(counts[:2], 1)
    assert 0 < counts[2].sum() < n_workers * b


def test_epochs_and_seeds_are_different_permutations():
    orders = [ImageOrder(1000, 10, 100, seed)(epoch, 0)[1] for seed in (0, 1) for epoch in (0, 1)]
    for i in range(4):
        for j in range(i):
            assert np.mean(orders[i] == orders[j]) < 0.1


def test_random_access_and_grouping_do_not_matter():
    many, few = ImageOrder(100, 8, 4, seed=1), ImageOrder(100, 2, 16, seed=1)
    jumped = few(50, 1)[1]
    replayed = np.concatenate([many(50, w)[1] for w in range(4, 8)])
    np.testing.assert_array_equal(jumped, replayed)


def test_one_permutation_an_epoch(monkeypatch):
    made = []
    original = np.random.RandomState
    monkeypatch.setattr(np.random, 'RandomState', lambda key: made.append(key[1]) or original(key))
    order = ImageOrder(93, 4, 5, seed=0)
    for iteration in range(12):
        for worker in (1, 3, 0, 2):  # over the border of an epoch and back
            order(iteration, worker)
    assert made == [0, 1, 2]


def test_batch_larger_than_the_data():
    with pytest.raises(ValueError, match='33 .* 32'):
        ImageOrder(32, 11, 3, seed=0)
