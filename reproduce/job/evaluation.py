"""Validates a model that a run has left. Trains nothing, and changes no run's files."""

from __future__ import annotations

import json
from pathlib import Path

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import numpy as np

from extensions import checkpoint_files
from extensions.communicator_base import first_few
from extensions.evaluation import shard
from reproduce import dataset, images, listing
from reproduce.job import agreement, ranks, report
from reproduce.job.countdown import Countdown
from reproduce.listing import ImageFolder
from reproduce.loader import ImageLoader
from reproduce.order import ImageOrder
from reproduce.resnet50 import ResNet50
from reproduce.settings import InputError

_IN_A_CHECKPOINT = 'updater/model:main/'
_REMEDY = "give a run's model.npz or checkpoints/best.npz"
# Settings that can change the numbers, beside those that the model's shapes show.
_MATTER = ('image_size', 'resize', 'resize_filter', 'validation_batch_size', 'functions')


def run(mpi, watchdog, comm, settings, argv):
    """Validates the model in the file of --evaluate, as at the end of an epoch, and prints it.

    The batch statistics are those in the file: the ones of the run's own validation. On CPUs, the
    numbers are that validation's to the last bit, on any number of processes.

    Args:
        mpi (mpi4py.MPI.Comm): The ranks.
        watchdog (Watchdog): The job's.
        comm (~chainermn.CommunicatorBase): The communicator of the same ranks.
        settings (Settings): Settings of the run.
        argv (list of str): This rank's own command line.

    Raises:
        ~reproduce.job.ranks.AgreedExit: The images or the file cannot be used, or ranks differ.
    """
    val = _find_images(mpi, watchdog, settings)
    model = _read_model(mpi, watchdog, settings, val)
    device = extensions.device_of(comm)
    model.to_device(device)
    with watchdog.part('the check of all ranks'):
        sample = agreement.sample(val)
        own = agreement.items(model, settings, argv, sample)
    ranks.on_every_rank(mpi, lambda: agreement.check(mpi, own, sample, settings.functions))
    _, computes = report.arithmetic_of(settings, device)
    if comm.rank == 0:
        print(_header(settings, comm, val, model.count_params(), computes), flush=True)
    batches = ImageLoader(
        val,
        val,
        ImageOrder(len(val), 1, 1, settings.seed),
        settings.preprocessing,
        settings.seed,
        range(1),
        settings.loader,
        settings.validation_batch_size,
        settings.bad_images,
    )
    evaluator = extensions.ExactEvaluator(
        batches.validation_batches,
        model,
        comm,
        len(val),
        settings.validation_batch_size,
        converter=images.converter_to(device),
    )
    _watch(watchdog, evaluator, comm, len(val), settings.validation_batch_size)
    with batches:
        result = evaluator.evaluate()
    bad = report.bad_images(comm, batches)
    if comm.rank == 0:
        print(_in_words(result, bad), flush=True)


def _find_images(mpi, watchdog, settings) -> ImageFolder:
    def on_rank_zero():
        return dataset.find_validation(settings).pack()

    part = watchdog.part('the list of images', listing.position)
    return ImageFolder.unpack(ranks.on_rank_zero(mpi, on_rank_zero, part))


def _read_model(mpi, watchdog, settings, val) -> ResNet50:
    """Builds the model on every rank, from the file that rank 0 reads."""
    model = ResNet50(
        len(val.classes), settings.width, settings.stem, settings.seed, settings.shallow
    )

    def on_rank_zero():
        if mpi.rank > 0:
            return None
        arrays, recorded = read(settings.evaluate)
        check(arrays, model, settings, val)
        now = {name: getattr(settings, name) for name in _MATTER if name in recorded}
        differing = checkpoint_files.difference({name: recorded[name] for name in now}, now)
        if differing:
            print(f'note: the model is of a run with {", ".join(differing.values())}', flush=True)
        return arrays

    arrays = ranks.on_every_rank(mpi, on_rank_zero, watchdog.part('the model'))
    arrays = ranks.bcast_arrays(mpi, arrays)
    chainer.serializers.NpzDeserializer(arrays).load(model)
    return model


