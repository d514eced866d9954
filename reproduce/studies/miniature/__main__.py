"""Which parts of the paper's recipe matter? Trains a small network on CIFAR-10, part by part.

./run_mpi.sh miniature --images CIFAR10

CIFAR10 is a folder with train/CLASS/* and val/CLASS/*. The variants train the same network for
the same epochs on the same images, with several seeds. A run is one process, which plays all
workers of the variant one after the other. As many runs train at a time as there are cores. The
main variants come first, then one seed of all others, then the next. At last, four of the main
variants are trained with a second network, whose small batch reaches 80 %. Runs that the project
includes (reproduce/results/miniature) are taken from there, and not trained again.

Ctrl-C, or SIGTERM, stops the runs, each with a checkpoint. The same command continues them. The
folder --out gets tables (table.md), plots (runs.png, start.png) and the log of every run.

--check RUN trains a run of the results anew, and compares its bits with theirs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from reproduce.job import BLAS_THREADS, report
from reproduce.job.command_line import Parser, reason
from reproduce.studies import figures
from reproduce.studies.miniature import tables, variants

INCLUDED = Path(__file__).parents[2] / 'results' / 'miniature'
FILES = ('log', 'settings.json', 'summary.json', 'run.json')  # of a run, that are kept
PROGRAM = 'reproduce.studies.miniature.program'


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
    again: bool = False  # in OUT/check, to compare it with the run in OUT

    @property
    def name(self) -> str:
        return f'{self.variant}-seed{self.seed}'

    @property
    def folder(self) -> Path:
        return self.out / 'check' / self.name if self.again else self.out / self.name

    @property
    def is_finished(self) -> bool:
        return all((self.folder / name).exists() for name in FILES)

    @property
    def command(self) -> list[str]:
        """The words after ``python``. The command continues a run that was stopped."""
        words, data = variants.VARIANTS[self.variant].words, self.out / 'images'
        roots = '--train-root', data / 'train', '--val-root', data / 'val'
        where = *roots, '--manifests', data, '--out', self.folder
        seed = '--seed', self.seed, '--resume', 'auto'
        return ['-I', '-m', PROGRAM, *words, *map(str, (*seed, *where))]

    def log(self) -> list:
        """Returns Chainer's log, an entry per epoch. It is empty before the first epoch ends."""
        try:
            return json.loads((self.folder / 'log').read_text())
        except (OSError, ValueError):
            return []

    def read(self, name) -> dict:
        return json.loads((self.folder / name).read_text())

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of a run that was killed before run.json: its last checkpoint gives both again.
        (self.folder / 'summary.json').unlink(missing_ok=True)
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
        done = self._epochs()
        total = sum(variants.VARIANTS[run.variant].regime.epochs for run in self._runs)
        line = f'{done:,} of {total:,} epochs'
        if done > self._before:
            seconds = (now - self._start) / (done - self._before) * (total - done)
            line += f', {report.duration(seconds)} left'
        print('; '.join([line, *(f'{run.name} is finished' for run in ended)]), flush=True)


def plan(out: Path, n_seeds: int) -> list[Run]:
    """Returns all runs, in the order in which they are trained: the main variants come first."""
    return [
        Run(name, seed, out)
        for group in variants.GROUPS
        for seed in range(n_seeds)
        for name in group
    ]


def take_included(runs: list[Run], included: Path):
    """Copies the finished runs of the folder ``included`` that ``out`` lacks.

    Raises:
        SystemExit: An included run had other settings than the variant has now.
    """
    for run in runs:
        kept = dataclasses.replace(run, out=included)
        if kept.folder == run.folder or not kept.is_finished or run.folder.exists():
            continue
        differing = _differing(kept)
        if differing:
            sys.exit(
                f'error: {kept.folder} was trained with other settings ({", ".join(differing)}): '
                'give --afresh to train all runs here'
            )
        copy(kept, run)


def _differing(run: Run) -> list[str]:
    """Returns the settings in which a finished run differs from its variant, with the part."""
    from reproduce.job.options import parse  # imports Chainer, which takes a second

    part = variants.VARIANTS[run.variant].part
    words = variants.VARIANTS[run.variant].words[2 if part else 0 :]
    expected, _ = parse([*words, '--seed', str(run.seed)], 1)
    found = run.read('settings.json')
    names = [
        name
        for name, value in expected.identity.items()
        if name != 'functions' and found.get(name) != value
    ]
    return names + ['part'] * (run.read('run.json')['part'] != part)


def copy(run: Run, to: Run):
    """Copies the small files of a finished run to the folder of another.

    The main variants' first seed has its model, too, for --evaluate. The second network's models
    have 5 MB, and stay behind.
    """
    to.folder.mkdir(parents=True, exist_ok=True)
    names = [*FILES]
    if run.seed == 0 and run.variant in variants.MAIN and (run.folder / 'model.npz').exists():
        names.append('model.npz')
    for name in names:
        shutil.copyfile(run.folder / name, to.folder / name)


def collect(out: Path) -> dict:
    """Finds all finished runs in the folder ``out``.

    Returns:
        dict: Variant, then seed, to the Run.
    """
    found: dict = {}
    for variant in variants.VARIANTS:
        for folder in out.glob(f'{variant}-seed*'):
            run = Run(variant, int(folder.name.rpartition('seed')[2]), out)
            if run.is_finished:
                found.setdefault(variant, {})[run.seed] = run
        if variant in found:
            found[variant] = dict(sorted(found[variant].items()))
    return found


