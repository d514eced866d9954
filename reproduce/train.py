"""Trains ResNet-50 as in Akiba, Suzuki, Fukuda: Extremely Large Minibatch SGD (arXiv:1711.04325).

The paper's run, 1,024 workers with 32 images each:
    mpiexec -n 1024 python reproduce/train.py --train-root TRAIN --val-root VAL
What it would do, without doing it:
    python reproduce/train.py --dry-run
The same on two CPU cores, with images that come along:
    mpiexec -n 2 python reproduce/train.py --preset smoke

Read from main() on: it tells the experiment in the paper's order.
"""

from reproduce import loader

# Before anything imports MPI: a process that is forked off afterwards can crash or hang on
# InfiniBand.
loader.start_forkserver()

from reproduce import abort

if __name__ == '__main__':
    abort.on_uncaught_exception()  # before the imports below, which can fail on one host alone

import os
import sys
from pathlib import Path

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
from chainer.training import extensions as chainer_extensions
from mpi4py import MPI

from extensions.virtual_workers import workers_of
from reproduce import agreement, digits, images, job, leftovers, listing, output, report
from reproduce.order import ImageOrder
from reproduce.resnet50 import ResNet50
from reproduce.settings import InputError, parse
from reproduce.watchdog import Watchdog


def main(argv=None):
    mpi = MPI.COMM_WORLD
    leftovers.remove_those_of_open_mpi()
    arguments = sys.argv[1:] if argv is None else argv
    settings, dry_run = job.on_rank_zero(mpi, lambda: parse(arguments, mpi.size, __doc__))
    if dry_run:
        job.on_rank_zero(mpi, lambda: print_plan(settings))
        return None

    # Half-precision all-reduce: gradients are float16 on the wire, float32 everywhere else.
    comm = job.on_every_rank(mpi, lambda: communicator_of(settings, mpi))

    # Data: rank 0 lists it and tells the others.
    train, val = job.on_rank_zero(mpi, lambda: prepare_data(settings, comm.size))
    train, val = listing.ImageFolder.unpack(train), listing.ImageFolder.unpack(val)
    identity = {**settings.identity, 'training images': train.digest(), 'validation': val.digest()}
    checkpoint = job.on_rank_zero(mpi, lambda: output.find_checkpoint(settings, identity))
    n_images = len(train)
    order = ImageOrder(n_images, settings.workers, settings.local_batch_size, settings.seed)
    workers = workers_of(comm.rank, comm.size, settings.workers)
    batches = loader.ImageLoader(
        train,
        val,
        order,
        settings.preprocessing,
        settings.seed,
        workers,
        settings.loader,
        settings.validation_batch_size,
        settings.bad_images,
    )

    # Model: every rank starts from rank 0's initial values; no minibatch is spent on the broadcast.
    device = extensions.device_of(comm)
    model = ResNet50(len(train.classes), settings.width, settings.stem, settings.seed)
    model.to_device(device)
    comm.bcast_data(model)

    # Optimizer: RMSprop warm-up. Weight decay is added once, after the all-reduce.
    optimizer = extensions.RMSpropWarmup(
        settings.lr_base, mu1=settings.mu1, mu2=settings.mu2, eps=settings.eps
    ).setup(model)
    for param in decayed_parameters(model):
        param.update_rule.hyperparam.weight_decay_rate = settings.weight_decay

    # Batch normalization without moving averages: the last minibatch's statistics, averaged before
    # each validation.
    batch_statistics = statistics_of(settings, model, comm)

    def to_device(batch):
        x, t = (device.send(array) for array in batch)
        return images.normalize(x, images.MEAN, images.STD, device.xp), t

    updater = extensions.VirtualWorkersUpdater(
        batches.train_batch,
        optimizer,
        lambda x, t: F.softmax_cross_entropy(model(x), t),
        comm,
        settings.workers,
        epoch_size=(settings.total_batch_size, n_images),
        converter=to_device,
        batch_statistics=batch_statistics,
    )
    n_iterations = settings.iterations(n_images)
    trainer = chainer.training.Trainer(updater, (n_iterations, 'iteration'), settings.out)

    # The schedules: slow-start learning rate, and the transition from RMSprop to SGD.
    epoch_size = (settings.total_batch_size, n_images, settings.epochs)
    trainer.extend(extensions.StepLearningRate(*epoch_size, schedule=settings.lr_schedule))
    trainer.extend(
        extensions.AlphaSGDSchedule(
            *epoch_size,
            beta_center=settings.beta_center,
            beta_period=settings.beta_period,
            form=settings.alpha_form,
            lr_rmsprop=settings.lr_rmsprop,
        )
    )

    # Validation after every epoch, of each image once.
    trainer.extend(batch_statistics)
    evaluator = extensions.ExactEvaluator(
        batches.validation_batches,
        model,
        comm,
        len(val),
        settings.validation_batch_size,
        converter=to_device,
    )
    trainer.extend(evaluator)
    trainer.extend(extensions.MeanTrainingLoss(comm))
    if hasattr(comm, 'cast_counts'):
        trainer.extend(extensions.CastReport(comm))
    time_report = extensions.TimeReport(comm, evaluator)
    trainer.extend(time_report)
    log_report = chainer_extensions.LogReport(postprocess=last_hyperparameters(optimizer))
    if comm.rank == 0:
        print(report.header(settings, comm, train, val, model.count_params()), flush=True)
        report.write_settings(settings, settings.out)
        trainer.extend(log_report)
        trainer.extend(report.Progress(settings.total_batch_size, n_iterations, evaluator))
        trainer.extend(report.EpochTable(log_report))
        trainer.extend(report.Curves(settings, log_report))

    # Checkpoints: whatever ends the run, it goes on from the last one to the same bits.
    trainer.extend(
        extensions.Checkpointer(
            comm,
            output.checkpoints_of(settings.out),
            identity,
            settings.checkpoint_every,
            settings.keep_checkpoints,
        )
    )
    if checkpoint:
        extensions.checkpoint.resume(trainer, checkpoint)

    # Before the first iteration: the same program and the same numbers on all ranks.
    sample = agreement.sample(train, val)
    own = agreement.items(model, settings, arguments, sample)
    job.on_every_rank(mpi, lambda: agreement.check(mpi, own, sample))
    with Watchdog(mpi, settings.watchdog, report.position_of(updater, evaluator)):
        with batches:
            trainer.run(show_loop_exception_msg=False)
        peak_memory, bad_images = report.peak_memory(comm), report.bad_images(comm, batches)
        if comm.rank == 0:
            chainer.serializers.save_npz(os.path.join(settings.out, 'model.npz'), model)
            timing = time_report.summary()
            summary = report.summarize(
                settings, comm, trainer, log_report.log, peak_memory, bad_images, timing
            )
            print(
                f'{report.parts(timing)}\n'
                f'top-1 {summary["top1"]:.2%}; at most {peak_memory / 2**20:,.0f} MiB a process; '
                + (f'{len(bad_images):,} bad images skipped; ' if bad_images else '')
                + f'results in {settings.out}',
                flush=True,
            )
    return trainer


