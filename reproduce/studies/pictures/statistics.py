"""BN statistics: moving averages and the last minibatch's, against those of the training set."""

from __future__ import annotations

import dataclasses

import extensions  # noqa: F401  isort: skip  (makes Chainer importable on NumPy 2)
import chainer
import chainer.links as L
import numpy as np

from reproduce import images
from reproduce.job.plots import plt
from reproduce.settings import Settings, smoke
from reproduce.studies.pictures import short_run
from reproduce.studies.pictures.style import BLACK, BLUE, VERMILION, WIDTH, label, styled

DATA = 'figures/statistics.json'
CAPTION = (
    'With few, large steps, moving averages lag behind the weights and ruin the '
    "validation; the last minibatch's statistics become nearly those of the training set."
)
ALT = (
    'Two columns over 20 epochs of digits, by 2 workers with a batch of 64 and by 32 with 1,024. '
    "Top, the error of BN's variances against those of the training set: with 2 workers, moving "
    'averages fall from 27 to 1 %, and the last minibatch stays at 4 to 7 %; with 32 workers, '
    'moving averages stay at 18 to 31 %, and the last minibatch falls from 16 to 3 %. Bottom, '
    'top-1: with 2 workers all reach 98 %; with 32 workers, at the end, 98 % by the statistics of '
    'the training set, 93 % by the last minibatch, and 37 % by moving averages.'
)

LINES = {
    'true': ('all training images', BLACK, '-'),
    'last': ('last minibatch', BLUE, 'o-'),
    'moving': ('moving averages', VERMILION, 's--'),
}
PLACES = (  # of the names: axis, name, epoch, height
    ((0, 0), 'moving', 3.2, 11),
    ((0, 0), 'last', 12, 7),
    ((0, 1), 'moving', 3.2, 21),
    ((0, 1), 'last', 4.6, 6.2),
    ((1, 1), 'true', 4.3, 96),
    ((1, 1), 'last', 12.6, 56),
    ((1, 1), 'moving', 10.5, 18),
)
WORKERS = (2, 32)
N_EPOCHS = 20
DECAY = 0.9  # of the moving averages; Chainer's default


def settings(workers) -> Settings:
    """Returns the settings of a training with the paper's schedules over 90 epochs of digits."""
    return dataclasses.replace(
        smoke(), workers=workers, width=8, epochs=90, loader='serial', communicator='mpi'
    )


class Comparison:
    """Compares statistics after each epoch. :func:`short_run.run` calls it after each update.

    Args:
        local_batch_size (int): Images per worker.

    Attributes:
        rows (list of dict): One per epoch: ``epoch``; and ``moving``, ``last`` and ``true``, each
            with the ``top-1`` that validation has by these statistics. The first two also have the
            errors ``mean`` and ``variance``, relative to those of the training set.
    """

    def __init__(self, local_batch_size):
        self.rows = []
        self._local_batch_size = local_batch_size
        self._sum: np.ndarray | float = 0.0

    def __call__(self, trainer, batches):
        updater = trainer.updater
        model = updater.get_optimizer('main').target
        updater.batch_statistics()  # gives the links the mean over the workers
        last = read(model)
        self._sum = DECAY * self._sum + (1 - DECAY) * last
        # As if the averages had begun with the first minibatch, not with Chainer's 0 and 1.
        moving = self._sum / (1 - DECAY**updater.iteration)
        if updater.is_new_epoch:
            self._add_row(trainer, model, batches, {'moving': moving, 'last': last})

    def _add_row(self, trainer, model, batches, found):
        updater = trainer.updater
        true = of_training_set(model, batches, self._local_batch_size, len(updater.workers))
        row = {'epoch': updater.epoch_detail, 'true': {'top-1': top1(trainer, model, true)}}
        for name, statistics in found.items():
            right = top1(trainer, model, statistics)
            row[name] = {**errors(model, statistics, true), 'top-1': right}
        self.rows.append(row)


def links_of(model) -> list:
    return [
        link for _, link in sorted(model.namedlinks()) if isinstance(link, L.BatchNormalization)
    ]


