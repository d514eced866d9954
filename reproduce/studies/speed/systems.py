"""How fast is each system on one platform: ours, ChainerMN's own way, PyTorch?

./run_mpi.sh benchmark systems
    A slim ResNet-50, on two processes.
./run_mpi.sh benchmark systems --network 224px --systems ours,chainermn,twin,torchvision
    The paper's network.
./run_mpi.sh benchmark systems --network 224px --local-batch-size 32 --processes 1
    The same with the paper's minibatch, on one GPU.

All train the same network from the same initial values, on the same images, in the same order, on
the same processes of this machine. A process is a worker, with one thread, or with a GPU. The
images are the digits that come along. The systems are:

ours                 this program, with its default functions
ours-numpy           with NumPy's functions
ours-chainer         with Chainer's
ours-torch           with PyTorch's
chainermn            ChainerMN's own way, with Chainer's functions
chainermn-compiled   the same with our functions in C
twin                 the twin in PyTorch
twin-compiled        the same with its rule by torch.compile, which needs g++
torchvision          the step of torchvision's reference recipe, in our own words

In a round, each system has its turn: a job of its own, which trains --iterations that do not count,
and as many that do. What cannot run here is left out, with the reason. Without PyTorch, that is
four of them: EXTRAS=twin installs it.

Nothing counts before the losses of the first minibatch agree. The columns of the table:

images/s      of all processes together, median of the rounds
+-            half of the distance between the quartiles
x ours        how many times as fast as the first of the systems; median of the rounds
iteration     milliseconds, median of the rounds, as are its parts
all-reduce    with packing. In PyTorch it runs during the backward pass, and is a part of that
rest          the wait for images, normalization, and all between the other parts
MiB           growth of a process by the training, at the most; on GPUs, memory of the device
loss          mean over all processes and the iterations that count
bits          whether the losses of all rounds are the same, bit by bit

On GPUs, each process takes one, and PyTorch's systems use NCCL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from reproduce.job.command_line import Parser, reason
from reproduce.job.countdown import Countdown
from reproduce.job.plots import plt, save
from reproduce.studies.speed.networks import NETWORKS, Network
from reproduce.studies.speed.side_by_side import NO_MPIEXEC, job_of

# Name to its functions, where it has Chainer's.
SYSTEMS = {
    'ours': 'auto',
    'ours-numpy': 'numpy',
    'ours-chainer': 'chainer',
    'ours-torch': 'torch',
    'chainermn': 'chainer',
    'chainermn-compiled': 'compiled',
    'twin': 'auto',
    'twin-compiled': 'auto',
    'torchvision': 'auto',
}
FAMILIES = ('ours', 'chainermn', 'twin', 'torchvision')
# What differs by design, with a column for each family.
DESIGN = {
    'rule': ('RMSprop warm-up', 'momentum SGD', 'RMSprop warm-up', 'momentum SGD'),
    'momentum': ('theta += lr Delta', 'theta += lr v', 'theta += lr Delta', 'theta -= lr v'),
    'learning rate': ('half of 0.1 n b / 256', '0.1 n b / 256') * 2,
    'weight decay': (*['all but gamma and beta'] * 3, 'all'),
    'BN, to validate': (*["last minibatch's, mean of all"] * 3, "rank 0's moving averages"),
    'gradients': ('float16', 'float32 (GPUs: float16)', 'float16', 'float32'),
    'sent as': ('float16', 'the same', 'float64 (GPUs: float16)', 'float32'),
    'mean': ('sum, then / n', 'sum, then / n', 'sum, then / n', '/ n, then sum'),
    'all-reduce': ('after backward, at once', 'after backward, one by one')
    + ('during backward, in buckets',) * 2,
    'otherwise': ('', 'broadcast for first update', '', 'BN broadcast; top-1 and top-5'),
}
# Of the seconds of a turn.
_COLUMNS = ('data', 'compute', 'pack', 'allreduce', 'update', 'between', 'iteration', 'validation')
_PARTS = {
    'forward + backward': 'compute',
    'all-reduce': 'allreduce',
    'update': 'update',
    'rest': 'rest',
}
_LOSS = 1e-4  # relative; the first losses differ by roundings alone


def parse(argv):
    parser = Parser(prog='./run_mpi.sh benchmark systems', description=__doc__)
    add = parser.add_argument
    add(
        '--network',
        default='smoke',
        choices=tuple(NETWORKS),
        help='the network and its minibatch; benchmark functions has the same [%(default)s]',
    )
    add('--local-batch-size', type=int, metavar='N', help="images per process [the network's]")
    add(
        '--systems',
        default=','.join(SYSTEMS),
        metavar='NAME,NAME',
        help='measure these; the others are compared with the first [all]',
    )
    add('--processes', type=int, default=2, metavar='N', help='start N processes [%(default)s]')
    add('--rounds', type=int, default=7, metavar='N', help='turns of each system [%(default)s]')
    add(
        '--iterations',
        type=int,
        default=20,
        metavar='N',
        help='time N iterations per turn, after as many that do not count [%(default)s]',
    )
    add(
        '--out',
        default='results/systems',
        metavar='FOLDER',
        help='write systems.txt, systems.json and systems.png to FOLDER [%(default)s]',
    )
    options = parser.parse_args(argv[1:])
    options.systems = list(dict.fromkeys(options.systems.split(',')))
    for name in options.systems:
        if name not in SYSTEMS:
            parser.refuse(f'--systems has {name!r}, which is none of {", ".join(SYSTEMS)}')
    if options.local_batch_size is None:
        options.local_batch_size = NETWORKS[options.network].batch_size
    for name in ('local_batch_size', 'processes', 'rounds', 'iterations'):
        if getattr(options, name) < 1:
            flag = name.replace('_', '-')
            parser.refuse(f'--{flag} must be above 0, not {getattr(options, name)}')
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.refuse(f'--out {reason(error)}')
    return options


def network_of(options) -> Network:
    """Returns the network, with the minibatch that the options give it."""
    return dataclasses.replace(NETWORKS[options.network], batch_size=options.local_batch_size)


def turn(name, options, folder) -> dict:
    """Starts the job of a system, and returns the result that its rank 0 wrote.

    Raises:
        SystemExit: The job failed. It has said why.
    """
    network = network_of(options)
    for_ranks = {
        'system': name,
        'functions': SYSTEMS[name],
        'width': network.width,
        'stem': network.stem,
        'image_size': network.image_size,
        'local_batch_size': network.batch_size,
        'n_classes': network.n_classes,
        'timed': options.iterations,
        'iterations': 2 * options.iterations + 1,
        'repeat': 1,
        'allreduce_grad_dtype': 'float16',
        'loader': 'processes:1',
        'folder': str(folder / 'digits'),
        'result': str(folder / 'result.json'),
    }
    program = 'reproduce.studies.speed.systems_program'
    command, environment = job_of(options.processes, [json.dumps(for_ranks)], program)
    try:
        job = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.exit(NO_MPIEXEC.format(reason(error)))
    with ended_with_this(job):
        if job.wait():
            sys.exit(f'error: the job of {name} ended with status {job.returncode}')
    return json.loads((folder / 'result.json').read_text())


@contextlib.contextmanager
def ended_with_this(job):
    """Ends the job if the block ends before it."""
    try:
        yield
    finally:
        if job.poll() is None:
            job.terminate()
            try:
                job.wait(10)
            except subprocess.TimeoutExpired:
                job.kill()


def measure(options) -> dict:
    """Gives each system its turns.

    Returns:
        dict: Name to the results of its turns.

    Raises:
        SystemExit: A job failed, or two systems do not do the same.
    """
    results: dict = {name: [] for name in options.systems}
    progress = Countdown('turns', options.rounds * len(results))
    first = None
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        for _ in range(options.rounds):
            for name in list(results):
                result = turn(name, options, Path(folder).resolve())
                if 'left_out' in result:
                    print(f'left out: {name}: {result["left_out"]}', flush=True)
                    del results[name]
                    progress.total -= options.rounds
                    continue
                first = first or result
                check(name, result, first)
                results[name].append(result)
                progress()
    if not results:
        sys.exit('error: none of the systems can run here')
    return results


def check(name, result, first):
    """Ends the program if a system has another device or another first loss than the first has."""
    if result['device'] != first['device']:
        sys.exit(
            f'error: {name} runs on {result["device"]}, but the first of the systems on '
            f'{first["device"]}; with CUDA_VISIBLE_DEVICES= all run on CPUs'
        )
    off = abs(result['losses'][0] / first['losses'][0] - 1)
    if not off <= _LOSS:  # NaN is wrong, too
        sys.exit(
            f'error: {name} does not train the same, so nothing counts: its first loss differs by '
            f'{off:.1e}, more than {_LOSS:.0e}'
        )


def figures_of(results, options) -> dict:
    """Returns the figures of each system: seconds and ratios are medians over the rounds."""
    total = options.processes * options.local_batch_size
    figures = {}
    base = None
    for name, turns in results.items():
        seconds = dict(zip(_COLUMNS, np.transpose([result['seconds'] for result in turns])))
        own = seconds['iteration']
        base = own if base is None else base
        low, high = np.percentile(own, [25, 75])
        losses = turns[0]['losses']
        figures[name] = {
            'functions': turns[0]['functions'],
            **_parts(name, seconds),
            'iteration': float(np.median(own)),
            'spread': float(high - low) / 2 / float(np.median(own)),
            'images_per_second': float(np.median(total / own)),
            'times_first': float(np.median(base / own)),
            'memory': max(result['memory'] for result in turns),
            'peak': max(result['peak'] for result in turns),
            'loss': float(np.mean(losses[options.iterations :])),
            'losses': losses,
            'same_bits': all(result['losses'] == losses for result in turns),
            'design': design_of(name),
        }
    return figures


def family(name) -> str:
    return name.partition('-')[0]


def design_of(name) -> dict:
    column = FAMILIES.index(family(name))
    return {what: cells[column] for what, cells in DESIGN.items()}


def _parts(name, seconds) -> dict:
    """Returns the medians of the parts; None for the all-reduce within the backward pass."""
    overlaps = family(name) in ('twin', 'torchvision')
    parts = {
        'compute': seconds['compute'],
        'allreduce': seconds['pack'] + seconds['allreduce'],
        'update': seconds['update'],
        'rest': seconds['data'] + seconds['between'],
    }
    medians = {part: float(np.median(values)) for part, values in parts.items()}
    return {**medians, 'allreduce': None} if overlaps else medians


def table(figures) -> str:
    """Returns the text of the two tables: what was measured, and what differs by design."""
    heads = (
        'images/s',
        '+-',
        f'x {next(iter(figures))}',
        'iteration',
        *_PARTS,
        'MiB',
        'loss',
        'bits',
    )
    widths = [max(len(head), 7) + 2 for head in heads]
    lines = [f'{"":20}' + ''.join(f'{head:>{width}}' for head, width in zip(heads, widths))]
    for name, row in figures.items():
        cells = [f'{row["images_per_second"]:.2f}', f'{row["spread"]:.1%}']
        cells += [f'{row["times_first"]:.2f}', f'{1000 * row["iteration"]:.1f}']
        for part in _PARTS.values():
            cells.append('within' if row[part] is None else f'{1000 * row[part]:.1f}')
        cells += [f'{row["memory"] / 2**20:.0f}', f'{row["loss"]:.4f}']
        cells.append('same' if row['same_bits'] else 'differ')
        lines.append(f'{name:20}' + ''.join(f'{c:>{width}}' for c, width in zip(cells, widths)))
    families = list(dict.fromkeys(map(family, figures)))
    lines += ['', f'{"by design":18}' + ''.join(f'{name:34}' for name in families).rstrip()]
    for what in DESIGN:
        cells = [design_of(name)[what] for name in families]
        if any(cells):
            lines.append(f'{what:18}' + ''.join(f'{cell:34}' for cell in cells).rstrip())
    return '\n'.join(lines)


def draw(figures, options):
    """Draws OUT/systems.png: the parts of an iteration, and the loss by iteration."""
    figure, (bars, losses) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    styles = zip(_PARTS.items(), ('0.25', '0.9', '0.6', 'w'), ('', '///', '', '...'))
    left = np.zeros(len(figures))
    for (title, part), color, hatch in styles:
        width = np.array([1000 * (row[part] or 0) for row in figures.values()])
        bars.barh(
            list(figures), width, left=left, label=title, color=color, hatch=hatch, edgecolor='k'
        )
        left += width
    bars.invert_yaxis()
    bars.set_title('an iteration, milliseconds')
    bars.set_xlabel('twin, torchvision: the all-reduce is within the backward pass')
    bars.set_xlim(0, 1.05 * max(left))
    bars.legend(fontsize='small')
    shown = {family(name): row['losses'] for name, row in reversed(figures.items())}
    lines = (('-', 'o', 'k'), (':', 's', 'k'), ('--', '^', '0.4'), ('-', 'x', '0.6'))
    for (name, values), (style, marker, color) in zip(reversed(shown.items()), lines):
        every = max(1, len(values) // 10)
        losses.plot(
            range(1, len(values) + 1),
            values,
            marker + style,
            color=color,
            markevery=every,
            ms=4,
            label=name,
        )
    losses.set_title('training loss')
    losses.set_xlabel('iteration')
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.grid(alpha=0.3)
    losses.legend(fontsize='small')
    save(figure, os.path.join(options.out, 'systems.png'))


def main(argv):
    options = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    network = network_of(options)
    load = os.getloadavg()[0]
    title = (
        f'{network} per process; processes: {options.processes}; rounds: {options.rounds}, each of '
        f'{options.iterations} iterations, after as many that do not count'
    )
    print(title, flush=True)
    results = measure(options)
    device, blas = (next(iter(results.values()))[0][key] for key in ('device', 'blas'))
    figures = figures_of(results, options)
    here = f'{device}; NumPy by {blas or "another BLAS"}; load of the machine before: {load:.1f}'
    text = f'{title}\n{here}\n\n{table(figures)}\n'
    content = {
        'benchmark': 'systems',
        'machine': platform.platform(),
        'device': device,
        'blas': blas,
        'load_before': load,
        'python': platform.python_version(),
        'numpy': np.__version__,
        'settings': {**vars(options), **dataclasses.asdict(network)},
        'figures': figures,
    }
    out = Path(options.out)
    (out / 'systems.txt').write_text(text)
    (out / 'systems.json').write_text(json.dumps(content, indent=2) + '\n')
    draw(figures, options)
    print(f'\n{text}\nresults in {out}: systems.txt, systems.json, systems.png')
