"""What a person sees of a run of the twin: options, header, table of epochs, files."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

from reproduce.job import options, ranks, report
from reproduce.settings import InputError
from reproduce.twin.resnet50 import chainer_names

# Settings of reproduce/train.py that only the training in Chainer has.
ABSENT = {
    **dict.fromkeys(('resume', 'checkpoint_every', 'keep_checkpoints'), 'checkpoints'),
    'communicator': 'choice: NCCL averages on GPUs, gloo on CPUs',
    'functions': 'other functions than PyTorch',
    'bn_decay': 'moving averages',
    'pooled_variance': 'pooled variance',
    'gradient_scale': 'gradient scale',
    'stop_on_nonfinite': 'way to go on: an infinite or NaN gradient ends the run',
}


def timeout_of(argv) -> float:
    """Returns --watchdog: seconds after which torch.distributed ends an exchange. 0: never."""
    return options.watchdog_of(argv)


def read_settings(processes, argv, description):
    """Reads the command line on rank 0. Returns the Settings, the same on all processes.

    Args:
        processes (Processes): The job.
        argv (list of str): The words of the command line, without the program's name.
        description (str): Text at the start of ``--help``.
    """
    return ranks.on_rank_zero(processes, lambda: parse(argv, processes.size, description))


def parse(argv, n_processes, description=None, verb='twin train'):
    """Returns the Settings of a command line of reproduce/train.py.

    Raises:
        InputError: An option is wrong, or the twin does not have it.
    """
    words = {word.partition('=')[0].replace('--no-', '--', 1) for word in argv}
    if '--evaluate' in words:
        raise InputError(
            "--evaluate: the twin only trains; ./run_mpi.sh train validates the twin's model, too"
        )
    settings, _ = options.parse(argv, n_processes, description, verb)
    for name, what in ABSENT.items():
        if options.flag(name) in words:
            raise InputError(f'{options.flag(name)}: the twin has no {what}; leave the option out')
    return settings


class Records:
    """Prints and writes, on rank 0 alone.

    Args:
        processes (Processes): The job.
        training (~reproduce.twin.train.Training): Before its first iteration.
    """

    def __init__(self, processes, training):
        self._processes, self._training = processes, training
        self._settings, self._out = training.settings, Path(training.settings.out)
        self._is_first = processes.rank == 0
        self._start = time.monotonic()
        self.log: list = []
        if self._is_first:
            print(self._header(), flush=True)
            report.write_settings(self._settings, self._settings.out)
            self._table = report.EpochTable(self)
            self._table.initialize(None)

    def _header(self) -> str:
        s, train, val = self._settings, self._training.batches.train, self._training.batches.val
        n_parameters = sum(param.numel() for param in self._training.model.parameters())
        rows = {
            'twin': f'PyTorch {torch.__version__}, Python {platform.python_version()}, '
            f'{self._processes.device}',
            'workers': f'{s.workers:,} on {self._processes.size:,} processes',
            'total batch': f'{s.total_batch_size:,} = {s.workers:,} x {s.local_batch_size:,}',
            'learning rate': f'base {s.lr_base:g}, first {s.lr(0):g}',
            'all-reduce': f'{s.allreduce_grad_dtype}, {self._training.averages_by}',
            'model': f'{"shallow " if s.shallow else ""}ResNet-50, width {s.width}, {s.stem} stem, '
            f'{n_parameters:,} parameters',
            'training': f'{len(train):,} images in {train.root}',
            'validation': f'{len(val):,} images in {val.root}',
            'length': f'{s.epochs} epochs, {s.iterations(len(train)):,} iterations',
            'output': s.out,
        }
        return '\n'.join(f'{title:14}{text}' for title, text in rows.items())

    def add(self, entry: dict):
        """Adds an entry to the log, with the keys of Chainer's. The plot of runs reads it, too."""
        training = self._training
        entry = {'epoch': int(training.epoch), 'iteration': training.iteration, **entry}
        entry['elapsed_time'] = time.monotonic() - self._start
        self.log.append(entry)
        if self._is_first:
            self._table(None)
            self._write('log', self.log)

    def close(self):
        """Writes the summary, the curves, and the model under Chainer's names."""
        if not self._is_first:
            return
        last, training = self.log[-1], self._training
        summary = {
            'top1': last['validation/main/accuracy'],
            'top5': last['validation/main/top5_accuracy'],
            'validation_loss': last['validation/main/loss'],
            'validation_images': last['validation/images'],
            'training_loss': last['main/loss'],
            'epochs': self._settings.epochs,
            'iterations': training.iteration,
            'workers': self._settings.workers,
            'processes': self._processes.size,
            'total_batch_size': self._settings.total_batch_size,
            'seconds': last['elapsed_time'],
            'versions': {'torch': str(torch.__version__), 'python': platform.python_version()},
        }
        tensors = training.model.state_dict()
        names = chainer_names(training.model)
        arrays = {theirs[1:]: tensors[own].cpu().numpy() for own, theirs in names.items()}
        layers = [name[: -len('avg_mean')] for name in arrays if name.endswith('/avg_mean')]
        arrays.update({f'{layer}N': np.array(0) for layer in layers})  # of no use in either
        np.savez(self._out / 'model.npz', **arrays)
        from reproduce.job import plots

        plots.curves(self.log, self._settings, self._settings.out)
        self._write('summary.json', summary)
        print(f'top-1 {summary["top1"]:.2%}; results in {self._out}', flush=True)

    def _write(self, name, content):
        path = self._out / f'{name}.tmp'
        path.write_text(json.dumps(content, indent=2) + '\n')
        path.replace(self._out / name)
