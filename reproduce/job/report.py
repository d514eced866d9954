"""Everything that a person sees of a run: plan, header, progress, table of epochs, files."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import json
import os
import platform
import resource
import sys
import time
from importlib.metadata import version

import chainer
import mpi4py
import numpy as np
from chainer import training
from chainer.backends import cuda
from chainer.training import extension, triggers
from mpi4py import MPI

from extensions import device_of, kernels, nccl, schedules
from extensions.timing import PARTS
from reproduce.job import functions, mpi_library
from reproduce.job.countdown import duration

_COLUMNS = (  # title, key in the log, format
    ('epoch', 'epoch', '{:>5d}'),
    ('lr', 'lr', '{:>9.5f}'),
    ('alpha_sgd', 'alpha_sgd', '{:>9.5f}'),
    ('alpha_rmsprop', 'alpha_rmsprop', '{:>13.3e}'),
    ('train loss', 'main/loss', '{:>10.4f}'),
    ('val loss', 'validation/main/loss', '{:>9.4f}'),
    ('top-1', 'validation/main/accuracy', '{:>7.2%}'),
    ('flushed', 'cast/flushed', '{:>7.2%}'),
    ('seconds', 'elapsed_time', '{:>8.1f}'),
)


@functools.cache
def versions() -> dict:
    """Returns the versions of all software that the results depend on, as {name: version}.

    They are read once, at the start: later, another environment may be on the disk.
    """
    found = {
        'python': platform.python_version(),
        'chainer': chainer.__version__,
        'numpy': np.__version__,
        **{name: version(name) for name in ('simplejpeg', 'opencv-python-headless', 'Pillow')},
        'mpi4py': mpi4py.__version__,
        'mpi': mpi_library(MPI.Get_library_version()),
    }
    if cuda.available:
        found['cupy'] = cuda.cupy.__version__
        found['cuda'] = str(cuda.cupy.cuda.runtime.runtimeGetVersion())
        found['cudnn'] = str(cuda.libcudnn.getVersion()) if cuda.cudnn_enabled else 'none'
        found['nccl'] = nccl.version()
    if 'extensions.torch_functions' in sys.modules:  # imported only for --functions torch
        found['torch'] = str(sys.modules['torch'].__version__)  # with the kind of build
    return found


def in_words(found: dict) -> str:
    """Returns versions as one line."""
    return ', '.join(f'{name} {version}' for name, version in found.items())


def gpu(number=0) -> str:
    """Describes a GPU: its name, compute capability, memory, and the CUDA of its driver."""
    runtime = cuda.cupy.cuda.runtime
    properties = runtime.getDeviceProperties(number)
    driver = runtime.driverGetVersion()
    return (
        f'{properties["name"].decode()}, compute capability {properties["major"]}.'
        f'{properties["minor"]}, {properties["totalGlobalMem"] / 2**30:.0f} GiB, driver for CUDA '
        f'{driver // 1000}.{driver % 1000 // 10}'
    )


def plan(settings, n_images: int) -> str:
    """Returns the plan of a run, a table.

    The table begins with n, b, the total batch and eta_base. Then a row for the start of each epoch
    has eta and the alphas. More rows show the moments of the transition at which the printed form
    crosses 1 and jumps.

    Args:
        settings (Settings): Settings of the run. ``workers`` must not be None.
        n_images (int): Number of training images.

    Returns:
        str: The lines of the table.
    """
    s = settings
    per_epoch = n_images / s.total_batch_size
    lines = [
        f'{"workers n":24}{s.workers:,}',
        f'{"images per worker b":24}{s.local_batch_size:,}',
        f'{"total batch n b":24}{s.total_batch_size:,}',
        f'{"training images":24}{n_images:,}',
        f'{"eta_base":24}{s.lr_base:g}  ({s.lr_per_256:g} x {s.total_batch_size:,} / 256)',
        f'{"iterations":24}{s.iterations(n_images):,}  ({per_epoch:.2f} x {s.epochs} epochs)',
        f'{"learning rate":24}{s.lr_schedule}',
        f'{"alpha_SGD":24}{s.alpha_form}, centre {s.beta_center:g}, period {s.beta_period:g} of 90',
        '',
        f'{"epoch":>8} {"of 90":>8} {"eta":>10} {"alpha_sgd":>10} {"alpha_rmsprop":>14}',
    ]
    scale = s.epochs / schedules.PAPER_EPOCHS
    end = s.beta_center + s.beta_period / 2
    just_before = np.nextafter(end, 0)
    moments = {s.beta_center + s.beta_period / 4, just_before, end}
    whole = {epoch / scale for epoch in range(s.epochs)}
    for of_90 in sorted(whole | {m for m in moments if 0 <= m < schedules.PAPER_EPOCHS}):
        lr = s.lr(of_90)
        alpha = s.alpha_sgd(of_90)
        alpha_rmsprop = schedules.alpha_rmsprop(alpha, lr, s.lr_rmsprop)
        epoch, of_90 = (
            ('<' if of_90 == just_before else '') + format(e, '.6g') for e in (of_90 * scale, of_90)
        )
        lines.append(f'{epoch:>8} {of_90:>8} {lr:>10.5g} {alpha:>10.5f} {alpha_rmsprop:>14.4e}')
    return '\n'.join(lines)


def network_of(settings) -> str:
    """Returns the network of the settings in words."""
    kind = 'shallow ResNet-50' if settings.shallow else 'ResNet-50'
    return f'{kind}, width {settings.width}, {settings.stem} stem'


def header(settings, comm, train, val, n_parameters: int, arithmetic) -> str:
    """Returns the header, which is printed before the first iteration.

    Args:
        settings (Settings): Settings of the run.
        comm (~chainermn.CommunicatorBase): The processes.
        train, val (ImageFolder): Training and validation images.
        n_parameters (int): Number of the model's parameters.
        arithmetic (list of tuples): Result of :func:`arithmetic_of` on each rank.

    Returns:
        str: A line for each property of the run.
    """
    s = settings
    device = device_of(comm)
    device_name = 'CPU' if device.xp is np else gpu(device.device.id)
    each = s.workers // comm.size
    update, computes = ('; '.join(_with_ranks(list(texts))) for texts in zip(*arithmetic))
    rows = {
        'workers': f'{s.workers:,} = {comm.size:,} processes x {each:,}, '
        f'on {comm.inter_size:,} host(s), {device_name}',
        **({'': _how_workers_share(s, comm.size)} if each > 1 else {}),
        'total batch': f'{s.total_batch_size:,} = {s.workers:,} x {s.local_batch_size:,}',
        'learning rate': f'base {s.lr_base:g}, first {s.lr(0):g}',
        'communicator': f'{type(comm).__name__}; {comm.reason}',
        'all-reduce': all_reduce_of(comm, s),
        'update': f'RMSpropWarmup, {update}',
        'model': f'{network_of(s)}, {n_parameters:,} parameters',
        'functions': computes,
        'training': f'{len(train):,} images in {train.root}',
        'validation': f'{len(val):,} images in {val.root}',
        'classes': f'{len(train.classes):,}',
        'length': f'{s.epochs} epochs, {s.iterations(len(train)):,} iterations',
        'versions': in_words(versions()),
        'output': s.out,
    }
    return '\n'.join(f'{title:14}{text}' for title, text in rows.items())


def _how_workers_share(settings, n_processes) -> str:
    each = settings.workers // n_processes
    batch = n_processes * settings.local_batch_size
    return (
        f'each process plays {each:,} workers, one after the other; --workers {n_processes} would '
        f'be one each, and a total batch of {batch:,}'
    )


def all_reduce_of(comm, settings) -> str:
    """Describes the all-reduce: type, kind of sum, gradient scale."""
    sum_ = f'{comm.accumulate} sum' if hasattr(comm, 'accumulate') else "the library's sum"
    scale = f', gradient scale {settings.gradient_scale:g}' if settings.gradient_scale != 1 else ''
    return f'{settings.allreduce_grad_dtype}, {sum_}{scale}'


def arithmetic_of(settings, device) -> tuple[str, str]:
    """Describes what updates parameters on a device, and what computes forward and backward."""
    update = kernels.description() if device.xp is np else 'CUDA'
    return update, functions.description(settings.functions, device)


def _with_ranks(texts) -> list:
    """Returns the different texts; if there are several, each with the number of its ranks."""
    counts = collections.Counter(texts)
    if len(counts) == 1:
        return texts[:1]
    return [f'{text} on {n:,} of {len(texts):,} ranks' for text, n in counts.items()]


class Progress(training.Extension):
    """Prints images/s and the time left, at most one line per ``seconds``.

    Lines also come within a long iteration, between the workers of a process, and within a
    validation. They are whole lines and never overwrite each other: standard output under mpiexec
    looks like a terminal even if it ends in a file.

    Args:
        total_batch_size (int): Images of all workers together in one iteration.
        n_iterations (int): Number of iterations of the run.
        evaluator (~extensions.ExactEvaluator): The validation.
        seconds (float): Least time between two lines, in seconds.
    """

    trigger = (1, 'iteration')
    priority = extension.PRIORITY_READER

    def __init__(self, total_batch_size, n_iterations, evaluator, seconds=10.0):
        self._total_batch_size = total_batch_size
        self._n_iterations = n_iterations
        self._evaluator = evaluator
        self._seconds = seconds
        self._validation = None  # start, minibatches left at the start, time of the last line
        self._last = None

    def initialize(self, trainer):
        self._last = (time.monotonic(), trainer.updater.images_done)
        trainer.updater.after_worker = lambda: self(trainer)
        self._evaluator.after_minibatch = self._validating

    def __call__(self, trainer):
        now, images = time.monotonic(), trainer.updater.images_done
        then, before = self._last
        # After a wait for a slower rank there may be no image since the last line.
        if now - then < self._seconds or images == before:
            return
        self._last = (now, images)
        rate = (images - before) / (now - then)
        left = duration((self._n_iterations * self._total_batch_size - images) / rate)
        iteration, within = divmod(images, self._total_batch_size)
        part = f' + {within:,} of {self._total_batch_size:,} images' if within else ''
        print(
            f'  iteration {iteration:,} of {self._n_iterations:,}{part}, '
            f'epoch {trainer.updater.epoch_detail:.2f}, {rate:,.0f} images/s, {left} left',
            flush=True,
        )

    def _validating(self):
        now, left = time.monotonic(), self._evaluator.minibatches_left
        if self._validation is None:
            self._validation = now, left, now
        start, n, said = self._validation
        if now - said >= self._seconds and left:
            time_left = duration((now - start) / (n - left) * left)
            print(f'  validation: {left:,} minibatches, {time_left} left', flush=True)
            self._validation = start, n, now
        if left == 0:
            self._validation = None
            then, images = self._last
            self._last = then + now - start, images  # a validation does not count as training


def position_of(updater, evaluator):
    """Returns a function that tells where this rank is, for the Watchdog.

    Args:
        updater (~extensions.VirtualWorkersUpdater): The training.
        evaluator (~extensions.ExactEvaluator): The validation.

    Returns:
        callable: The argument ``position`` of :class:`~reproduce.job.watchdog.Watchdog`.
    """

    def position():
        done, left, iteration = updater.images_done, evaluator.minibatches_left, updater.iteration
        if left is None:
            return done, None, f'iteration {iteration + 1}, {done:,} images in all'
        return done, left, f'validation after iteration {iteration}, {left} minibatches left'

    return position


class EpochTable(training.Extension):
    """Prints a table with a row for each entry of the log.

    Args:
        log_report (~chainer.training.extensions.LogReport): The log. LogReport must run before this
            extension.
    """

    trigger = (1, 'epoch')
    priority = extension.PRIORITY_READER - 1

    def __init__(self, log_report):
        self._log_report = log_report

    def initialize(self, trainer):
        heads = (title.rjust(len(form.format(0))) for title, _, form in _COLUMNS)
        print('  '.join(heads), flush=True)

    def __call__(self, trainer):
        entry = self._log_report.log[-1]
        cells = (
            form.format(entry[key]) if key in entry else '-'.rjust(len(form.format(0)))
            for _, key, form in _COLUMNS
        )
        print('  '.join(cells), flush=True)


class Curves(training.Extension):
    """Draws ``curves.png`` at most once per minute, so that a long run can be watched.

    Args:
        settings (Settings): Settings of the run.
        log_report (~chainer.training.extensions.LogReport): The log.
    """

    trigger = triggers.TimeTrigger(60)  # type: ignore[assignment]
    priority = extension.PRIORITY_READER - 1

    def __init__(self, settings, log_report):
        from reproduce.job import plots  # here, because matplotlib takes a fifth of a rank's start

        self._plots = plots
        self._settings = settings
        self._log_report = log_report

    def __call__(self, trainer):
        if self._log_report.log:
            self._plots.curves(self._log_report.log, self._settings, trainer.out)
            # A figure takes 9 MB and has reference cycles: Python alone would keep several.
            gc.collect()


def write_settings(settings, out: str):
    """Writes ``settings.json`` into the folder ``out``."""
    _write_json(dataclasses.asdict(settings), os.path.join(out, 'settings.json'))


def peak_memory(comm) -> int:
    """Returns the most memory that any process of the job has had, in bytes. Collective."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux
    return 1024 * comm.mpi_comm.allreduce(kilobytes, MPI.MAX)


