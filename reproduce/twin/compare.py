"""Do the training in Chainer and its twin in PyTorch compute the same numbers?

./run_mpi.sh twin compare [--iterations N] [--restart] [options of train.py]

One process trains both, from the same initial values, on the same images. It plays all workers. The
preset is smoke with 4 workers, unless the options say otherwise.

How far apart may two right programs be? Sums of float32 in another order are rounded otherwise. At
a ReLU, that can change a gradient as a whole, and RMSprop makes the smallest gradients as large as
all others. So Chainer trains twice: by the compiled functions, and by its own, which add in another
order. Ten times the distance of these two is the limit for the twin. As single ReLUs do more on
either side, up to a quarter of the iterations may be beyond. The distance of a and b is
|| a - b || / || a ||, over all parameters, layers or workers; for "elements", it is the share of
the gradient's elements that differ by more than 1 %. lr and the alphas must be equal.

With --restart, each iteration starts from the parameters, m and Delta of the first training: every
iteration is a test of its own. Without, differences grow, at any rate up to twice that of Chainer's
own. Iterations after Chainer's two gradients are a tenth apart are shown, but not judged.

Each iteration prints both losses, the schedules, the norm of the mean gradient, and the largest
differences. The table at the end has the distances, which are judged.

Writes compare.json and compare.png. The status is 1 if they part.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import numpy as np
import torch
import torch.distributed as dist
from mpi4py import MPI

import reproduce.train
from extensions import cpu_functions
from reproduce import dataset
from reproduce.job import functions
from reproduce.job.command_line import Parser, reason
from reproduce.job.plots import plt, save
from reproduce.listing import DataError
from reproduce.settings import InputError
from reproduce.twin import processes, records
from reproduce.twin import train as twin
from reproduce.twin.resnet50 import chainer_names

LIMIT = 10  # both distances are of one kind: the median of their ratio is about 1
BEYOND = 0.25  # share of the iterations; one in 25 was seen, on either side
PARTED = 0.1
ROUNDING = 2.0**-24  # of a float32, relative
STATE = ('parameters', 'm', 'Delta')
QUANTITIES = ('gradient', *STATE, 'BN mean', 'BN variance')
SCHEDULES = ('lr', 'alpha_sgd', 'alpha_rmsprop')


class InChainer:
    """The training of reproduce/train.py, iteration by iteration.

    Args:
        settings (Settings): Settings of the run.
        train, val (ImageFolder): Training and validation images.
        function_set (str): ``'compiled'``, ``'numpy'`` or ``'chainer'``, as --functions.
    """

    def __init__(self, settings, train, val, function_set):
        options = {**settings.communicator_options, 'name': 'mpi'}
        comm = extensions.create_communicator(mpi_comm=MPI.COMM_SELF, **options)
        self.trainer, self.batches = reproduce.train.experiment(settings, comm, train, val)
        self._functions = function_set
        schedules = ['StepLearningRate', 'AlphaSGDSchedule']
        for name in schedules[: 1 if settings.alpha_form == 'sgd' else 2]:
            self.trainer.get_extension(name).initialize(self.trainer)
        self._updater = self.trainer.updater
        self._updater.losses = []
        self._optimizer = self._updater.get_optimizer('main')
        self._params = dict(sorted(self._optimizer.target.namedparams()))
        self._layers = [
            link
            for _, link in sorted(self._optimizer.target.namedlinks())
            if isinstance(link, chainer.links.BatchNormalization)
        ]

    def update(self):
        functions.use(self._functions, chainer.get_device('@numpy'))
        try:
            with self.trainer.reporter.scope({}):  # the schedules act in a running trainer only
                self._updater.update()
        finally:
            cpu_functions.disable()
        self._updater.batch_statistics()

    def arrays(self, quantity) -> list:
        """Returns the arrays of one of ``QUANTITIES``, in the order of Chainer's names."""
        params = self._params.values()
        if quantity == 'gradient':
            return [param.grad for param in params]
        if quantity == 'parameters':
            return [param.array for param in params]
        if quantity in STATE:
            return [param.update_rule.state[quantity.lower()] for param in params]
        kind = 'avg_mean' if quantity == 'BN mean' else 'avg_var'
        return [getattr(layer, kind) for layer in self._layers]

    def schedules(self) -> dict:
        return {name: float(getattr(self._optimizer, name)) for name in SCHEDULES}

    def losses(self):
        """Returns the losses of all workers in the last iteration."""
        return self._updater.losses.pop().astype(np.float64)


