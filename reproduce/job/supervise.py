"""Runs a training as a job, which reports, saves its results, and never waits for ever."""

from __future__ import annotations

import dataclasses
import os

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
from chainer.training import extensions as chainer_extensions

from reproduce import dataset, listing
from reproduce.job import agreement, functions, janitor, options, output, ranks, report
from reproduce.job.watchdog import Watchdog
from reproduce.listing import ImageFolder


def watch(mpi, argv):
    """Returns the watchdog of the whole job. All ranks together use it as a context manager.

    Args:
        mpi (mpi4py.MPI.Comm): The ranks.
        argv (list of str): The words of the command line, without the program's name.
    """
    return Watchdog(mpi, options.watchdog_of(argv))


def read_settings(mpi, watchdog, argv, description):
    """Reads the command line on rank 0, and sends the settings to all ranks.

    Args:
        mpi (mpi4py.MPI.Comm): The ranks.
        watchdog (Watchdog): Returned by :func:`watch`.
        argv (list of str): The words of the command line, without the program's name.
        description (str): Text at the start of ``--help``.

    Returns:
        Settings: The settings, the same on all ranks; None after ``--dry-run``, which prints the
            plan.
    """
    janitor.remove_those_of_open_mpi()
    settings, dry_run = ranks.on_rank_zero(
        mpi, lambda: options.parse(argv, mpi.size, description), watchdog.part('the options')
    )
    if not dry_run:
        return settings
    plan = watchdog.part('the plan', listing.position)
    ranks.on_rank_zero(mpi, lambda: _print_plan(settings), plan)
    return None


def _print_plan(settings):
    n_images = dataset.count_images(settings)
    dataset.check_total_batch(settings, n_images)
    print(report.plan(settings, n_images))


def create_communicator(mpi, watchdog, settings):
    """Creates the communicator that the settings ask for.

    Args:
        mpi (mpi4py.MPI.Comm): The ranks.
        watchdog (Watchdog): Is told when this rank takes part in the communicator's first
            broadcast, and when it is done. On GPUs, that broadcast connects NCCL.
        settings (Settings): Settings of the run.

    Returns:
        ~chainermn.CommunicatorBase: The communicator.
    """
    comm = ranks.on_every_rank(
        mpi,
        lambda: extensions.create_communicator(mpi_comm=mpi, **settings.communicator_options),
        watchdog.part('the communicator'),
    )
    bcast_data, device = comm.bcast_data, extensions.device_of(comm)

    def watched(model):
        comm.bcast_data = bcast_data
        on_gpus = hasattr(comm, 'nccl_comm')
        watchdog.enter("NCCL's first collective" if on_gpus else "the model's broadcast")
        bcast_data(model)
        if on_gpus:
            device.xp.cuda.Stream.null.synchronize()
        watchdog.enter('the trainer')

    comm.bcast_data = watched
    return comm


def choose_functions(mpi, watchdog, settings, comm):
    """Makes every rank compute by the implementation that --functions names, the same on all.

    Args:
        mpi (mpi4py.MPI.Comm): The ranks.
        watchdog (Watchdog): Returned by :func:`watch`.
        settings (Settings): Settings of the run.
        comm (~chainermn.CommunicatorBase): The communicator of the same ranks.

    Returns:
        Settings: The settings, with what ``'auto'`` stands for.
    """
    device = extensions.device_of(comm)

    def choose():
        name = functions.choose(mpi, settings.functions, device)
        return dataclasses.replace(settings, functions=name)

    return ranks.on_every_rank(mpi, choose, watchdog.part('the functions'))


def find_images(mpi, watchdog, settings):
    """Lists the images and makes the output folder on rank 0, and sends the lists to all ranks.

    Args:
        mpi (mpi4py.MPI.Comm): The ranks.
        watchdog (Watchdog): Returned by :func:`watch`.
        settings (Settings): Settings of the run.

    Returns:
        tuple of ImageFolder: Training and validation images.
    """

    def on_rank_zero():
        folders = dataset.find(settings, mpi.size)
        output.prepare(settings)
        return [folder.pack() for folder in dataset.save(settings, folders)]

    part = watchdog.part('the list of images', listing.position)
    packed = ranks.on_rank_zero(mpi, on_rank_zero, part)
    watchdog.enter('the model')
    return tuple(map(ImageFolder.unpack, packed))


