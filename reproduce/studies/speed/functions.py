"""How fast are forward and backward, by each implementation of the functions of ResNet-50?

./run_mpi.sh benchmark functions
    Four networks, and the layers of the first.
./run_mpi.sh benchmark functions --networks 224px --repeat 5
    ImageNet's size only.

The implementations are Chainer's own, compiled C for each instruction set of the processor, NumPy's
and PyTorch's. Each has a process of its own, with one thread. The processes take turns. A turn is
forward and backward of one minibatch of random pixels. What cannot run here is left out, with the
reason.

Nothing is timed before loss and gradients agree with Chainer's: the loss within 1e-5 of itself, the
gradient within 1 % of its norm, and each parameter's within 10 %. The limits are that wide because
ReLUs and maxima near a tie fall on the other side.

The columns of the first table:

+-            half of the distance between the quartiles
x chainer     how many times as fast as Chainer's own functions
of sgemm      share of the speed of NumPy's product of matrices with 1,024 rows, on one core. Above
              100 %, or with kernels for Prescott, NumPy's OpenBLAS does not know the processor,
              and makes Chainer slow: set OPENBLAS_CORETYPE, or install a newer NumPy
difference    of the gradient from Chainer's, relative
MiB           growth of the process by its first iterations, gradients included
two at once   images/s of two such processes at the same time, as a multiple of one's

The second table has the time of each layer, for Chainer and the first of ours, as hooks measure it
within an iteration. Layers of one shape are one row, with their number.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import multiprocessing
import platform
import signal
import sys
import time
from pathlib import Path

import extensions  # noqa: F401  isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import numpy as np

from extensions import cpu_functions, kernels
from reproduce.job import functions
from reproduce.job.command_line import Parser, reason
from reproduce.job.countdown import Countdown
from reproduce.resnet50 import ResNet50
from reproduce.settings import InputError
from reproduce.studies.speed.networks import NETWORKS, Network
from reproduce.studies.speed.side_by_side import side_by_side

_SGEMM_ROWS, _SGEMM_TIMES = 1024, 4
_SGEMM_FLOP = 2 * _SGEMM_TIMES * _SGEMM_ROWS**3
_LOSS, _GRADIENT, _PARAMETER = 1e-5, 1e-2, 1e-1  # limits of relative differences


def implementations() -> list[str]:
    """Returns the names of all implementations, Chainer's first. Some may not run here."""
    # Plain C is too slow to be compared. It is for processors that have no other set.
    sets = [name for name in kernels.functions if name != 'plain']
    compiled = [f'compiled {name}' for name in sets] or ['compiled']
    return ['chainer', *compiled, 'numpy', 'torch']


def use(name: str) -> str:
    """Makes this process compute by an implementation, and returns its description.

    Raises:
        InputError, NotCompiledError, ValueError: It cannot run here. The text says why.
    """
    kind, _, instruction_set = name.partition(' ')
    device = chainer.get_device('@numpy')
    functions.use(kind, device)
    if instruction_set:
        cpu_functions.enable(instruction_set)
    return functions.description(kind, device)


def blas() -> str:
    """Returns the processor whose kernels the OpenBLAS of NumPy's wheel takes; empty without one.

    For a processor that it does not know, an old OpenBLAS takes Prescott's, which are far slower.
    """
    for library in Path(np.__file__).resolve().parents[1].glob('numpy.libs/*openblas*'):
        for name in ('openblas_get_corename64_', 'scipy_openblas_get_corename64_'):
            if function := getattr(ctypes.CDLL(str(library)), name, None):
                function.restype = ctypes.c_char_p
                return f'OpenBLAS for {function().decode()}'
    return ''


# ---------------------------------------------------------------- in the process of one


class Training:
    """Forward and backward of one minibatch, again and again.

    The last gamma of each block is 0.1. In a new network it is 0, and so are most gradients.

    Attributes:
        memory (int): Bytes by which the first iterations have made this process grow.
    """

    def __init__(self, network: Network):
        n, side = network.batch_size, network.image_size
        rng = np.random.RandomState(0)
        self._model = ResNet50(network.n_classes, network.width, network.stem, seed=0)
        for name, param in self._model.namedparams():
            if name.endswith('/bn3/gamma'):
                param.array[...] = 0.1
        self._x = rng.standard_normal((n, 3, side, side)).astype(np.float32)
        self._t = rng.randint(network.n_classes, size=n).astype(np.int32)
        before = memory('VmRSS')
        for _ in range(3):
            self.iteration()
        self.memory = memory('VmHWM') - before

    def _forward(self):
        self._model.cleargrads()
        return F.softmax_cross_entropy(self._model(self._x), self._t)

    def iteration(self):
        self._forward().backward()

    def gradients(self) -> tuple:
        """Returns the loss, and the gradients by the names of the parameters."""
        loss = self._forward()
        loss.backward()
        return float(loss.array), {name: param.grad for name, param in self._model.namedparams()}

    def layers(self) -> dict:
        """Returns {layer: [count, forward s, backward s, FLOP]} of one iteration.

        The last two rows have the time between the functions, and the sum of all rows.
        """
        with _LayerHook() as hook:
            start = time.perf_counter()
            loss = self._forward()
            middle = time.perf_counter()
            loss.backward()
            end = time.perf_counter()
        count, forward, backward, flop = np.sum(list(hook.rows.values()), axis=0).tolist()
        whole = [count, middle - start, end - middle, flop]
        rest = [0, whole[1] - forward, whole[2] - backward, 0]
        return {**hook.rows, 'between the functions': rest, 'all': whole}


