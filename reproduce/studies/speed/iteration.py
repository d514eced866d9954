"""How does an iteration scale with the number of workers? The paper's figure, on your machine.

./run_mpi.sh benchmark iteration --workers 1,2,4
    A slim ResNet-50 trains on small images that the program makes. mpiexec starts one process per
    worker.
./run_mpi.sh benchmark iteration --workers 1,2 --peer chainermn
    ChainerMN's own way trains the same model on the same images. It takes turns with ours, in the
    same processes.
./run_mpi.sh benchmark iteration --workers 8,64,1024 --hostfile hostfiles/mn1 \\
    --width 64 --image-size 224 --local-batch-size 32 --image-root TRAIN --loader processes:2
    The paper's model, on a cluster.

A round is an epoch of as many iterations as --iterations sets. Both systems end a round with the BN
statistics and a validation of one minibatch per rank. The time of an iteration excludes the
validation. The table has means over the ranks, and over the half of the rounds whose iterations are
nearest the median. The parts sum to the iteration. The host's clock measures the iteration
separately.
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
from reproduce.job.command_line import Parser, reason
from reproduce.job.plots import plt, save
from reproduce.studies.speed.side_by_side import start_ranks

_PARTS = ('data', 'compute', 'pack', 'allreduce', 'update', 'extensions')
_COLUMNS = (*_PARTS, 'iteration', 'validation')  # of a rank's seconds
_TITLES = {'compute': 'forward + backward', 'allreduce': 'all-reduce'}
_SETTINGS = (
    *('width', 'stem', 'image_size', 'local_batch_size'),
    *('functions', 'allreduce_grad_dtype'),
)


def parse(argv):
    parser = Parser(prog='./run_mpi.sh benchmark iteration', description=__doc__)
    add = parser.add_argument
    add(
        '--workers',
        default='1,2',
        metavar='N,N',
        help='measure each of these numbers of workers, one worker per process [%(default)s]',
    )
    add('--hostfile', metavar='FILE', help="hosts, in mpiexec's format [this host]")
    add(
        '--image-root',
        metavar='FOLDER',
        help='train on the images FOLDER/CLASS/FILE [JPEG files that the program makes]',
    )
    add(
        '--image-size',
        type=int,
        default=32,
        metavar='N',
        help="image side, in pixels; the paper's is 224 [%(default)s]",
    )
    add(
        '--width',
        type=int,
        default=16,
        metavar='N',
        help="channels of ResNet-50's first convolution; the paper's are 64 [%(default)s]",
    )
    add(
        '--stem',
        default='imagenet',
        choices=('imagenet', 'cifar'),
        help='first layers of the model [%(default)s]',
    )
    add(
        '--local-batch-size',
        type=int,
        default=16,
        metavar='N',
        help="images per worker and iteration; the paper's are 32 [%(default)s]",
    )
    add(
        '--functions',
        default='auto',
        choices=('auto', 'compiled', 'numpy', 'chainer', 'torch'),
        help="implementation of the model's functions, for all that are measured [%(default)s]",
    )
    add(
        '--allreduce-grad-dtype',
        default='float16',
        choices=('float16', 'float32', 'float64'),
        help='type of the gradients in the all-reduce [%(default)s]',
    )
    add('--iterations', type=int, default=8, metavar='N', help='iterations per round [%(default)s]')
    add(
        '--repeat',
        type=int,
        default=9,
        metavar='N',
        help='time N rounds, after one that does not count [%(default)s]',
    )
    add(
        '--loader',
        default='processes:1',
        metavar='HOW',
        help='decode the images of a rank with N processes (processes:N), with N threads '
        '(threads:N), or in the rank itself (serial) [%(default)s]',
    )
    add(
        '--peer',
        choices=('chainermn',),
        help="also measure ChainerMN's own way, and ours in float32 [only ours]",
    )
    add(
        '--compare',
        metavar='FILE',
        help='add the iteration.json of an earlier call to the plot [none]',
    )
    add(
        '--out',
        default='results/iteration',
        metavar='FOLDER',
        help='write iteration.json and iteration.png to FOLDER [%(default)s]',
    )
    options = parser.parse_args(argv[1:])
    try:
        options.workers = sorted({int(n) for n in options.workers.split(',')})
    except ValueError:
        parser.refuse(f'--workers must be integers, as in 1,2,4, not {options.workers}')
    for name in ('workers', 'image_size', 'width', 'local_batch_size', 'iterations', 'repeat'):
        value = getattr(options, name)
        least = min(value) if name == 'workers' else value
        if least < 1:
            parser.refuse(f'--{name.replace("_", "-")} must be above 0, not {least}')
    try:
        check(options)
    except ValueError as error:
        parser.refuse(error)
    return options


def check(options):
    """Makes the folder ``--out``, and checks that the runs can be made.

    Raises:
        ValueError: The value of an option cannot be used. The message names both.
    """
    try:
        loader.parse(options.loader)
    except ValueError as error:
        raise ValueError(f'--loader is {error}') from error
    if options.hostfile:
        try:
            Path(options.hostfile).read_text()
        except (OSError, ValueError) as error:
            raise ValueError(f'--hostfile {reason(error)}') from error
    total = max(options.workers) * options.local_batch_size
    if options.image_root:
        try:
            n_images = len(listing.list_images(options.image_root))
        except listing.DataError as error:
            raise ValueError(str(error)) from error
        if n_images < total:
            raise ValueError(
                f'{max(options.workers)} workers x {options.local_batch_size} images = {total} are '
                f'more than the {n_images} in {options.image_root}: lower --local-batch-size'
            )
    if options.compare:
        earlier_runs(options.compare)
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'--out {reason(error)}') from error


def earlier_runs(path) -> dict:
    """Returns the content of an earlier call's ``iteration.json``.

    Raises:
        ValueError: The file cannot be read, or has another content.
    """
    try:
        content = json.loads(Path(path).read_text())
        for run in content['figures']['runs']:
            float(run['workers'] * run['iteration'] * run['allreduce'])
    except OSError as error:
        raise ValueError(f'--compare {reason(error)}') from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'--compare {path} is not an iteration.json of this command') from error
    return content


def measure(options, n) -> dict:
    """Starts one job of ``n`` ranks, and returns the result that its rank 0 wrote."""
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        result = Path(folder).resolve() / 'result.json'
        for_ranks = {**vars(options), 'result': str(result)}
        if options.image_root:
            for_ranks['image_root'] = os.path.abspath(options.image_root)
        print(f'{n} worker{"s" * (n > 1)}', flush=True)
        status = start_ranks(
            n,
            [json.dumps(for_ranks)],
            'reproduce.studies.speed.iteration_program',
            options.hostfile,
        ).returncode
        if status:
            sys.exit(status)
        return json.loads(result.read_text())


def middle_half(rounds) -> dict:
    """Averages the half of the rounds whose iterations are nearest the median.

    Args:
        rounds (list): A row of seconds per round, in the order of ``_COLUMNS``.

    Returns:
        dict: Column to mean seconds.
    """
    rounds = np.asarray(rounds)
    order = np.argsort(rounds[:, _COLUMNS.index('iteration')])
    quarter = len(order) // 4
    means = rounds[order[quarter : len(order) - quarter]].mean(axis=0)
    return dict(zip(_COLUMNS, means.tolist()))


def add_efficiencies(runs):
    """Adds ``efficiency_one_worker`` and ``efficiency_one_host`` to each run.

    An efficiency is the iteration time of a base run over the iteration time of this run: every
    worker has the same work. The base is the run of one worker, or the largest run on one host. The
    efficiency is None without a base.
    """
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
    """Returns the entries of one system for ``iteration.json``, in the order of the workers."""
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
    print(f'\n{name}: milliseconds, means over the ranks')
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
        print(f'* ranks share cores: each host has {runs[0]["cores_of_a_host"]}')
    off = max(abs(run['parts_by_iteration'] - 1) for run in runs)
    print(f'the parts sum to the iteration within {off:.1%}')


def compare_with_peer(result) -> dict:
    """Prints medians over the rounds of our systems and of the peer, and the ratios ours / peer.

    Args:
        result (dict): Of :func:`measure`. The peer is the last system.

    Returns:
        dict: Name of our system, then name of the row, to the ratio.
    """
    *ours, peer = result['seconds']
    rows = {}
    for name, rounds in result['seconds'].items():
        values = dict(zip(_COLUMNS, np.transpose(rounds)))
        # By the host's clock, so that nothing is left out.
        values['all but forward + backward'] = values['iteration'] - values['compute']
        rows[name] = {_title(row): float(np.median(v)) for row, v in values.items()}
    n, n_rounds = result['processes'], len(result['seconds'][peer])
    print(f'\n{n} worker{"s" * (n > 1)}, milliseconds, medians of {n_rounds} rounds')
    print(f'{"":28}' + ''.join(f'{name:>20}' for name in rows) + '   ours / peer')
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
    options.functions = results[0]['functions']  # what auto stands for
    names = list(results[0]['seconds'])
    runs = {name: runs_of(results, i, options) for i, name in enumerate(names)}
    print(
        f'\nResNet-50, width {options.width}, {results[0]["parameters"]:,} parameters; '
        f'{options.local_batch_size} images per worker, {options.image_size} pixels wide and high'
    )
    for name in names:
        print_table(name, runs[name])
    figures: dict = {'runs': runs[names[0]]}
    if options.peer:
        ratios = {result['processes']: compare_with_peer(result) for result in results}
        figures.update(peer=runs[names[-1]], all_of_ours=runs, ours_by_peer=ratios)
    content = {
        'benchmark': 'iteration',
        'machine': platform.platform(),
        'python': platform.python_version(),
        'numpy': np.__version__,
        'settings': {name: getattr(options, name) for name in _SETTINGS},
        'figures': figures,
    }
    out = Path(options.out)
    (out / 'iteration.json').write_text(json.dumps(content, indent=2) + '\n')
    draw(options, runs, names)
    print(f'\nresults in {out}: iteration.json, iteration.png')


def draw(options, runs, names):
    """Draws ours, the peer and the earlier call. Prints a note for each setting that differs."""
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
                    f'has {getattr(options, name)}'
                )
        lines[options.compare] = earlier['figures']['runs']
    plot(lines, options.out)


def plot(runs: dict, out: str):
    """Draws OUT/iteration.png: iteration, all-reduce and efficiency by number of workers.

    Args:
        runs (dict): Name to the entries of ``iteration.json``. At most three.
        out (str): The folder. The file is replaced as a whole.
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
            axis.text(0.5, 0.5, 'no base for an efficiency', ha='center', transform=axis.transAxes)
    save(figure, os.path.join(out, 'iteration.png'))
