"""The paper in miniature: which of its parts matters, by training a small network on CIFAR-10.

    python -m reproduce.miniature --images CIFAR10

CIFAR10 is a folder with train/CLASS/* and val/CLASS/*. The same network is trained for the same
epochs on the same images in every variant, with several seeds: one process for each run, that plays
all its workers in turn, as many runs at a time as there are cores. Stopped with Ctrl-C, the same
command goes on. A table, a plot and the log of every run come to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reproduce import figures, report

COMMON = (
    '--preset cifar10 --width 8 --stem imagenet --epochs 10 --loader serial '
    '--validation-batch-size 100 --keep-checkpoints 1 --communicator mpi'
)
_LARGE = '--workers 32'  # x 32 images = 1,024
VARIANTS = {
    'a': ('small batch, SGD', '--workers 2 --lr-schedule steps --alpha-form sgd --bn-decay 0.9'),
    'b': ('large batch, SGD', f'{_LARGE} --lr-schedule steps --alpha-form sgd'),
    'c': ('large, gradual warm-up', f'{_LARGE} --lr-schedule gradual_warmup --alpha-form sgd'),
    'd': ('large, the paper, printed', f'{_LARGE} --alpha-form printed'),
    'dc': ('large, the paper, continuous', f'{_LARGE} --alpha-form continuous'),
    'e': ('d with BN moving averages', f'{_LARGE} --alpha-form printed --bn-decay 0.9'),
    'f': (
        'd with float32 all-reduce',
        f'{_LARGE} --alpha-form printed --allreduce-grad-dtype float32',
    ),
}
_KEPT = ('log', 'settings.json', 'summary.json')
_THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


def subset(images: Path, out: Path, per_class: dict):
    """Makes OUT/{train,val}/CLASS of links to the first images of each class.

    Args:
        images (Path): The folder with ``train`` and ``val``.
        out (Path): The folder that is made.
        per_class (dict): ``train`` and ``val`` to a number of images.

    Raises:
        SystemExit: There is no such folder, or a class has too few images.
    """
    for split, n in per_class.items():
        folder = images / split
        classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if not classes:
            sys.exit(f'error: {folder} has no class folders; --images needs train/CLASS, val/CLASS')
        for source in classes:
            files = sorted(source.iterdir())[:n]
            if len(files) < n:
                sys.exit(f'error: {source} has {len(files)} images, {n} are wanted of each class')
            target = out / split / source.name
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                link = target / file.name
                if not link.is_symlink():
                    link.symlink_to(file.resolve())


def command_of(name: str, seed: int, out: Path) -> list:
    """The command of a run, which goes on where it was stopped."""
    data = out / 'images'
    where = f'--train-root {data / "train"} --val-root {data / "val"} --manifests {data}'
    options = f'{COMMON} {VARIANTS[name][1]} --seed {seed} --resume auto'
    run = f'--out {folder_of(name, seed, out)}'
    return ['reproduce/train.py', *options.split(), *shlex.split(where), *shlex.split(run)]


def folder_of(name, seed, out) -> Path:
    return out / f'{name}-seed{seed}'


def epochs_done(folder: Path) -> int:
    try:
        return len(json.loads((folder / 'log').read_text()))
    except (OSError, ValueError):
        return 0


def train_all(runs: list, out: Path, n_at_a_time: int, n_epochs: int):
    """Trains what is not finished; prints a line when a run ends, and every minute.

    Raises:
        SystemExit: A run failed; its output is named.
    """
    waiting = [run for run in runs if not (folder_of(*run, out) / 'summary.json').exists()]
    print(f'{len(runs) - len(waiting)} of {len(runs)} runs are finished', flush=True)
    folders = [folder_of(*run, out) for run in runs]
    start, before = time.monotonic(), sum(map(epochs_done, folders))
    last, running = start, {}
    try:
        while waiting or running:
            while waiting and len(running) < n_at_a_time:
                run = waiting.pop(0)
                running[run] = _start(run, out)
            time.sleep(1)
            ended = [run for run, process in running.items() if process.poll() is not None]
            for run in ended:
                status = running.pop(run).returncode
                if status:
                    output = folder_of(*run, out) / 'output.txt'
                    sys.exit(f'error: {output} ended with status {status}: see there')
            if ended or time.monotonic() > last + 60:
                last = time.monotonic()
                done, total = sum(map(epochs_done, folders)), n_epochs * len(runs)
                left = ''
                if done > before:
                    seconds = (last - start) / (done - before) * (total - done)
                    left = f', {report.duration(seconds)} left'
                names = ', '.join('{}-seed{}'.format(*run) for run in ended)
                print(
                    f'{done:,} of {total:,} epochs{left}' + (f'; finished {names}' * bool(ended)),
                    flush=True,
                )
    finally:
        for process in running.values():
            process.send_signal(signal.SIGUSR1)  # a checkpoint, and the end
        for process in running.values():
            process.wait()


def _start(run, out):
    folder = folder_of(*run, out)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**dict.fromkeys(_THREADS, '1'), **os.environ}
    with open(folder / 'output.txt', 'a') as output:
        return subprocess.Popen(
            [sys.executable, *command_of(*run, out)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def collect(out: Path) -> dict:
    """Variant to the logs of its finished runs, by seed; from the folders in ``out``."""
    found: dict = {}
    for name in VARIANTS:
        for folder in sorted(out.glob(f'{name}-seed*')):
            if (folder / 'summary.json').exists():
                seed = int(folder.name.rpartition('seed')[2])
                found.setdefault(name, {})[seed] = json.loads((folder / 'log').read_text())
    return found


def table(found: dict) -> str:
    """Means and standard deviations (n - 1) over the seeds, of the last epoch, in Markdown."""
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
    parser = argparse.ArgumentParser(
        prog='python -m reproduce.miniature',
        description=__doc__,
        epilog='variants:\n' + '\n'.join(f'  {n:3} {t}: {o}' for n, (t, o) in VARIANTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--images', type=Path, metavar='FOLDER', help='CIFAR-10, as a folder')
    parser.add_argument('--out', type=Path, default=Path('results/miniature'), metavar='FOLDER')
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help='how many [3]')
    parser.add_argument('--train-per-class', type=int, default=1000, metavar='N', help='[1000]')
    parser.add_argument('--val-per-class', type=int, default=400, metavar='N', help='[400]')
    parser.add_argument(
        '--at-a-time', type=int, default=os.cpu_count(), metavar='N', help='runs [one a core]'
    )
    parser.add_argument(
        '--table-only', action='store_true', help='table and plot of the finished runs in --out'
    )
    options = parser.parse_args()
    out = options.out
    if not options.table_only:
        if options.images is None:
            parser.error('--images FOLDER is needed: CIFAR-10 as train/CLASS/* and val/CLASS/*')
        if min(options.seeds, options.train_per_class, options.val_per_class) < 1:
            parser.error('--seeds, --train-per-class and --val-per-class must be at least 1')
        subset(
            options.images,
            out / 'images',
            {'train': options.train_per_class, 'val': options.val_per_class},
        )
        runs = [(name, seed) for seed in range(options.seeds) for name in VARIANTS]
        commands = [shlex.join(['python', *command_of(*run, out)]) for run in runs]
        (out / 'commands.txt').write_text('\n'.join(commands) + '\n')
        n_epochs = int(COMMON.partition('--epochs ')[2].split()[0])
        train_all(runs, out, max(1, options.at_a_time), n_epochs)
    found = collect(out)
    if not found:
        sys.exit(f'error: {out} has no finished run')
    (out / 'table.md').write_text(table(found) + '\n')
    figures.runs({VARIANTS[n][0]: list(logs.values()) for n, logs in found.items()}, str(out))
    print(table(found))
    print(f'results in {out}')


if __name__ == '__main__':
    main()