class InPyTorch:
    """The twin, iteration by iteration, as :class:`InChainer`."""

    def __init__(self, settings, train, val):
        self.training, self.batches = twin.experiment(settings, OneProcess(), train, val)
        model = self.training.model
        self._names = {theirs: own for own, theirs in sorted(chainer_names(model).items())}
        self._params = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())

    def update(self):
        self.training.update()
        self.training.workers.average_statistics()

    def arrays(self, quantity) -> list:
        of = self._buffers if quantity.startswith('BN') else self._params
        kind = {'BN mean': 'running_mean', 'BN variance': 'running_var'}.get(quantity, '')
        tensors = [
            of[own] for _, own in sorted(self._names.items()) if own in of and own.endswith(kind)
        ]
        if quantity == 'gradient':
            tensors = [param.grad for param in tensors]
        elif quantity in ('m', 'Delta'):
            state = self.training.optimizer.state
            tensors = [state[param][quantity.lower()] for param in tensors]
        return [tensor.detach().numpy() for tensor in tensors]

    def schedules(self) -> dict:
        return self.training.hyperparameters

    def losses(self):
        return self.training.losses.pop().numpy()


class OneProcess:
    """A process that plays all workers."""

    rank, size, device = 0, 1, torch.device('cpu')


def run(settings, n_iterations, restart, out) -> dict:
    """Trains both, prints a row per iteration, and writes OUT/compare.json and OUT/compare.png.

    Args:
        settings (Settings): The numbers of both.
        n_iterations (int): Number of iterations.
        restart (bool): Whether each iteration starts from the state of the first training.
        out (str): The folder, which is made.

    Returns:
        dict: ``iterations``: results of :func:`compared`; ``parted``: result of :func:`parted`.
    """
    os.makedirs(out, exist_ok=True)
    first = functions.resolve('auto', chainer.get_device('@numpy'))
    with tempfile.TemporaryDirectory() as folder:
        here = dataclasses.replace(settings, out=os.path.join(folder, 'run'))
        os.mkdir(here.out)
        train, val = dataset.save(here, dataset.find(here, 1))
        ours = InChainer(settings, train, val, first)
        again = InChainer(settings, train, val, 'chainer')
        theirs = InPyTorch(settings, train, val)
        check_start(ours, theirs)
        print(f'Chainer by functions {first}, and by its own; PyTorch {torch.__version__}')
        print(_HEADS, flush=True)
        rows = []
        for iteration in range(1, n_iterations + 1):
            if restart and iteration > 1:
                for other in (again, theirs):
                    copy_state(ours, other)
            for side in (ours, again, theirs):
                side.update()
            rows.append({'iteration': iteration, **compared(ours, again, theirs)})
            print(_row(rows[-1]), flush=True)
    add_limits(rows, restart)
    result = {'settings': settings.identity, 'restart': restart, 'torch': str(torch.__version__)}
    result.update(iterations=rows, parted=parted(rows))
    Path(out, 'compare.json').write_text(json.dumps(result, indent=2) + '\n')
    plot(rows, out)
    return result


def check_start(ours, theirs):
    """Raises ValueError if the initial values differ, or if the table pairs different shapes."""
    for one, other in zip(ours.arrays('parameters'), theirs.arrays('parameters')):
        if not np.array_equal(one, other):
            raise ValueError('the initial values of Chainer and of PyTorch differ')


def copy_state(source, target):
    for quantity in STATE:
        for one, other in zip(source.arrays(quantity), target.arrays(quantity)):
            other[...] = one


