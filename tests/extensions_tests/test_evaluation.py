import chainer
import numpy as np
import pytest
from chainer import functions as F
from mpi4py import MPI

from extensions import ExactEvaluator, create_communicator
from extensions.evaluation import shard


@pytest.fixture
def comm():
    return create_communicator('mpi')


def evaluator_of(logits, labels, comm, batch=4, n_images=None):
    table = np.asarray(logits, np.float32)

    def batches(start, stop):
        for i in range(start, stop, batch):
            indices = np.arange(i, min(i + batch, stop))
            yield indices, np.asarray(labels, np.int32)[indices]

    def predictor(indices):
        assert not chainer.config.train and not chainer.config.enable_backprop
        return chainer.Variable(table[indices])

    return ExactEvaluator(batches, predictor, comm, n_images or len(labels), batch)


def test_equal_to_a_plain_loop(comm):
    rng = np.random.RandomState(0)
    logits, labels = rng.standard_normal((37, 9)), rng.randint(9, size=37)
    result = evaluator_of(logits, labels, comm).evaluate()
    logits = logits.astype(np.float32)
    each = F.softmax_cross_entropy(logits, labels.astype(np.int32), reduce='no').array
    assert result['main/loss'] == each.astype(np.float64).sum() / 37  # added up in float64
    logits = logits.astype(np.float64)
    top1 = sum(row.argmax() == t for row, t in zip(logits, labels))
    top5 = sum(t in np.argsort(-row)[:5] for row, t in zip(logits, labels))
    losses = [np.log(np.exp(row).sum()) - row[t] for row, t in zip(logits, labels)]
    assert result['images'] == 37
    assert result['main/accuracy'] == top1 / 37
    assert result['main/top5_accuracy'] == top5 / 37
    assert result['main/loss'] == pytest.approx(np.mean(losses), rel=1e-6)


def test_of_equal_logits_the_first_class_wins_as_in_argmax(comm):
    result = evaluator_of(np.zeros((3, 8)), [0, 4, 5], comm).evaluate()
    assert result['main/accuracy'] == pytest.approx(1 / 3)
    assert result['main/top5_accuracy'] == pytest.approx(2 / 3)


def test_nan_is_never_correct(comm):
    result = evaluator_of(np.full((4, 8), np.nan), [0, 1, 2, 3], comm).evaluate()
    assert result['main/accuracy'] == result['main/top5_accuracy'] == 0


def test_fewer_than_five_classes(comm):
    assert evaluator_of(np.eye(3), [1, 2, 0], comm).evaluate()['main/top5_accuracy'] == 1


def test_missing_images_are_noticed(comm):
    evaluator = evaluator_of(np.zeros((6, 3)), [0] * 6, comm, n_images=6)
    evaluator._batches = lambda start, stop: [(np.arange(4), np.zeros(4, np.int32))]
    with pytest.raises(RuntimeError, match='evaluated 4 images of its 6'):
        evaluator.evaluate()


