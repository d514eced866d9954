"""Numbers that the MPI programs and the oracles in the tests both know."""

import extensions  # noqa: F401  isort: skip  (it makes Chainer importable on NumPy 2)
import chainer
import numpy as np


def gradients(worker):
    """A worker's gradients: odd sizes, no element, no dimension, float16's subnormals, negative
    zero, near overflow."""
    rng = np.random.RandomState(worker + 1)
    scale = 10.0 ** rng.uniform(-8, 2, size=1001)
    return {
        '/conv': (rng.standard_normal(1001) * scale).astype(np.float32).reshape(7, 11, 13),
        '/empty': np.zeros((0, 3), np.float32),
        '/scalar': np.array(rng.standard_normal(), np.float32),
        '/edge': np.array([65504, -65504, 65519, -0.0, 6e-8, 2.9e-8, worker * 1e-7], np.float32),
        '/missing': None,
    }


def whole_numbers(rank, name, shape, dtype=np.float32):
    """A rank's gradients or parameters; float16 holds them, their sums and their halves exactly."""
    rng = np.random.RandomState([rank, *map(ord, name)])
    return np.asarray(rng.randint(-99, 99, shape) * 2, dtype)


def shuffled(n, seed):
    """The numbers below n, in order for seed 0."""
    return list(np.random.RandomState(seed).permutation(n)) if seed else list(range(n))


def model_of(arrays):
    model = chainer.Link()
    with model.init_scope():
        for name, array in arrays.items():
            data = np.zeros(3 if array is None else array.shape, np.float32)
            setattr(model, name[1:], chainer.Parameter(data))
    model.cleargrads()
    return model


BATCH, IMAGES, VALIDATION = 4, 72, 17


class Network(chainer.Chain):
    def __init__(self, seed):
        super().__init__()
        normal = chainer.initializers.Normal(0.3, rng=np.random.RandomState(seed))
        with self.init_scope():
            self.fc1 = chainer.links.Linear(5, 8, nobias=True, initialW=normal)
            self.bn = chainer.links.BatchNormalization(8, decay=0)
            self.fc2 = chainer.links.Linear(8, 7, initialW=normal)

    def forward(self, x):
        return self.fc2(chainer.functions.relu(self.bn(self.fc1(x))))


class DigitsNetwork(chainer.Chain):
    def __init__(self, seed):
        super().__init__()
        normal = chainer.initializers.LeCunNormal(rng=np.random.RandomState(seed))
        with self.init_scope():
            self.fc1 = chainer.links.Linear(64, 48, nobias=True, initialW=normal)
            self.bn = chainer.links.BatchNormalization(48, decay=0)
            self.fc2 = chainer.links.Linear(48, 10, initialW=normal)

    def forward(self, x):
        return self.fc2(chainer.functions.relu(self.bn(self.fc1(x))))


def minibatch(iteration, worker):
    """Every worker's images have a mean of their own."""
    rng = np.random.RandomState([iteration, worker])
    x = rng.standard_normal((BATCH, 5)) + worker
    return x.astype(np.float32), rng.randint(7, size=BATCH).astype(np.int32)


def validation_set():
    rng = np.random.RandomState(99)
    x = rng.standard_normal((VALIDATION, 5)) + 2
    return x.astype(np.float32), rng.randint(7, size=VALIDATION).astype(np.int32)


def images_of(rank, step, channels):
    """Images [4, channels, 2, 3] whose mean and spread are the rank's own."""
    rng = np.random.RandomState([rank, step, channels])
    return (rng.standard_normal((4, channels, 2, 3)) * (1 + rank) + 3 * rank).astype(np.float32)