def write_results(found: dict, out: Path) -> str:
    """Writes the tables and the plots of finished runs.

    Args:
        found (dict): Of :func:`collect`.
        out (Path): The folder.

    Returns:
        str: The tables.
    """
    logs = {v: {seed: run.log() for seed, run in runs.items()} for v, runs in found.items()}
    first = {
        v: {seed: run.read('run.json')['first losses'] for seed, run in runs.items()}
        for v, runs in found.items()
    }
    text = tables.all_tables(logs, first)
    (out / 'table.md').write_text(text + '\n')
    for group, folder in ((variants.MAIN, out), (variants.MAIN_AGAIN, out / 'resnet10')):
        titles = {v: variants.VARIANTS[v].title for v in group if v in logs}
        if titles:
            folder.mkdir(exist_ok=True)
            figures.runs({titles[v]: list(logs[v].values()) for v in titles}, str(folder))
            figures.first_losses({titles[v]: list(first[v].values()) for v in titles}, str(folder))
    return text


def check(names: list[str], found: dict, out: Path, at_a_time: int):
    """Trains runs anew, and compares digests of their results with those in ``out``.

    Args:
        names (list of str): The runs, such as ``d-seed0``.
        found (dict): Of :func:`collect`.
        out (Path): The folder of the study, which has the images, too.
        at_a_time (int): Runs that train at the same time.

    Raises:
        SystemExit: There is no such run, or the bits differ.
    """
    runs = {run.name: run for seeds in found.values() for run in seeds.values()}
    unknown = [name for name in names if name not in runs]
    if unknown:
        sys.exit(f'error: {out} has no finished run {unknown[0]}: --check names runs that it has')
    again = [dataclasses.replace(runs[name], again=True) for name in names]
    train_all(again, at_a_time)
    same = True
    for run in again:
        ours, theirs = (r.read('run.json') for r in (run, runs[run.name]))
        differing = [name for name in theirs if ours[name] != theirs[name]]
        same = same and not differing
        shutil.rmtree(run.folder)  # a further check trains anew
        print(f'{run.name}: {"other " + ", ".join(differing) if differing else "the same bits"}')
    sys.exit(0 if same else 1)


def main():
    parser = Parser(
        prog='./run_mpi.sh miniature',
        description=__doc__,
        epilog='variants:\n'
        + '\n'.join(
            f'  {name:4} {v.title}: {v.options} {v.part and "and " + v.part}'.rstrip()
            for name, v in variants.VARIANTS.items()
        ),
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
        default=variants.N_SEEDS,
        metavar='N',
        help='train each variant N times, with the seeds 0 to N - 1 [%(default)s]',
    )
    add(
        '--train-per-class',
        type=int,
        default=5000,
        metavar='N',
        help='train on the first N images of each class [%(default)s]',
    )
    add(
        '--val-per-class',
        type=int,
        default=1000,
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
        '--afresh',
        action='store_true',
        help='train all runs here, also those that the project includes',
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        '--table-only',
        action='store_true',
        help='train nothing; make the tables and the plots from the finished runs in --out',
    )
    actions.add_argument(
        '--check',
        nargs='+',
        metavar='RUN',
        help='train these runs of --out anew, such as d-seed0, and compare their bits',
    )
    actions.add_argument(
        '--publish',
        type=Path,
        metavar='FOLDER',
        help='copy the finished runs of --out to FOLDER, without checkpoints and models, and make '
        'the tables and the plots there',
    )
    options = parser.parse_args()
    # Also where a shell has started the study in the background, with SIGINT ignored.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    try:
        study(parser, options)
    except OSError as error:
        parser.refuse(reason(error))


def study(parser, options):
    """Trains all variants, or what the options ask for. Writes and prints the results."""
    out = options.out
    if options.table_only or options.publish:
        report_on(out, options.publish)
        return
    if options.images is None:
        parser.refuse('--images FOLDER is needed: CIFAR-10 as train/CLASS/* and val/CLASS/*')
    for name in ('seeds', 'train_per_class', 'val_per_class', 'at_a_time'):
        value = getattr(options, name)
        if value < 1:
            parser.refuse(f'--{name.replace("_", "-")} must be at least 1, not {value}')
    per_class = {'train': options.train_per_class, 'val': options.val_per_class}
    link(first_images(options.images, per_class), out)
    runs = plan(out, options.seeds)
    if not options.afresh:
        take_included(runs, INCLUDED)
    try:
        if options.check:
            check(options.check, collect(out), out, options.at_a_time)
        write_commands(runs, out)
        train_all(runs, options.at_a_time)
    except KeyboardInterrupt:
        sys.exit('stopped: the same command continues')
    report_on(out)


def write_commands(runs, out: Path):
    commands = [shlex.join(['python', *run.command]) for run in runs]
    (out / 'commands.txt').write_text('\n'.join(commands) + '\n')


def report_on(out: Path, publish: Path | None = None):
    """Makes tables and plots of the finished runs in ``out``; with ``publish``, of copies there."""
    found = collect(out)
    if not found:
        sys.exit(f'error: {out} has no finished run: train first, or name another --out')
    if publish:
        for runs in found.values():
            for run in runs.values():
                copy(run, dataclasses.replace(run, out=publish))
        if (out / 'commands.txt').exists():
            shutil.copyfile(out / 'commands.txt', publish / 'commands.txt')
        out, found = publish, collect(publish)
    print(write_results(found, out))
    print(f'results in {out}')


if __name__ == '__main__':
    main()
