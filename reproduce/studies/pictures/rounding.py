"""What float16 costs a sum of gradients: in a ring, in a tree, divided first, and exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import extensions  # isort: skip  (makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import numpy as np

from reproduce import images
from reproduce.job.plots import plt
from reproduce.settings import Settings, smoke
from reproduce.studies import precision
from reproduce.studies.pictures import short_run
from reproduce.studies.pictures.style import BLACK, BLUE, GREEN, VERMILION, WIDTH, label, styled

DATA = 'figures/rounding.json'
CAPTION = (
    "A ring's float16 error grows with the workers, to 0.4 % of the gradient with 1,024; a tree's "
    'does not, and dividing first only makes more gradients 0.'
)
ALT = (
    'Two panels by number of workers, 8, 64 and 1,024. Left, the error of the mean gradient: exact '
    'sum 0.03, 0.02, 0.02 %; tree 0.05, 0.04, 0.05 %; ring, and ring of gradients that are divided '
    'first, both 0.05, 0.1, 0.37 %. Right, the nonzero gradients that become 0: 0.1 % by the cast '
    'to float16; 0.6, 3.6 and 24 % if they are divided by the number of workers before the sum.'
)

WORKERS = (8, 64, 1024)
N_UPDATES = 45  # two epochs; before the first update, most gradients are zero
EVERY = 16  # of the 376,722 gradients, each 16th


def settings() -> Settings:
    """Returns the settings of a training on the digits that is as long as the paper's."""
    return dataclasses.replace(
        smoke(), workers=2, width=8, epochs=90, loader='serial', communicator='mpi'
    )


def by_communicator(accumulate) -> Callable:
    """Returns the mean as in a training of ours: ``exact``, or as a ``ring`` that rounds."""

    def mean(gradients):
        comm = extensions.create_communicator('mpi', accumulate=accumulate)
        model = chainer.Chain()
        with model.init_scope():
            model.W = chainer.Parameter(np.zeros(gradients.shape[1], np.float32))
        for row in gradients:
            model.W.grad = row.copy()  # mean_grad writes into it
            comm.add_grad(model)
        comm.mean_grad(model)
        return model.W.grad

    return mean


def simulated(function) -> Callable:
    """Returns the mean by a function that takes one worker's float16 gradients after the other."""

    def mean(gradients):
        adding = function(len(gradients))
        next(adding)
        for row in gradients.astype(np.float16):
            try:
                adding.send(row)
            except StopIteration as end:
                return end.value
        raise AssertionError('the function wants more workers')

    return mean


ORDERS = {
    'exact': by_communicator('exact'),
    'ring': by_communicator('ring'),
    'tree': simulated(precision.tree),
    'divide first': simulated(precision.divided_first),
}


def costs(gradients) -> dict:
    """Returns what float16 costs the mean of these gradients.

    Args:
        gradients (array): float32 [workers, elements].

    Returns:
        dict: ``errors``, each of ``ORDERS`` to || g - g_64 || / || g_64 ||, where g_64 is the mean
            in float64; ``flushed``, the shares of nonzero gradients that become 0: by the ``cast``
            to float16, and if they are ``divided`` by the number of workers then.
    """
    mean = gradients.mean(axis=0, dtype=np.float64)
    errors = {
        name: np.linalg.norm(order(gradients).astype(np.float64) - mean) / np.linalg.norm(mean)
        for name, order in ORDERS.items()
    }
    n_nonzero = np.count_nonzero(gradients)
    half = gradients.astype(np.float16)
    kept = {
        'cast': np.count_nonzero(half),
        'divided': np.count_nonzero(half / np.float16(len(gradients))),
    }
    flushed = {name: 1 - n / n_nonzero for name, n in kept.items()}
    return {'errors': errors, 'flushed': flushed}


def measure() -> dict:
    """Trains for some updates, and then takes the gradients of many workers.

    Returns:
        dict: Number of workers to the result of :func:`costs`.
    """
    result = {}

    def watch(trainer, batches):
        if trainer.updater.iteration == N_UPDATES:
            model = trainer.updater.get_optimizer('main').target
            found = gradients_of(model, batches, max(WORKERS))
            result.update({str(n): costs(found[:n]) for n in WORKERS})

    short_run.run(settings(), N_UPDATES, watch)
    return result


def gradients_of(model, batches, n) -> np.ndarray:
    """Returns some gradients of n workers, float32 [n, elements]. Each has its own minibatch."""
    rows = []
    for worker in range(n):
        pixels, t = batches.train_batch(N_UPDATES + worker // 2, worker % 2)
        model.cleargrads()
        x = images.normalize(pixels, images.MEAN, images.STD, np)
        F.softmax_cross_entropy(model(x), t).backward()
        flat = [param.grad.ravel() for _, param in sorted(model.namedparams())]
        rows.append(np.concatenate(flat)[::EVERY])
    return np.array(rows)


@styled
def draw(content: dict):
    """Draws the picture.

    Args:
        content (dict): Of :func:`measure`.

    Returns:
        ~matplotlib.figure.Figure: The picture.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 4.6))
    workers = [int(n) for n in content]
    for name, color, line in (
        ('ring', BLACK, 'o-'),
        ('divide first', VERMILION, 's:'),
        ('tree', BLUE, '^--'),
        ('exact', GREEN, 'D-.'),
    ):
        errors = [100 * found['errors'][name] for found in content.values()]
        left.loglog(workers, errors, line, color=color, label=name)
    for name, color, line in (('divided', VERMILION, 's:'), ('cast', BLACK, 'o-')):
        flushed = [100 * found['flushed'][name] for found in content.values()]
        right.loglog(workers, flushed, line, color=color, label=name)
    label(left, 55, 0.14, 'ring', BLACK, 'right')
    label(left, 95, 0.092, 'divided first,\nthen a ring', VERMILION, va='top')
    label(left, 620, 0.056, 'tree', BLUE)
    label(left, 20, 0.0185, 'exact sum', GREEN, va='center')
    label(right, 60, 6, 'divided first', VERMILION, 'right')
    label(right, 60, 0.17, 'cast to float16 alone', BLACK)
    left.set_title('Error of the mean gradient (%)')
    left.set_ylim(0.015, 0.5)
    left.set_yticks([0.02, 0.05, 0.1, 0.2, 0.4], ['0.02', '0.05', '0.1', '0.2', '0.4'])
    right.set_title('Gradients that become 0 (%)')
    right.set_yticks([0.1, 1, 10], ['0.1', '1', '10'])
    for axis in (left, right):
        axis.set_xlabel('workers')
        axis.set_xticks(workers, [f'{n:,}' for n in workers])
        axis.minorticks_off()
    return figure