def device_memory() -> int:
    """Returns the memory that the pools of CuPy and of Torch hold of a GPU, in bytes.

    CuPy's pool gives memory back only where there is too little, Torch's counts its peak. CUDA's
    and NCCL's own memory is not in it.
    """
    held = cuda.cupy.get_default_memory_pool().total_bytes()
    if 'torch' in sys.modules:
        held += sys.modules['torch'].cuda.max_memory_reserved()
    return held


def free_device_memory():
    """Makes the memory pools give back what they do not use, and forget their peaks."""
    cuda.cupy.get_default_memory_pool().free_all_blocks()
    if 'torch' in sys.modules:
        sys.modules['torch'].cuda.empty_cache()
        sys.modules['torch'].cuda.reset_peak_memory_stats()


def device_memory_of_all(comm) -> int:
    """Returns the most :func:`device_memory` of any process at the end; 0 on CPUs. Collective."""
    on_cpu = device_of(comm).xp is np
    return comm.mpi_comm.allreduce(0 if on_cpu else device_memory(), MPI.MAX)


def bad_images(comm, batches) -> dict:
    """Returns the images skipped since the job's start, as {path: message}. Collective."""
    return dict(
        sorted(item for bad in comm.mpi_comm.allgather(batches.bad) for item in bad.items())
    )