def compared(ours, again, theirs) -> dict:
    """Returns what is compared after one iteration, as ``iterations`` of :func:`run`.

    ``distance`` is the twin's, ``rounding`` that of another order of sums in Chainer. ``largest``
    is the twin's largest difference, in units of the largest element.
    """
    losses, twin_losses = ours.losses(), theirs.losses()
    gradient = _flat(ours.arrays('gradient'))
    found = {
        'loss': float(losses.mean()),
        'twin loss': float(twin_losses.mean()),
        **ours.schedules(),
        'equal schedules': ours.schedules() == theirs.schedules(),
        'gradient': float(np.linalg.norm(gradient)),
        'distance': {'losses': _distance(losses, twin_losses)},
        'rounding': {'losses': _distance(losses, again.losses())},
        'largest': {},
    }
    for quantity in QUANTITIES:
        reference, own = _flat(ours.arrays(quantity)), _flat(theirs.arrays(quantity))
        found['distance'][quantity] = _distance(reference, own)
        found['rounding'][quantity] = _distance(reference, _flat(again.arrays(quantity)))
        found['largest'][quantity] = float(abs(own - reference).max() / abs(reference).max())
    for kind, side in (('distance', theirs), ('rounding', again)):
        off = abs(_flat(side.arrays('gradient')) - gradient) > 0.01 * abs(gradient)
        found[kind]['elements'] = float(off.mean())
    return found


def _distance(reference, other) -> float:
    return float(np.linalg.norm(other - reference) / np.linalg.norm(reference))


def _flat(arrays):
    return np.concatenate([array.ravel() for array in arrays]).astype(np.float64)


def add_limits(rows, restart):
    """Adds ``limit`` to each row: for each quantity, or None in a row that is not judged.

    The first row is judged in any case.
    """
    apart = False
    for k, row in enumerate(rows):
        close = restart or k == 0 or row['rounding']['gradient'] < PARTED
        apart = apart or not close
        known = [row] if restart else rows[: 2 * k + 1]
        row['limit'] = {
            quantity: None
            if apart
            else LIMIT * max(ROUNDING, *(other['rounding'][quantity] for other in known))
            for quantity in row['distance']
        }


def judged(rows) -> list:
    return [row for row in rows if row['limit']['gradient'] is not None]


def parted(rows):
    """Returns where the twin is beyond the limit, or None.

    Returns:
        dict: ``quantity``, the first ``iteration`` with its ``distance`` and ``limit``, and the
            number of iterations ``beyond``, for the quantity with most of these.
    """
    unequal = [row['iteration'] for row in rows if not row['equal schedules']]
    if unequal:
        return {'quantity': 'lr or alpha', 'iteration': unequal[0], 'beyond': len(unequal)}
    name, beyond = most_beyond(rows)
    if len(beyond) <= BEYOND * len(judged(rows)):
        return None
    first = beyond[0]
    found = {'quantity': name, 'iteration': first['iteration'], 'beyond': len(beyond)}
    return {**found, **{key: first[key][name] for key in ('distance', 'limit')}}


def most_beyond(rows) -> tuple:
    """Returns the quantity that is most often beyond its limit, and these rows."""
    beyond = {
        name: [row for row in judged(rows) if not row['distance'][name] <= row['limit'][name]]
        for name in rows[0]['distance']
    }
    return max(beyond.items(), key=lambda item: len(item[1]))


_NUMBERS = ('loss', 'twin loss', *SCHEDULES, '|g|')
_HEADS = (
    f'{"":69}largest difference, in units of the largest element\n{"it.":>5}'
    + ''.join(f'{name:>{len(name) + 2 if len(name) > 8 else 10}}' for name in _NUMBERS)
    + ''.join(f'{name:>12}' for name in QUANTITIES)
)


def _row(row) -> str:
    alphas = f'{row["alpha_sgd"]:11.5f}{row["alpha_rmsprop"]:15.3e}'
    numbers = f'{row["loss"]:10.6f}{row["twin loss"]:11.6f}{row["lr"]:10.5f}{alphas}'
    largest = ''.join(f'{row["largest"][name]:12.1e}' for name in QUANTITIES)
    return f'{row["iteration"]:5}{numbers}{row["gradient"]:10.3f}{largest}'