def read(path) -> tuple[dict, dict]:
    """Reads a model from ``model.npz`` or from a checkpoint.

    Args:
        path (str): The file.

    Returns:
        tuple: Parameters and batch statistics, as arrays by name; and what is known of the settings
            of the run that left the file.

    Raises:
        InputError: There is no such file, it is damaged or no model, or it is a checkpoint from the
            middle of an epoch.
    """
    try:
        with open(path, 'rb') as opened:
            arrays = _arrays_in(opened)
    except OSError as error:
        raise InputError(f'--evaluate {path}: {error.strerror}; {_REMEDY}') from error
    except Exception as error:  # a damaged archive can raise anything
        raise InputError(
            f'--evaluate {path} is damaged or not a model ({error}); {_REMEDY}'
        ) from error
    if arrays is not None:
        return arrays, _settings_beside(path)
    try:
        entries, identity = checkpoint_files.read(path)
    except checkpoint_files.CheckpointError as error:
        raise InputError(f'--evaluate {error}; {_REMEDY}') from error
    if checkpoint_files.properties_of(path).get('top1') is None:
        raise InputError(
            f'--evaluate {path} is a checkpoint without a validation: its batch statistics are '
            f"one worker's; {_REMEDY}"
        )
    n = len(_IN_A_CHECKPOINT)
    model = {name[n:]: a for name, a in entries.items() if name.startswith(_IN_A_CHECKPOINT)}
    return model, identity


def _arrays_in(opened) -> dict | None:
    """Returns all arrays of an archive; None if it is a checkpoint."""
    with np.load(opened, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise TypeError('not an archive')
        if 'manifest' in file.files:
            return None
        return {name: file[name] for name in file.files}


def _settings_beside(path) -> dict:
    try:
        found = json.loads((Path(path).parent / 'settings.json').read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check(arrays, model, settings, val):
    """Raises InputError unless the arrays are those of the model.

    Args:
        arrays (dict): Result of :func:`read`.
        model (ResNet50): The model that the settings and the images ask for.
        settings (Settings): Settings of the run.
        val (ImageFolder): Validation images.
    """
    expected: dict = {}
    chainer.serializers.DictionarySerializer(expected).save(model)
    what = f'--evaluate {settings.evaluate}'
    differing = sorted(set(expected) ^ set(arrays))
    if differing:
        raise InputError(
            f'{what} is not of this network: only one of the two has {first_few(differing)}; '
            'give the options of its run'
        )
    for name in ('conv1/W', 'fc/W', *sorted(expected)):
        array, own = arrays[name], expected[name]
        if (array.shape, array.dtype) != (own.shape, own.dtype):
            raise InputError(
                f'{what}: {name} is {array.dtype} {list(array.shape)}, but --width '
                f'{settings.width}, --stem {settings.stem} and the {len(val.classes):,} classes of '
                f'{val.root} need {own.dtype} {list(own.shape)}: give the options of its run, and '
                'images of its classes'
            )


def _watch(watchdog, evaluator, comm, n_images, batch_size):
    """Makes the evaluation tell the watchdog its progress, and a person the time left."""

    def position():
        left = evaluator.minibatches_left
        return 0, left, 'the validation' + (f', {left:,} minibatches left' if left else '')

    watchdog.enter(position)
    start, stop = shard(comm.rank, comm.size, n_images, batch_size)
    n_batches = -(-(stop - start) // batch_size)
    countdown = Countdown('minibatches of rank 0', n_batches)

    def after_minibatch():
        if comm.rank == 0 and evaluator.minibatches_left < n_batches:
            countdown()

    evaluator.after_minibatch = after_minibatch


def _header(settings, comm, val, n_parameters, computes) -> str:
    s = settings
    rows = {
        'model': f'{report.network_of(s)}, {n_parameters:,} parameters, of {s.evaluate}',
        'functions': computes,
        'validation': f'{len(val):,} images in {val.root}, on {comm.size:,} processes',
        'versions': report.in_words(report.versions()),
    }
    return '\n'.join(f'{title:14}{text}' for title, text in rows.items())


def _in_words(result, bad_images) -> str:
    """Returns the numbers in one line. The loss has all its digits, as in a run's ``log``."""
    n = result['images']
    top1, top5 = result['main/accuracy'], result['main/top5_accuracy']
    return (
        f'top-1 {top1:.2%} ({round(top1 * n):,} of {n:,} images), top-5 {top5:.2%}, '
        f'loss {result["main/loss"]!r}'
        + (f'; {len(bad_images):,} bad images skipped' if bad_images else '')
    )