def parts(timing: dict) -> str:
    """Returns one line with the mean iteration and its parts, from TimeReport's summary."""
    if not timing['iterations']:
        return 'no timing: too few iterations'
    text = ', '.join(f'{name} {1000 * timing[name]:,.1f}' for name in PARTS)
    text = text.replace('_', ' + ').replace('allreduce', 'all-reduce')
    return f'iteration {1000 * timing["iteration"]:,.1f} ms, slowest ranks: {text}'


def summarize(settings, comm, trainer, log, peaks, bad_images, timing) -> dict:
    """Writes ``summary.json`` and the final ``curves.png``.

    Args:
        settings (Settings): Settings of the run.
        comm (~chainermn.CommunicatorBase): The processes.
        trainer (~chainer.training.Trainer): The trainer, after its run.
        log (list of dict): Entries of the LogReport.
        peaks (tuple of int): Results of :func:`peak_memory` and :func:`device_memory_of_all`.
        bad_images (dict): Result of :func:`bad_images`.
        timing (dict): Summary of the TimeReport, in seconds.

    Returns:
        dict: The summary. ``top1`` is a fraction of ``validation_images``. ``seconds`` includes the
            validations.
    """
    iterations = trainer.updater.iteration
    last = log[-1]
    summary = {
        'top1': last['validation/main/accuracy'],
        'top5': last['validation/main/top5_accuracy'],
        'validation_loss': last['validation/main/loss'],
        'validation_images': int(last['validation/images']),
        'training_loss': last['main/loss'],
        'epochs': settings.epochs,
        'iterations': iterations,
        'workers': settings.workers,
        'processes': comm.size,
        'total_batch_size': settings.total_batch_size,
        'seconds': trainer.elapsed_time,
        'peak_memory_bytes': peaks[0],
        'peak_device_memory_bytes': peaks[1],
        'bad_images': {'count': len(bad_images), 'messages': list(bad_images.values())},
        'images_per_second': iterations * settings.total_batch_size / trainer.elapsed_time,
        'timing': timing,
        'versions': versions(),
    }
    _write_json(summary, os.path.join(settings.out, 'summary.json'))
    from reproduce.job import plots

    plots.curves(log, settings, settings.out)
    return summary


def _write_json(content: dict, path: str):
    with open(path + '.tmp', 'w') as file:
        json.dump(content, file, indent=2)
        file.write('\n')
    os.replace(path + '.tmp', path)