def distances(rows) -> str:
    """Returns the table of what is judged: the twin's distances, and Chainer's own."""
    names = rows[0]['distance']
    lines = ['distance to Chainer: of the twin, and of Chainer with another order of sums']
    lines.append(f'{"it.":>5}' + ''.join(f'{name:>18}' for name in names))
    for row in rows:
        pairs = [(row['distance'][name], row['rounding'][name]) for name in names]
        cells = ''.join(f'{own:10.1e}{other:8.0e}' for own, other in pairs)
        lines.append(f'{row["iteration"]:5}{cells}')
    return '\n'.join(lines)


def plot(rows, out):
    """Draws OUT/compare.png: the distance of each quantity by iteration, and its limit."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, constrained_layout=True)
    iterations = [row['iteration'] for row in rows]
    names = ('losses', 'gradient', *STATE, 'BN variance')
    for axis, name in zip(axes.flat, names):
        for key, style, label in (
            ('distance', 'k-', 'PyTorch'),
            ('rounding', 'k--', 'Chainer, another order of sums'),
            ('limit', 'k:', 'limit'),
        ):
            values = [max(row[key][name] or np.nan, ROUNDING / 10) for row in rows]
            axis.semilogy(iterations, values, style, lw=1, label=label)
        axis.axhline(ROUNDING, color='k', alpha=0.3, lw=0.8)
        axis.set_title(name)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize='small')
    axes[0, 0].set_ylabel('relative distance to Chainer')
    for axis in axes[1]:
        axis.set_xlabel('iteration')
    save(figure, os.path.join(out, 'compare.png'))


def verdict(result) -> str:
    """Returns the result in words."""
    found, rows = result['parted'], result['iterations']
    n = len(judged(rows))
    if found is None:
        medians = {
            name: np.median([LIMIT * r['distance'][name] / r['limit'][name] for r in judged(rows)])
            for name in rows[0]['distance']
        }
        numbers = ', '.join(f'{name} {median:.1f}' for name, median in medians.items())
        name, beyond = most_beyond(rows)
        most = f'in at most {len(beyond)} ({name})' if beyond else 'in none'
        return (
            f'they agree: {n} of {len(rows)} iterations can be compared, and {most} a quantity is '
            'beyond its limit. Distance, as a multiple of that of another order of sums, median: '
            f'{numbers}'
        )
    if 'distance' not in found:
        return f'they part in iteration {found["iteration"]}: {found["quantity"]} differ'
    return (
        f'they part in iteration {found["iteration"]}: {found["quantity"]}, distance '
        f'{found["distance"]:.1e} = {found["distance"] / ROUNDING:.1e} roundings of float32, limit '
        f'{found["limit"]:.1e}; so do {found["beyond"]} of {n} iterations'
    )


def main(argv):
    parser = Parser(prog='./run_mpi.sh twin compare', description=__doc__)
    add = parser.add_argument
    add('--iterations', type=int, default=50, metavar='N', help='train so long [%(default)s]')
    add('--restart', action='store_true', help='start each iteration from the same numbers')
    add('--out', default='results/twin', metavar='FOLDER', help='write there [%(default)s]')
    own, words = parser.parse_known_args(argv)
    if own.iterations < 1:
        parser.refuse(f'--iterations must be at least 1, not {own.iterations}')
    given = {word.partition('=')[0] for word in words}
    if '--preset' not in given:
        words = ['--preset', 'smoke', *words]
    if '--workers' not in given:
        words += ['--workers', '4']
    if '--loader' not in given:
        words += ['--loader', 'serial']
    store = dist.HashStore()
    processes.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        settings = records.parse(words, 1)
        result = run(settings, own.iterations, own.restart, own.out)
    except (InputError, DataError, OSError) as error:
        parser.refuse(reason(error))
    finally:
        dist.destroy_process_group()
    print(f'\n{distances(result["iterations"])}\n')
    print(f'{verdict(result)}; results in {own.out}')
    return 1 if result['parted'] else 0
