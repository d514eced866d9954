"""Measures an iteration by number of workers: the paper's figure of scaling, on your machine.

./run_mpi.sh benchmark iteration --workers 1,2,4
    a slim ResNet-50 on small images that are made; one worker a process, started with mpiexec
./run_mpi.sh benchmark iteration --workers 1,2 --peer chainermn
    the same model and images by ChainerMN's own way too, in turn with ours in the same processes
./run_mpi.sh benchmark iteration --workers 8,16,...,1024 --hostfile hostfiles/mn1 \\
    --width 64 --image-size 224 --local-batch-size 32 --image-root TRAIN --loader processes:2
    the paper's, on a cluster

Iterations come in rounds: each is an epoch of --iterations, with the BN statistics and a validation
of one minibatch a rank at its end, on both sides; the validation is in no iteration. The table has
means over the ranks, and over the half of the rounds whose iterations are nearest the median, so
that the parts sum to the iteration, which the host's clock has measured on its own.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np

from reproduce import listing, loader
from reproduce.job.command_line import Parser
from reproduce.job.plots import plt, save
from reproduce.studies.speed.side_by_side import start_ranks

_PARTS = ('data', 'compute', 'pack', 'allreduce', 'update', 'extensions')
_COLUMNS = (*_PARTS, 'iteration', 'validation')  # of the seconds that a rank reports
_TITLES = {'compute': 'forward + backward', 'allreduce': 'all-reduce'}
_SETTINGS = ('width', 'stem', 'image_size', 'local_batch_size', 'allreduce_grad_dtype')


def parse(argv):
    parser = Parser(prog='./run_mpi.sh benchmark iteration', description=__doc__)
    add = parser.add_argument
    add('name', choices=('iteration',))
    add('--workers', default='1,2', help='numbers of workers, one a process each [1,2]')
    add('--hostfile', metavar='FILE', help='who runs where, as mpiexec takes it')
    add('--image-root', metavar='FOLDER', help='CLASS/FILE [JPEG files that are made]')
    add('--image-size', type=int, default=32, help='pixels [32]')
    add(
        '--width',
        type=int,
        default=16,
        help="channels after the first convolution; 64: the paper's [16]",
    )
    add('--stem', default='imagenet', choices=('imagenet', 'cifar'), help='first layers [imagenet]')
    add('--local-batch-size', type=int, default=16, help='images of a worker [16]')
    add(
        '--allreduce-grad-dtype',
        default='float16',
        choices=('float16', 'float32', 'float64'),
        help='on the wire [float16]',
    )
    add('--iterations', type=int, default=8, help='of a round [8]')
    add('--repeat', type=int, default=9, help='rounds that count [9]')
    add('--loader', default='processes:1', help='processes:N, threads:N or serial [processes:1]')
    add('--peer', choices=('chainermn',), help='what is measured beside ours; ours in float32, too')
    add('--compare', metavar='FILE', help='iteration.json of an earlier call, put in the plot')
    add('--out', default='results/iteration', help='folder [results/iteration]')
    options = parser.parse_args(argv)
    try:
        options.workers = sorted({int(n) for n in options.workers.split(',')})
    except ValueError:
        options.workers = [0]
    numbers = (*options.workers, options.image_size, options.width, options.local_batch_size)
    if min(*numbers, options.iterations, options.repeat) < 1:
        parser.error('all numbers, those of --workers too, must be integers above 0')
    try:
        check(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def check(options):
    """Raises ValueError or OSError, with the reason, where the runs could not end well."""
    try:
        loader.parse(options.loader)
    except ValueError as error:
        raise ValueError(f'--loader is {error}') from error
    if options.hostfile:
        Path(options.hostfile).read_text()
    total = max(options.workers) * options.local_batch_size
    if options.image_root:
        try:
            n_images = len(listing.list_images(options.image_root))
        except listing.DataError as error:
            raise ValueError(str(error)) from error
        if n_images < total:
            raise ValueError(
                f'{max(options.workers)} workers x {options.local_batch_size} images = {total} are '
                f'more than the {n_images} in {options.image_root}'
            )
    if options.compare:
        earlier_runs(options.compare)
    Path(options.out).mkdir(parents=True, exist_ok=True)


def earlier_runs(path) -> dict:
    """What was written by an earlier call.

    Raises:
        ValueError: It is something else.
    """
    try:
        content = json.loads(Path(path).read_text())
        for run in content['figures']['runs']:
            float(run['workers'] * run['iteration'] * run['allreduce'])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'--compare {path} is not an iteration.json') from error
    return content


def measure(options, n) -> dict:
    """One mpiexec; what rank 0 has written."""
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        result = Path(folder).resolve() / 'result.json'
        for_ranks = {**vars(options), 'result': str(result)}
        if options.image_root:
            for_ranks['image_root'] = os.path.abspath(options.image_root)
        print(f'{n} worker{"s" * (n > 1)}', flush=True)
        try:
            status = start_ranks(
                n,
                [json.dumps(for_ranks)],
                'reproduce.studies.speed.iteration_program',
                options.hostfile,
            ).returncode
        except OSError as error:
            print(f'error: mpiexec: {error.strerror}', file=sys.stderr)
            status = 2
        if status:
            sys.exit(status)
        return json.loads(result.read_text())


def middle_half(rounds) -> dict:
    """Column to seconds: the mean over the rounds whose iterations are nearest the median."""
    rounds = np.asarray(rounds)
    order = np.argsort(rounds[:, _COLUMNS.index('iteration')])
    quarter = len(order) // 4
    means = rounds[order[quarter : len(order) - quarter]].mean(axis=0)
    return dict(zip(_COLUMNS, means.tolist()))


def add_efficiencies(runs):
    """Adds ``efficiency_one_worker`` and ``efficiency_one_host``: the time of an iteration of one
    worker, and of as many as were measured on one host, over that of the run: each worker has the
    same work. None where there is nothing to compare with."""
    one_worker = next((run for run in runs if run['workers'] == 1), None)
    on_one_host = max(
        (run for run in runs if run['hosts'] == 1), key=lambda run: run['workers'], default=None
    )
    for run in runs:
        for name, base in (('one_worker', one_worker), ('one_host', on_one_host)):
            compared = base and base['workers'] <= run['workers']
            efficiency = base['iteration'] / run['iteration'] if compared else None
            run[f'efficiency_{name}'] = efficiency


def runs_of(results, position, options) -> list:
    """The entries of one of the systems, in the order of the workers."""
    runs = []
    for result in results:
        seconds = middle_half(list(result['seconds'].values())[position])
        total = result['processes'] * options.local_batch_size
        runs.append(
            {
                'workers': result['processes'],
                'processes': result['processes'],
                'hosts': result['hosts'],
                'cores_of_a_host': result['cores_of_a_host'],
                **seconds,
                'images_per_second': total / seconds['iteration'],
                'parts_by_iteration': sum(seconds[p] for p in _PARTS) / seconds['iteration'],
            }
        )
    add_efficiencies(runs)
    return runs


def _title(column):
    return _TITLES.get(column, column)


def print_table(name, runs):
    columns = ('iteration', *_PARTS)
    print(f'\n{name}; milliseconds, means over the ranks')
    heads = ''.join(f'{_title(column):>{max(len(_title(column)), 8) + 2}}' for column in columns)
    print(f'workers  hosts{heads}  images/s  of 1 worker  of 1 host')
    shared = False
    for run in runs:
        crowded = run['processes'] > run['hosts'] * run['cores_of_a_host']
        shared |= crowded
        cells = ''.join(
            f'{1000 * run[column]:{max(len(_title(column)), 8) + 2},.1f}' for column in columns
        )
        efficiencies = ''.join(
            f'{"-" if value is None else format(value, ".0%"):>{width}}'
            for value, width in (
                (run['efficiency_one_worker'], 13),
                (run['efficiency_one_host'], 11),
            )
        )
        print(
            f'{run["workers"]:6}{"*" if crowded else " "}{run["hosts"]:7}{cells}'
            f'{run["images_per_second"]:10,.0f}{efficiencies}'
        )
    if shared:
        print(f'* shares cores: a host has {runs[0]["cores_of_a_host"]}')
    off = max(abs(run['parts_by_iteration'] - 1) for run in runs)
    print(f'the parts sum to the iteration within {off:.1%}')


def compare_with_peer(result) -> dict:
    """Prints ours beside the peer's, which is the last: medians over the rounds.

    Returns:
        dict: Name of ours to row to ours / the peer's.
    """
    *ours, peer = result['seconds']
    rows = {}
    for name, rounds in result['seconds'].items():
        values = dict(zip(_COLUMNS, np.transpose(rounds)))
        # What the host's clock has, so that nothing is left out.
        values['all but forward + backward'] = values['iteration'] - values['compute']
        rows[name] = {_title(row): float(np.median(v)) for row, v in values.items()}
    n, n_rounds = result['processes'], len(result['seconds'][peer])
    print(f'\n{n} worker{"s" * (n > 1)}, ms, medians of {n_rounds} rounds, in turn')
    print(f'{"":28}' + ''.join(f'{name:>20}' for name in rows) + '   ours / it')
    ratios: dict = {name: {} for name in ours}
    for row in rows[peer]:
        for name in ours:
            ratios[name][row] = rows[name][row] / rows[peer][row] if rows[peer][row] else None
        cells = ''.join(f'{1000 * rows[name][row]:20.2f}' for name in rows)
        text = ', '.join('-' if r[row] is None else f'{r[row]:.2f}' for r in ratios.values())
        print(f'{row:28}{cells}   {text}')
    return ratios


def main(argv):
    options = parse(argv)
    results = [measure(options, n) for n in options.workers]
    names = list(results[0]['seconds'])
    runs = {name: runs_of(results, i, options) for i, name in enumerate(names)}
    print(
        f'\nResNet-50, width {options.width}, {results[0]["parameters"]:,} parameters; '
        f'{options.local_batch_size} images of {options.image_size} pixels a worker'
    )
    for name in names:
        print_table(name, runs[name])
    figures_: dict = {'runs': runs[names[0]]}
    if options.peer:
        ratios = {result['processes']: compare_with_peer(result) for result in results}
        figures_.update(peer=runs[names[-1]], all_of_ours=runs, ours_by_peer=ratios)
    content = {
        'benchmark': 'iteration',
        'machine': platform.platform(),
        'python': platform.python_version(),
        'numpy': np.__version__,
        'settings': {name: getattr(options, name) for name in _SETTINGS},
        'figures': figures_,
    }
    out = Path(options.out)
    (out / 'iteration.json').write_text(json.dumps(content, indent=2) + '\n')
    compare_in_plot(options, runs, names)
    print(f'\ntable, iteration.json and iteration.png in {out}')


def compare_in_plot(options, runs, names):
    lines = {'ours': runs[names[0]]}
    if options.peer:
        lines['ChainerMN'] = runs[names[-1]]
    if options.compare:
        earlier = earlier_runs(options.compare)
        settings = earlier.get('settings', {})
        for name in _SETTINGS:
            if settings.get(name) != getattr(options, name):
                print(
                    f'note: {options.compare} has {name} {settings.get(name)}, this call '
                    f'{getattr(options, name)}'
                )
        lines[options.compare] = earlier['figures']['runs']
    plot(lines, options.out)


def plot(runs: dict, out: str):
    """Draws OUT/iteration.png: iteration and all-reduce by number of workers, and the efficiency.

    Args:
        runs (dict): Name to the entries of ``iteration.json``; three at most.
        out (str): Folder; the file is replaced as a whole.
    """
    workers = sorted({run['workers'] for entries in runs.values() for run in entries})
    figure, (times, efficiencies) = plt.subplots(1, 2, figsize=(9, 4), constrained_layout=True)
    for (name, entries), marker, color in zip(runs.items(), 'os^', ('k', '0.45', '0.65')):
        n = [run['workers'] for run in entries]
        for key, title, style in (
            ('iteration', 'iteration', '-'),
            ('allreduce', 'all-reduce', ':'),
        ):
            milliseconds = [1000 * run[key] for run in entries]
            times.plot(n, milliseconds, marker + style, color=color, label=f'{title}, {name}')
        for key, title, style in (
            ('efficiency_one_worker', 'of one worker', '-'),
            ('efficiency_one_host', 'of one host', '--'),
        ):
            found = [(run['workers'], 100 * run[key]) for run in entries if run.get(key)]
            if len(found) > 1:
                efficiencies.plot(
                    *zip(*found), marker + style, color=color, label=f'{title}, {name}'
                )
    times.set_title('milliseconds')
    efficiencies.set_title('scaling efficiency (%)')
    efficiencies.axhline(100, color='k', lw=0.5)
    for axis in (times, efficiencies):
        axis.set_xscale('log')
        axis.set_xlabel('workers n')
        axis.set_xticks(workers, [f'{n:,}' for n in workers])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize='small')
        else:
            axis.set_xlim(times.get_xlim())
            axis.text(0.5, 0.5, 'no one worker or one host', ha='center', transform=axis.transAxes)
    save(figure, os.path.join(out, 'iteration.png'))
