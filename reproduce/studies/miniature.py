"""Which parts of the paper's recipe matter? Trains a small network on CIFAR-10, part by part.

./run_mpi.sh miniature --images CIFAR10

CIFAR10 is a folder with train/CLASS/* and val/CLASS/*. Every variant trains the same network for
the same epochs on the same images, with several seeds. A run is one process, which plays all
workers of the variant one after the other. As many runs train at a time as there are cores.

Ctrl-C stops the runs, each with a checkpoint. The same command continues them. The folder --out
gets a table (table.md), a plot (runs.png) and the log of every run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reproduce.job import BLAS_THREADS, report
from reproduce.job.command_line import Parser, reason
from reproduce.studies import figures

N_EPOCHS = 10
COMMON = (
    f'--preset cifar10 --width 8 --stem imagenet --epochs {N_EPOCHS} --loader serial '
    '--validation-batch-size 100 --keep-checkpoints 1 --communicator mpi'
)
_LARGE = '--workers 32'  # x 32 images = 1,024
VARIANTS = {
    'a': ('small batch, SGD', '--workers 2 --lr-schedule steps --alpha-form sgd --bn-decay 0.9'),
    'b': ('large batch, SGD', f'{_LARGE} --lr-schedule steps --alpha-form sgd'),
    'c': ('large, gradual warm-up', f'{_LARGE} --lr-schedule gradual_warmup --alpha-form sgd'),
    's': ('large, slow start alone', f'{_LARGE} --alpha-form sgd'),
    'd': ('large, the paper, printed', f'{_LARGE} --alpha-form printed'),
    'dc': ('large, the paper, continuous', f'{_LARGE} --alpha-form continuous'),
    'e': ('d with BN moving averages', f'{_LARGE} --alpha-form printed --bn-decay 0.9'),
    'f': (
        'd with float32 all-reduce',
        f'{_LARGE} --alpha-form printed --allreduce-grad-dtype float32',
    ),
}


def first_images(images: Path, per_class: dict) -> dict:
    """Finds the first images of each class.

    Args:
        images (Path): The folder with ``train`` and ``val``.
        per_class (dict): ``train`` and ``val`` to a number of images per class.

    Returns:
        dict: (split, class, name) to the path of the image.

    Raises:
        SystemExit: There is no such folder, or a class has too few images.
    """
    found = {}
    for split, n in per_class.items():
        folder = images / split
        classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if not classes:
            sys.exit(f'error: {folder} has no class folders; --images needs train/CLASS, val/CLASS')
        for source in classes:
            files = sorted(source.iterdir())[:n]
            if len(files) < n:
                sys.exit(
                    f'error: {source} has {len(files)} images, not {n}: '
                    f'lower --{split}-per-class or add images'
                )
            found.update({(split, source.name, file.name): file.resolve() for file in files})
    return found


def link(found: dict, out: Path):
    """Makes OUT/images/train/CLASS and OUT/images/val/CLASS, with links to these images alone.

    Args:
        found (dict): Result of :func:`first_images`.
        out (Path): The folder of the study.

    Raises:
        SystemExit: OUT has runs with other images.
    """
    folder = out / 'images'
    wanted = {folder.joinpath(*place): image for place, image in found.items()}
    links = {path: path.readlink() for path in folder.glob('*/*/*') if path.is_symlink()}
    if links == wanted:
        return
    if links and any(out.glob('*-seed*')):
        sys.exit(
            f'error: the runs in {out} have other images ({len(links):,} links in {folder}, now '
            f'{len(wanted):,}): give --images and the numbers per class as before, or another --out'
        )
    for path, image in links.items():
        if wanted.get(path) != image:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    for path, image in wanted.items():
        if links.get(path) != image:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(image)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a variant with a seed, in the folder OUT/VARIANT-seedSEED."""

    variant: str
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f'{self.variant}-seed{self.seed}'

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def is_finished(self) -> bool:
        return (self.folder / 'summary.json').exists()

    @property
    def command(self) -> list[str]:
        """The words after ``python``. The command continues a run that was stopped."""
        data = self.out / 'images'
        where = {
            '--train-root': data / 'train',
            '--val-root': data / 'val',
            '--manifests': data,
            '--out': self.folder,
        }
        options = f'{COMMON} {VARIANTS[self.variant][1]} --seed {self.seed} --resume auto'
        program = os.path.relpath(Path(__file__).parents[1] / 'train.py')
        return [program, *options.split(), *(str(s) for item in where.items() for s in item)]

    def log(self) -> list:
        """Returns Chainer's log, an entry per epoch. It is empty before the first epoch ends."""
        try:
            return json.loads((self.folder / 'log').read_text())
        except (OSError, ValueError):
            return []

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**dict.fromkeys(BLAS_THREADS, '1'), **os.environ}
        with open(self.folder / 'output.txt', 'a') as output:
            return subprocess.Popen(
                [sys.executable, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )


def train_all(runs: list[Run], n_at_a_time: int):
    """Trains the runs that are not finished. Prints a line when a run ends, and every minute.

    Args:
        runs (list of Run): All runs.
        n_at_a_time (int): Runs that train at the same time.

    Raises:
        SystemExit: A run failed. The message names the file with its output.
    """
    waiting = [run for run in runs if not run.is_finished]
    progress = _Progress(runs)
    running: dict[Run, subprocess.Popen] = {}
    try:
        while waiting or running:
            while waiting and len(running) < n_at_a_time:
                run = waiting.pop(0)
                running[run] = run.start()
            time.sleep(1)
            ended = [run for run, process in running.items() if process.poll() is not None]
            for run in ended:
                status = running.pop(run).returncode
                if status:
                    sys.exit(f'error: {run.name} failed; {run.folder / "output.txt"} says why')
            progress(ended)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGUSR1)  # makes a checkpoint and ends
        for process in running.values():
            process.wait()