class _LayerHook(chainer.FunctionHook):
    """Times functions. Those that a function calls within its backward pass are part of it."""

    name = 'LayerHook'

    def __init__(self):
        self.rows: dict = {}
        self._depth = 0

    def forward_preprocess(self, function, in_data):
        self._start()

    def backward_preprocess(self, function, in_data, out_grad):
        self._start()

    def forward_postprocess(self, function, in_data):
        if row := self._stop(function, in_data, 1):
            row[0] += 1

    def backward_postprocess(self, function, in_data, out_grad):
        row = self._stop(function, in_data, 2)
        if row and function.label in _PRODUCTS:
            n_products = 1 + sum(x.requires_grad for x in function.inputs[:2])
            W = in_data[1]
            row[3] += n_products * 2 * out_grad[0].size * W.size // len(W)

    def _start(self):
        self._depth += 1
        if self._depth == 1:
            self._since = time.perf_counter()

    def _stop(self, function, in_data, column):
        seconds = time.perf_counter() - self._since
        self._depth -= 1
        if self._depth:
            return None
        row = self.rows.setdefault(_layer(function, in_data), [0, 0.0, 0.0, 0])
        row[column] += seconds
        return row


_PRODUCTS = ('Convolution2DFunction', 'LinearFunction')


def _layer(function, in_data) -> str:
    """Returns the name of a row: with shapes for convolutions, which are most of the work."""
    if function.label != 'Convolution2DFunction':
        return function.label
    (_, _, side, _), (n_out, n_in, k, _) = in_data[0].shape, in_data[1].shape
    stride = f'/{function.sy}' if function.sy > 1 else ''
    return f'convolution {k}x{k}{stride}, {n_in} to {n_out}, side {side}'


def memory(key) -> int:
    """Returns the memory of this process, in bytes: VmRSS is of now, VmHWM is the most."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{key}:'):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def _serve(pipe, name, network):
    """Sends why the implementation cannot run, and its description. Then answers requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the first process
    try:
        description = use(name)
    except (InputError, cpu_functions.NotCompiledError, ValueError) as error:
        pipe.send((str(error), ''))
        return
    training = Training(network)
    pipe.send(('', description))
    with contextlib.suppress(EOFError, OSError):  # the first process needs this one no more
        while True:
            answer = getattr(training, pipe.recv())
            pipe.send(answer() if callable(answer) else answer)


# ---------------------------------------------------------------- in the first process


class Process:
    """The process of one implementation. It trains when called.

    Args:
        name (str): One of :func:`implementations`.
        network (Network): What it trains.
    """

    def __init__(self, name: str, network: Network):
        context = multiprocessing.get_context('spawn')
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, network), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self):
        self.ask('iteration')

    def ask(self, attribute: str):
        """Returns an attribute of the process's :class:`Training`, or the result of a method."""
        self.send(attribute)
        return self.receive()

    def send(self, attribute: str):
        with contextlib.suppress(OSError):  # it has died, which receive() notices
            self._pipe.send(attribute)

    def receive(self):
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            how = f'by {signal.Signals(-code).name}' if code < 0 else f'with status {code}'
            sys.exit(
                f'error: the process of {self.name} ended {how}; if memory ran out, take smaller '
                '--networks'
            )

    def close(self):
        self._pipe.close()
        self._process.join()


def started(names, network, stack) -> dict:
    """Starts a process for each name, until the stack closes.

    Returns:
        dict: Name to :class:`Process` and description. What cannot run is left out, and printed.
    """
    processes = [Process(name, network) for name in names]
    for process in processes:
        stack.callback(process.close)
    found = {}
    for process in processes:
        why_not, description = process.receive()
        if why_not:
            print(f'left out: {process.name}: {why_not}')
        else:
            found[process.name] = process, description
    return found