def run(mpi, watchdog, comm, settings, argv, trainer, batches):
    """Runs a training, from the checkpoint that --resume names, if any.

    Args:
        mpi (mpi4py.MPI.Comm): The ranks.
        watchdog (Watchdog): Returned by :func:`watch`.
        comm (~chainermn.CommunicatorBase): The communicator of the same ranks.
        settings (Settings): Settings of the run.
        argv (list of str): This rank's own command line.
        trainer (~chainer.training.Trainer): The trainer that ``experiment()`` returned.
        batches (ImageLoader): The loader that ``experiment()`` returned.
    """
    train, val = batches.train, batches.val
    updater, evaluator = trainer.updater, trainer.get_extension('validation')
    model = updater.get_optimizer('main').target
    time_report, log_report = _extend(settings, comm, trainer, batches)
    identity = {**settings.identity, 'training images': train.digest(), 'validation': val.digest()}
    checkpoint = _find_checkpoint(mpi, watchdog, settings, identity)
    arithmetic = mpi.gather(report.arithmetic_of(settings, extensions.device_of(comm)))
    if comm.rank == 0:
        n_parameters = model.count_params()
        print(report.header(settings, comm, train, val, n_parameters, arithmetic), flush=True)
        report.write_settings(settings, settings.out)

    # However a run ends, going on from the last checkpoint gives the same bits.
    folder = output.checkpoints_of(settings.out)
    trainer.extend(
        extensions.Checkpointer(
            comm, folder, identity, settings.checkpoint_every, settings.keep_checkpoints
        )
    )
    if checkpoint:
        part = watchdog.part('going on from the checkpoint')
        ranks.on_every_rank(mpi, lambda: extensions.checkpoint.resume(trainer, checkpoint), part)
        checkpoint.clear()  # it is as large as the model and the optimizer's state

    # Before the first iteration, check that all ranks have the same program and numbers.
    with watchdog.part('the check of all ranks'):
        sample = agreement.sample(train, val)
        own = agreement.items(model, settings, argv, sample)
    ranks.on_every_rank(mpi, lambda: agreement.check(mpi, own, sample, settings.functions))
    watchdog.enter(report.position_of(updater, evaluator))
    with batches:
        trainer.run(show_loop_exception_msg=False)
    _conclude(settings, comm, trainer, batches, time_report, log_report)


def _find_checkpoint(mpi, watchdog, settings, identity):
    """Reads the checkpoint that --resume names, on rank 0, and sends it to all ranks."""

    def on_rank_zero():
        return output.find_checkpoint(settings, identity) if mpi.rank == 0 else None

    arrays = ranks.on_every_rank(mpi, on_rank_zero, watchdog.part('the checkpoint'))
    return ranks.bcast_arrays(mpi, arrays)


def _extend(settings, comm, trainer, batches):
    """Adds the extensions that log, print and plot."""
    updater, evaluator = trainer.updater, trainer.get_extension('validation')
    if hasattr(comm, 'cast_counts'):
        trainer.extend(extensions.CastReport(comm))
    time_report = extensions.TimeReport(comm, evaluator)
    trainer.extend(time_report)
    log_report = chainer_extensions.LogReport(
        postprocess=_last_hyperparameters(updater.get_optimizer('main'))
    )
    if comm.rank == 0:
        trainer.extend(log_report)
        n_iterations = settings.iterations(len(batches.train))
        trainer.extend(report.Progress(settings.total_batch_size, n_iterations, evaluator))
        trainer.extend(report.EpochTable(log_report))
        trainer.extend(report.Curves(settings, log_report))
    return time_report, log_report


def _last_hyperparameters(optimizer):
    """Makes the log show the values that the last update used, not means over an epoch."""

    def postprocess(entry):
        for name in ('lr', 'alpha_sgd', 'alpha_rmsprop'):
            entry[name] = getattr(optimizer, name)

    return postprocess


def _conclude(settings, comm, trainer, batches, time_report, log_report):
    """Writes the model and the summary. Collective."""
    peaks = report.peak_memory(comm), report.device_memory_of_all(comm)
    bad_images = report.bad_images(comm, batches)
    if comm.rank > 0:
        return
    model = trainer.updater.get_optimizer('main').target
    chainer.serializers.save_npz(os.path.join(settings.out, 'model.npz'), model)
    timing = time_report.summary()
    summary = report.summarize(settings, comm, trainer, log_report.log, peaks, bad_images, timing)
    print(
        f'{report.parts(timing)}\n'
        f'top-1 {summary["top1"]:.2%}; at most {peaks[0] / 2**20:,.0f} MiB per process'
        + (f' and {peaks[1] / 2**20:,.0f} MiB of its GPU; ' if peaks[1] else '; ')
        + (f'{len(bad_images):,} bad images skipped; ' if bad_images else '')
        + f'results in {settings.out}',
        flush=True,
    )