def read(model) -> np.ndarray:
    """Returns the means and the variances of all links, float64 [2, channels]."""
    links = links_of(model)
    rows = [[getattr(link, name) for link in links] for name in ('avg_mean', 'avg_var')]
    return np.array([np.concatenate(row) for row in rows], np.float64)


def of_training_set(model, batches, local_batch_size, n_workers) -> np.ndarray:
    """Returns the statistics of the training set by the model's parameters, as :func:`read`.

    The minibatches of the first epoch pass through the model, each normalized by its own
    statistics, as in the training. The variance is that of all images together, with the spread of
    the means.
    """
    minibatches = []
    for i in range(len(batches.train) // local_batch_size):
        pixels, _ = batches.train_batch(*divmod(i, n_workers))
        with chainer.no_backprop_mode():
            model(images.normalize(pixels, images.MEAN, images.STD, np))
        minibatches.append(read(model))
    mean, variance = np.mean(minibatches, axis=0)
    return np.stack([mean, variance + np.var(minibatches, axis=0)[0]])


def errors(model, found, true) -> dict:
    """Returns the errors of the means and of the variances, each as the median over the links.

    The error of a link's means is relative to its standard deviations, and that of its variances to
    its variances, as norms over its channels.
    """
    sizes = np.cumsum([link.avg_mean.size for link in links_of(model)])[:-1]
    medians = [
        np.median(
            [
                np.linalg.norm(a) / np.linalg.norm(b)
                for a, b in zip(np.split(difference, sizes), np.split(scale, sizes))
            ]
        )
        for difference, scale in zip(found - true, (np.sqrt(true[1]), true[1]))
    ]
    return dict(zip(('mean', 'variance'), medians))


def top1(trainer, model, statistics) -> float:
    """Gives the links these statistics, and returns the top-1 of the validation."""
    start = 0
    for link in links_of(model):
        stop = start + link.avg_mean.size
        link.avg_mean[...], link.avg_var[...] = statistics[:, start:stop]
        start = stop
    return trainer.get_extension('validation').evaluate()['main/accuracy']


def measure() -> dict:
    """Trains with each number of workers.

    Returns:
        dict: Number of workers to the rows of :class:`Comparison`.
    """
    result = {}
    for workers in WORKERS:
        chosen = settings(workers)
        comparison = Comparison(chosen.local_batch_size)
        n_updates = -(-N_EPOCHS * chosen.n_train_images // chosen.total_batch_size)
        short_run.run(chosen, n_updates, comparison)
        result[str(workers)] = comparison.rows
    return result


@styled
def draw(content: dict):
    """Draws the picture.

    Args:
        content (dict): Of :func:`measure`.

    Returns:
        ~matplotlib.figure.Figure: The picture.
    """
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.2), sharex=True, sharey='row')
    for column, (workers, rows) in enumerate(content.items()):
        upper, lower = axes[:, column]
        epochs = [row['epoch'] for row in rows]
        for name, (_, color, line) in LINES.items():
            if name != 'true':
                error = [100 * row[name]['variance'] for row in rows]
                upper.semilogy(epochs, error, line, color=color, ms=5, label=name)
            right = [100 * row[name]['top-1'] for row in rows]
            lower.plot(epochs, right, line, color=color, ms=5, label=name)
        chosen = settings(int(workers))
        each = chosen.n_train_images / chosen.total_batch_size
        upper.set_title(f'{workers} workers: {each:.2g} updates per epoch')
        lower.set_xlabel('epoch')
    axes[0, 0].set_ylabel('error of BN variances (%)')
    axes[1, 0].set_ylabel('validation top-1 (%)')
    axes[0, 0].set_yticks([2, 5, 10, 20], ['2', '5', '10', '20'])
    axes[0, 0].minorticks_off()
    axes[0, 0].set_xticks(range(0, 21, 4))
    axes[1, 0].set_ylim(0, 105)
    for axis, name, x, y in PLACES:
        title, color, _ = LINES[name]
        label(axes[axis], x, y, title, color)
    return figure
