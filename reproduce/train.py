"""Trains ResNet-50 as in Akiba, Suzuki, Fukuda: Extremely Large Minibatch SGD (arXiv:1711.04325).

The paper's run, 1,024 workers with 32 images each:
    mpiexec -n 1024 python reproduce/train.py --train-root TRAIN --val-root VAL
The plan of that run, without running it:
    python reproduce/train.py --dry-run
A run on two CPU cores, with the images that the project includes:
    mpiexec -n 2 python reproduce/train.py --preset smoke
The validation of the model that this run has left:
    mpiexec -n 2 python reproduce/train.py --preset smoke --evaluate results/smoke/model.npz

experiment() is the paper in code. settings.py holds its numbers.
"""

import sys
from pathlib import Path

if __name__ == '__main__':  # first on the path: others may have packages of these names, too
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reproduce.job import start

if __name__ == '__main__':
    start.before_mpi()

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
from mpi4py import MPI

from extensions.virtual_workers import workers_of
from reproduce import images
from reproduce.job import evaluation, ranks, supervise
from reproduce.loader import ImageLoader
from reproduce.order import ImageOrder
from reproduce.resnet50 import ResNet50


def experiment(settings, comm, train, val):
    """Builds the paper's training, but does not start it.

    Args:
        settings (Settings): The numbers of the experiment.
        comm (~chainermn.CommunicatorBase): The processes. Together they play ``settings.workers``
            workers. The communicator all-reduces gradients in half precision
            (extensions/half_precision.py).
        train (ImageFolder): Training images.
        val (ImageFolder): Validation images.

    Returns:
        tuple: The trainer (~chainer.training.Trainer), and the ImageLoader that feeds the trainer
            and is a context manager.
    """
    # Data: every epoch is a new permutation. In each iteration, each worker gets its own 32 images.
    order = ImageOrder(len(train), settings.workers, settings.local_batch_size, settings.seed)
    batches = ImageLoader(
        train,
        val,
        order,
        settings.preprocessing,
        settings.seed,
        workers_of(comm.rank, comm.size, settings.workers),
        settings.loader,
        settings.validation_batch_size,
        settings.bad_images,
    )

    # Model: every rank starts from rank 0's initial values. The broadcast costs no minibatch.
    device = extensions.device_of(comm)
    converter = images.converter_to(device)
    model = ResNet50(
        len(train.classes), settings.width, settings.stem, settings.seed, settings.shallow
    )
    model.to_device(device)
    comm.bcast_data(model)

    # Optimizer: RMSprop warm-up. Weight decay is added once, after the all-reduce.
    optimizer = extensions.RMSpropWarmup(
        settings.lr_base, mu1=settings.mu1, mu2=settings.mu2, eps=settings.eps
    ).setup(model)
    for param in decayed_parameters(model):
        param.update_rule.hyperparam.weight_decay_rate = settings.weight_decay

    # Batch normalization without moving averages: every link has decay=0 (resnet50.py). Before each
    # validation, the last minibatch's statistics are averaged over all workers.
    if settings.bn_decay:
        batch_statistics = extensions.MovingBatchStatistics(model, comm, settings.bn_decay)
    else:
        batch_statistics = extensions.AllreduceBatchStatistics(
            model, comm, settings.pooled_variance
        )

    # An iteration: read VirtualWorkersUpdater.update (extensions/virtual_workers.py). For each
    # worker, it runs forward and backward, and casts the gradients to float16 (comm.add_grad). Then
    # one all-reduce (comm.mean_grad) and one update (rmsprop_warmup_element.h) serve all workers.
    updater = extensions.VirtualWorkersUpdater(
        batches.train_batch,
        optimizer,
        lambda x, t: F.softmax_cross_entropy(model(x), t),
        comm,
        settings.workers,
        epoch_size=(settings.total_batch_size, len(train)),
        converter=converter,
        batch_statistics=batch_statistics,
    )
    length = (settings.iterations(len(train)), 'iteration')
    trainer = chainer.training.Trainer(updater, length, settings.out)

    # Schedules (schedules.py): the slow-start learning rate, which begins at half of eta_base, and
    # the transition from RMSprop to SGD.
    epoch_size = (settings.total_batch_size, len(train), settings.epochs)
    trainer.extend(
        extensions.StepLearningRate(*epoch_size, schedule=lambda epoch, _: settings.lr(epoch))
    )
    if settings.alpha_form != 'sgd':
        trainer.extend(
            extensions.AlphaSGDSchedule(
                *epoch_size,
                beta_center=settings.beta_center,
                beta_period=settings.beta_period,
                form=settings.alpha_form,
                lr_rmsprop=settings.lr_rmsprop,
            )
        )

    # Validation: every image counts once, after every epoch.
    trainer.extend(batch_statistics)
    trainer.extend(
        extensions.ExactEvaluator(
            batches.validation_batches,
            model,
            comm,
            len(val),
            settings.validation_batch_size,
            converter=converter,
        )
    )
    trainer.extend(extensions.MeanTrainingLoss(comm))
    return trainer, batches


def decayed_parameters(model):
    """Returns all parameters except gamma and beta of batch normalization (G)."""
    exempt = {
        id(param)
        for link in model.links()
        if isinstance(link, chainer.links.BatchNormalization)
        for param in link.params()
    }
    return [param for param in model.params() if id(param) not in exempt]


def main(argv=None):
    """Runs the experiment on all ranks. Returns its trainer; None if nothing was to be trained."""
    argv = sys.argv[1:] if argv is None else argv
    mpi = MPI.COMM_WORLD
    with supervise.watch(mpi, argv) as watchdog:
        settings = supervise.read_settings(mpi, watchdog, argv, __doc__)
        if settings is None:
            return None
        comm = supervise.create_communicator(mpi, watchdog, settings)
        settings = supervise.choose_functions(mpi, watchdog, settings, comm)
        if settings.evaluate is not None:
            return evaluation.run(mpi, watchdog, comm, settings, argv)
        folders = supervise.find_images(mpi, watchdog, settings)
        trainer, batches = experiment(settings, comm, *folders)
        supervise.run(mpi, watchdog, comm, settings, argv, trainer, batches)
    return trainer


if __name__ == '__main__':
    ranks.run(main)