def difference(expected, found) -> float:
    """Compares the loss and gradients of two implementations.

    Args:
        expected, found (tuple): Of :meth:`Training.gradients`.

    Returns:
        float: The relative difference of the whole gradients, by their norms.

    Raises:
        ValueError: A relative difference is above its limit.
    """
    (loss, grads), (found_loss, found_grads) = expected, found
    _check('loss', abs(found_loss / loss - 1), _LOSS)
    norms = {name: np.linalg.norm(grad) for name, grad in grads.items()}
    distances = {name: np.linalg.norm(found_grads[name] - grad) for name, grad in grads.items()}
    for name, distance in distances.items():
        _check(f'gradient of {name}', distance / norms[name], _PARAMETER)
    whole = np.linalg.norm(list(distances.values())) / np.linalg.norm(list(norms.values()))
    _check('gradient', whole, _GRADIENT)
    return float(whole)


def _check(what, error, limit):
    if not error <= limit:  # NaN is wrong, too
        raise ValueError(f"{what} differs from Chainer's by {error:.1e}, more than {limit:.0e}")


def _agreement(processes) -> dict:
    """Returns {name: difference from Chainer's}. A wrong implementation ends the program."""
    expected = processes['chainer'].ask('gradients')
    found = {}
    for name, process in processes.items():
        try:
            found[name] = difference(expected, process.ask('gradients'))
        except ValueError as error:
            sys.exit(f'error: {name} is wrong, so nothing was timed: its {error}')
    return found


def measure(title: str, network: Network, repeat: int, with_layers: bool) -> dict:
    """Times all implementations on a network, and prints the tables.

    Args:
        title (str): Printed above.
        network (Network): The network.
        repeat (int): Rounds that are timed.
        with_layers (bool): Whether to time the layers, too.

    Returns:
        dict: ``implementations``, by name, and ``layers``, by name; for JSON.

    Raises:
        SystemExit: An implementation is wrong, or a process has died.
    """
    print(f'\n{title}: {network}', flush=True)
    with contextlib.ExitStack() as stack:
        found = started(implementations(), network, stack)
        processes = {name: process for name, (process, _) in found.items()}
        twice = list(processes)[:2]
        twins = {name: twin for name, (twin, _) in started(twice, network, stack).items()}
        differences = _agreement(processes)
        flop = processes['chainer'].ask('layers')['all'][-1]
        seconds = _seconds(processes, twins, repeat)
        sgemm = _SGEMM_FLOP / np.array(seconds['sgemm'])
        result: dict = {'flop': flop, 'sgemm_gflop_per_second': float(np.median(sgemm)) / 1e9}
        result['blas'] = blas()
        result['implementations'] = {
            name: {
                'description': description,
                **_speed(seconds, name, network.batch_size, flop),
                'difference': differences[name],
                'memory': process.ask('memory'),
            }
            for name, (process, description) in found.items()
        }
        print_table(result, repeat)
        if with_layers:
            layers = {name: processes[name] for name in twice}
            result['layers'] = _layers(layers, repeat)
            print_layers(title, result['layers'])
    return result


def _seconds(processes, twins, repeat) -> dict:
    """Times sgemm, each process alone, and some beside their twins, in turn."""
    a, b = np.random.RandomState(0).standard_normal((2, _SGEMM_ROWS, _SGEMM_ROWS)).astype('f')
    out = np.empty_like(a)
    candidates = {'sgemm': lambda: [np.matmul(a, b, out=out) for _ in range(_SGEMM_TIMES)]}
    candidates.update(processes)
    for name, twin in twins.items():
        candidates[f'two {name}'] = functools.partial(_both, processes[name], twin)
    return side_by_side(candidates, repeat, _countdown(candidates, repeat))


def _countdown(candidates, repeat) -> Countdown:
    return Countdown('measurements', len(candidates) * (repeat + 1))


def _both(process, twin):
    for each in (process, twin):
        each.send('iteration')
    for each in (process, twin):
        each.receive()


def _speed(seconds, name, batch_size, flop) -> dict:
    """Returns an implementation's figures, as medians over the rounds."""
    own = np.array(seconds[name])
    median, (low, high) = float(np.median(own)), np.percentile(own, [25, 75])
    sgemm = np.array(seconds['sgemm']) / _SGEMM_FLOP
    two = seconds.get(f'two {name}')
    return {
        'median_seconds': median,
        'images_per_second': batch_size / median,
        'spread': float(high - low) / 2 / median,
        'times_chainer': float(np.median(np.array(seconds['chainer']) / own)),
        'gflop_per_second': flop / median / 1e9,
        'share_of_sgemm': float(np.median(flop * sgemm / own)),
        'two_at_once': float(np.median(2 * own / two)) if two else None,
    }