class _Progress:
    def __init__(self, runs):
        self._runs = runs
        self._start = self._last = time.monotonic()
        self._before = self._epochs()
        print(
            f'{sum(run.is_finished for run in runs)} of {len(runs)} runs are finished', flush=True
        )

    def _epochs(self):
        return sum(len(run.log()) for run in self._runs)

    def __call__(self, ended):
        now = time.monotonic()
        if not ended and now < self._last + 60:
            return
        self._last = now
        done, total = self._epochs(), N_EPOCHS * len(self._runs)
        line = f'{done:,} of {total:,} epochs'
        if done > self._before:
            seconds = (now - self._start) / (done - self._before) * (total - done)
            line += f', {report.duration(seconds)} left'
        print('; '.join([line, *(f'{run.name} is finished' for run in ended)]), flush=True)


def collect(out: Path) -> dict:
    """Reads the logs of all finished runs in the folder ``out``.

    Returns:
        dict: Variant, then seed, to Chainer's log.
    """
    found: dict = {}
    for variant in VARIANTS:
        for folder in sorted(out.glob(f'{variant}-seed*')):
            run = Run(variant, int(folder.name.rpartition('seed')[2]), out)
            if run.is_finished:
                found.setdefault(variant, {})[run.seed] = run.log()
    return found


def table(found: dict) -> str:
    """Returns the results of the last epoch as a Markdown table.

    A cell has the mean and the standard deviation (n - 1) over the seeds.

    Args:
        found (dict): Of :func:`collect`.
    """
    lines = [
        '| | variant | seeds | top-1, % | training loss | validation loss |',
        '|---|---|---|---|---|---|',
    ]
    for name, logs in found.items():
        last = [log[-1] for log in logs.values()]
        cells = (
            _mean(100 * entry['validation/main/accuracy'] for entry in last),
            _mean((entry['main/loss'] for entry in last), '.3f'),
            _mean((entry['validation/main/loss'] for entry in last), '.3f'),
        )
        lines.append(f'| {name} | {VARIANTS[name][0]} | {len(logs)} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def _mean(values, form='.2f') -> str:
    values = list(values)
    deviation = f' +- {statistics.stdev(values):{form}}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{form}}{deviation}'


def main():
    parser = Parser(
        prog='./run_mpi.sh miniature',
        description=__doc__,
        epilog='variants:\n' + '\n'.join(f'  {n:3} {t}: {o}' for n, (t, o) in VARIANTS.items()),
    )
    add = parser.add_argument
    add(
        '--images',
        type=Path,
        metavar='FOLDER',
        help='CIFAR-10 as FOLDER/train/CLASS/* and FOLDER/val/CLASS/*; needed unless --table-only',
    )
    add(
        '--out',
        type=Path,
        default=Path('results/miniature'),
        metavar='FOLDER',
        help='write the runs, the table and the plot to FOLDER [%(default)s]',
    )
    add(
        '--seeds',
        type=int,
        default=3,
        metavar='N',
        help='train each variant N times, with the seeds 0 to N - 1 [%(default)s]',
    )
    add(
        '--train-per-class',
        type=int,
        default=1000,
        metavar='N',
        help='train on the first N images of each class [%(default)s]',
    )
    add(
        '--val-per-class',
        type=int,
        default=400,
        metavar='N',
        help='validate on the first N images of each class [%(default)s]',
    )
    add(
        '--at-a-time',
        type=int,
        default=os.cpu_count(),
        metavar='N',
        help='train N runs at the same time [one per core: %(default)s]',
    )
    add(
        '--table-only',
        action='store_true',
        help='train nothing; make the table and the plot from the finished runs in --out',
    )
    options = parser.parse_args()
    try:
        study(parser, options)
    except OSError as error:
        parser.refuse(reason(error))


def study(parser, options):
    """Trains all variants, unless ``--table-only`` is given. Writes and prints their results."""
    out = options.out
    if not options.table_only:
        if options.images is None:
            parser.refuse('--images FOLDER is needed: CIFAR-10 as train/CLASS/* and val/CLASS/*')
        for name in ('seeds', 'train_per_class', 'val_per_class', 'at_a_time'):
            value = getattr(options, name)
            if value < 1:
                parser.refuse(f'--{name.replace("_", "-")} must be at least 1, not {value}')
        per_class = {'train': options.train_per_class, 'val': options.val_per_class}
        link(first_images(options.images, per_class), out)
        runs = [Run(name, seed, out) for seed in range(options.seeds) for name in VARIANTS]
        commands = [shlex.join(['python', *run.command]) for run in runs]
        (out / 'commands.txt').write_text('\n'.join(commands) + '\n')
        try:
            train_all(runs, options.at_a_time)
        except KeyboardInterrupt:
            sys.exit('stopped: the same command continues')
    found = collect(out)
    if not found:
        sys.exit(f'error: {out} has no finished run: train first, or name another --out')
    (out / 'table.md').write_text(table(found) + '\n')
    figures.runs({VARIANTS[n][0]: list(logs.values()) for n, logs in found.items()}, str(out))
    print(table(found))
    print(f'results in {out}')


if __name__ == '__main__':
    main()