@pytest.mark.parametrize('n_images, size', [(50_000, 1024), (360, 7), (3, 5), (65, 2), (0, 2)])
def test_shards_of_whole_minibatches(n_images, size):
    shards = [shard(rank, size, n_images, 64) for rank in range(size)]
    assert [i for start, stop in shards for i in range(start, stop)] == list(range(n_images))
    assert all(start % 64 == 0 or start == n_images for start, _ in shards)
    batches = [-(-(stop - start) // 64) for start, stop in shards]
    assert max(batches) - min(batches) <= 1


@pytest.mark.parametrize('n_images, size', [(50_000, 1024), (360, 7), (3, 5), (0, 2)])
def test_shards_are_each_image_once(n_images, size):
    shards = [shard(rank, size, n_images) for rank in range(size)]
    seen = [i for start, stop in shards for i in range(start, stop)]
    assert seen == list(range(n_images))
    lengths = [stop - start for start, stop in shards]
    assert max(lengths) - min(lengths) <= 1


class Rank:
    """One of many, in turn: what it would send is added up, and what it gets is of no interest."""

    def __init__(self, rank, size, sent):
        self.rank, self.size, self.mpi_comm, self._sent = rank, size, self, sent

    def Allreduce(self, _, values, op):
        if op is MPI.MAX:  # has a rank failed?
            assert values[0] == 0
            return
        assert op is MPI.SUM
        self._sent.setdefault(values.dtype.kind, []).append(values.copy())
        values[0] = max(values[0], 1)


@pytest.mark.parametrize('batch', [32, 64])
def test_50_000_images_on_1024_ranks_are_each_counted_once(comm, batch):
    """All ranks, one after the other; the counts are a plain loop's."""
    n, size = 50_000, 1024
    rng = np.random.RandomState(0)
    logits, labels = rng.randint(0, 50, (n, 10)).astype(np.float32), rng.randint(10, size=n)
    sent: dict = {}
    for rank in range(size):
        evaluator_of(logits, labels, Rank(rank, size, sent), batch).evaluate()
    counts = np.sum(sent['i'], axis=0)
    # The first of equal logits wins: a stable sort puts it first.
    order = np.argsort(-logits, axis=1, kind='stable')
    top1 = sum(int(row[0]) == t for row, t in zip(order, labels))
    top5 = sum(t in row[:5] for row, t in zip(order, labels))
    assert counts.tolist() == [n, top1, top5]
    losses = np.sum(sent['f'], axis=0)
    assert len(losses) == -(-n // batch) and losses.min() > 0  # each minibatch's in its place
    plain = np.log(np.exp(logits.astype(np.float64)).sum(axis=1)) - logits[np.arange(n), labels]
    assert losses.sum() == pytest.approx(plain.sum(), rel=1e-5)
    serial = evaluator_of(logits, labels, comm, batch).evaluate()
    assert (serial['images'], serial['main/accuracy']) == (n, top1 / n)
    assert losses.sum() / n == serial['main/loss']  # bit by bit


def test_an_image_without_a_label_is_not_counted(comm):
    rng = np.random.RandomState(0)
    logits, labels = rng.standard_normal((10, 9)), rng.randint(9, size=10)
    logits[[3, 9], -1] = 9  # what -1 would mean as an index is not right, either
    without = np.delete(logits, [3, 9], axis=0), np.delete(labels, [3, 9])
    expected = evaluator_of(*without, comm, batch=1).evaluate()
    labels[[3, 9]] = -1
    result = evaluator_of(logits, labels, comm, batch=1).evaluate()
    assert result.pop('main/loss') == pytest.approx(expected.pop('main/loss'), rel=1e-12)
    assert result == expected and result['images'] == 8
    with pytest.raises(RuntimeError, match='no validation image can be counted'):
        evaluator_of(logits, np.full(10, -1), comm).evaluate()


def test_minibatches_as_lists_with_chainers_converter(comm):
    rng = np.random.RandomState(0)
    logits, labels = rng.standard_normal((10, 9)).astype(np.float32), rng.randint(9, size=10)

    def batches(start, stop):
        for i in range(start, stop, 4):
            yield [(logits[j], labels[j]) for j in range(i, min(i + 4, stop))]

    result = ExactEvaluator(
        batches, lambda x: x, comm, 10, 4, chainer.dataset.concat_examples
    ).evaluate()
    assert result == evaluator_of(logits, labels, comm).evaluate()


@pytest.mark.parametrize('label', [-2, 3, np.iinfo(np.int32).min])
def test_a_label_that_is_no_class_is_named(comm, label):
    evaluator = evaluator_of(np.zeros((6, 3)), [0, 1, label, 2, 0, 1], comm)
    with pytest.raises(ValueError, match=f'label {label}: the predictor has the classes 0 to 2'):
        evaluator.evaluate()
    assert evaluator.minibatches_left is None
    evaluator = evaluator_of(np.zeros((6, 3)), [0] * 6, comm)
    evaluator._converter = lambda batch: (batch[0], batch[1].astype(np.float32))
    with pytest.raises(TypeError, match='labels must be signed integers, not float32'):
        evaluator.evaluate()
    with pytest.raises(ValueError, match='batch_size must be 1 or more.* not 0 and 6'):
        evaluator_of(np.zeros((6, 3)), [0] * 6, comm, batch=0)


def test_progress_sees_every_minibatch(comm):
    evaluator = evaluator_of(np.zeros((10, 3)), [0] * 10, comm)
    left = []
    evaluator.after_minibatch = lambda: left.append(evaluator.minibatches_left)
    evaluator.evaluate()
    assert left == [3, 2, 1, 0] and evaluator.minibatches_left is None