def print_table(result, repeat):
    """Prints the implementations, a row each."""
    by = f' by {result["blas"]}' if result['blas'] else ''
    print(
        f'forward + backward of {result["flop"] / 1e9:,.1f} GFLOP; sgemm{by} '
        f'{result["sgemm_gflop_per_second"]:.1f} GFLOP/s; medians of {repeat} rounds'
    )
    heads = ('images/s', '+-', 'x chainer', 'GFLOP/s', 'of sgemm', 'difference', 'MiB')
    print(f'{"":20}' + ''.join(f'{head:>11}' for head in heads) + '  two at once')
    for name, row in result['implementations'].items():
        two = '-' if row['two_at_once'] is None else f'{row["two_at_once"]:.2f}'
        print(
            f'{name:20}{row["images_per_second"]:11.2f}{row["spread"]:11.1%}'
            f'{row["times_chainer"]:11.2f}{row["gflop_per_second"]:11.1f}'
            f'{row["share_of_sgemm"]:11.1%}{row["difference"]:11.1e}'
            f'{row["memory"] / 2**20:11.0f}{two:>13}'
        )
    sys.stdout.flush()


def _layers(processes, repeat) -> dict:
    """Returns {implementation: {layer: {count, forward, backward, flop}}}, medians in seconds."""
    rounds: dict = {name: [] for name in processes}
    progress = _countdown(processes, repeat)
    for round_ in range(repeat + 1):
        for name, process in processes.items():
            progress()
            layers = process.ask('layers')
            if round_ > 0:
                rounds[name].append(layers)
    return {
        name: {
            layer: dict(
                zip(
                    ('count', 'forward', 'backward', 'flop'),
                    np.median([layers[layer] for layers in each], axis=0).tolist(),
                )
            )
            for layer in each[0]
        }
        for name, each in rounds.items()
    }


def print_layers(title, result):
    """Prints the layers, a row each, with all implementations side by side."""
    print(f'\nlayers of {title}, milliseconds')
    print(f'{"":47}' + ''.join(f'{name:>28}' for name in result))
    heads = f'{"forward":>10}{"backward":>9}{"GFLOP/s":>9}' * len(result)
    print(f'{"":40}{"count":>7}{heads}  x chainer')
    for layer, row in next(iter(result.values())).items():
        line = f'{layer:40}{int(row["count"]) or "":>7}'
        seconds = []
        for rows in result.values():
            own = rows[layer]
            seconds.append(own['forward'] + own['backward'])
            speed = f'{row["flop"] / seconds[-1] / 1e9:.1f}' if row['flop'] else ''
            line += f'{1000 * own["forward"]:10.2f}{1000 * own["backward"]:9.2f}{speed:>9}'
        print(f'{line}{seconds[0] / seconds[-1]:11.2f}')


# ---------------------------------------------------------------- the command


def parse(argv):
    parser = Parser(prog='./run_mpi.sh benchmark functions', description=__doc__)
    add = parser.add_argument
    add(
        '--networks',
        default=','.join(NETWORKS),
        metavar='NAME,NAME',
        help='time these networks [%(default)s]',
    )
    add(
        '--layers',
        metavar='NAME',
        help='time the layers of this one of them [the first of --networks]',
    )
    add(
        '--repeat',
        type=int,
        default=9,
        metavar='N',
        help='time N rounds, after one that does not count [%(default)s]',
    )
    add('--json', metavar='FILE', help='write the results to FILE, too, as JSON [no file]')
    options = parser.parse_args(argv[1:])
    options.networks = list(dict.fromkeys(options.networks.split(',')))
    for name in options.networks:
        if name not in NETWORKS:
            parser.refuse(f'--networks has {name!r}, which is none of {", ".join(NETWORKS)}')
    options.layers = options.layers or options.networks[0]
    if options.layers not in options.networks:
        parser.refuse(f'--layers {options.layers} is none of {", ".join(options.networks)}')
    if options.repeat < 1:
        parser.refuse(f'--repeat must be at least 1, not {options.repeat}')
    if options.json:
        try:
            Path(options.json).touch()  # so that it fails before the work, not after it
        except OSError as error:
            parser.refuse(f'--json {reason(error)}')
    return options


def main(argv):
    options = parse(argv)
    figures = {
        name: measure(name, NETWORKS[name], options.repeat, name == options.layers)
        for name in options.networks
    }
    if options.json:
        content = {'benchmark': 'functions', 'machine': platform.platform(), 'figures': figures}
        content['python'], content['numpy'] = platform.python_version(), np.__version__
        Path(options.json).write_text(json.dumps(content, indent=2) + '\n')