def communicator_of(settings, mpi):
    """The communicator that the settings ask for."""
    return extensions.create_communicator(
        settings.communicator,
        settings.allreduce_grad_dtype,
        mpi,
        accumulate=settings.accumulate,
        gradient_scale=settings.gradient_scale,
        stop_on_nonfinite=settings.stop_on_nonfinite,
    )


def statistics_of(settings, model, comm):
    """The paper's batch statistics, or the moving averages that it does without."""
    if settings.bn_decay:
        return extensions.MovingBatchStatistics(model, comm, settings.bn_decay)
    return extensions.AllreduceBatchStatistics(model, comm, settings.pooled_variance)


def decayed_parameters(model):
    """All parameters but gamma and beta of batch normalization (G)."""
    exempt = {
        id(param)
        for link in model.links()
        if isinstance(link, chainer.links.BatchNormalization)
        for param in link.params()
    }
    return [param for param in model.params() if id(param) not in exempt]


def last_hyperparameters(optimizer):
    """The log's entries would be means over an epoch: here they are what the last update used."""

    def postprocess(entry):
        for name in ('lr', 'alpha_sgd', 'alpha_rmsprop'):
            entry[name] = getattr(optimizer, name)

    return postprocess


def roots(settings):
    """The folders of training and validation images; None where nothing was said."""
    if (settings.train_root is None) != (settings.val_root is None):
        raise InputError('--train-root and --val-root go together: one of them is missing')
    if settings.train_root is None and settings.preset == 'paper' and 'IMAGENET_ROOT' in os.environ:
        root = Path(os.environ['IMAGENET_ROOT'])
        return str(root / 'train'), str(root / 'val')
    return settings.train_root, settings.val_root


def print_plan(settings):
    n_images = count_images(settings)
    check_total_batch(settings, n_images)
    print(report.plan(settings, n_images))


def count_images(settings) -> int:
    """Training images, counted where there is a folder."""
    train_root, _ = roots(settings)
    if not train_root:
        return settings.n_train_images
    return len(listing.listing_of(train_root, settings.manifests_folder))


def prepare_data(settings, n_processes):
    """Checks the settings against the data, makes the output folder, and lists the images; writes
    nothing before all else fits.

    Returns:
        tuple: The packed listings of training and validation images.

    Raises:
        InputError, ~reproduce.listing.DataError: What does not fit, and how to mend it.
    """
    try:
        workers_of(0, n_processes, settings.workers)
    except ValueError as error:
        raise InputError(f'--workers: {error}') from error
    train_root, _ = roots(settings)
    ships_data = settings.preset == 'smoke' and train_root is None
    if train_root is None and not ships_data:
        raise InputError(
            'no images: give --train-root and --val-root, or set IMAGENET_ROOT to a folder with '
            'train and val in it; "./run_mpi.sh smoke" runs without any'
        )
    if ships_data:
        check_total_batch(settings, len(digits.split()[0]))
    else:
        train, val = list_folders(settings)
        check_total_batch(settings, len(train))
    output.prepare(settings)
    if ships_data:
        root = Path(settings.out) / 'digits'
        digits.write_image_folder(root)
        train, val = listing.list_images(root / 'train'), listing.list_images(root / 'val')
    else:
        for folder in (train, val):
            listing.keep(folder, settings.manifests_folder)
    return train.pack(), val.pack()


def list_folders(settings):
    """The listings of the folders of training and validation images, from their manifests where
    these are up to date."""
    train, val = (listing.listing_of(root, settings.manifests_folder) for root in roots(settings))
    listing.check_same_classes(train, val)
    return train, val


def check_total_batch(settings, n_images):
    if settings.total_batch_size > n_images:
        raise InputError(
            f'the total batch of {settings.workers} workers x {settings.local_batch_size} images = '
            f'{settings.total_batch_size} is larger than the training set of {n_images} images: '
            'choose fewer --workers or a smaller --local-batch-size'
        )


if __name__ == '__main__':
    job.run(main)
