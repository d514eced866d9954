"""What does half precision cost the gradient, and are there other ways to a total batch?

./run_mpi.sh benchmark precision      How large is the error that a float16 all-reduce adds to the
                                      mean gradient? The paper reports a small effect (source S of
                                      extensions/README.md).
./run_mpi.sh benchmark accumulation   How far is a step of n workers from gradient accumulation, and
                                      from one large batch?

One process plays all workers. The model is ResNet-50.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import extensions  # isort: skip  (makes Chainer importable on NumPy 2)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from extensions import kernels
from reproduce import images
from reproduce.dataset import write_digits
from reproduce.job import functions
from reproduce.job.command_line import Parser, reason
from reproduce.job.countdown import Countdown
from reproduce.job.plots import plt, save
from reproduce.listing import DataError, list_images
from reproduce.loader import ImageLoader
from reproduce.order import ImageOrder
from reproduce.resnet50 import ResNet50

KINDS = {
    'convolution': L.Convolution2D,
    'batch normalization': L.BatchNormalization,
    'fully connected': L.Linear,
}
# Options of our communicator.
REDUCERS = {
    'float16, exact sum': ('float16', 'exact', 1),
    'the same, scale 1,024': ('float16', 'exact', 1024),
    'float16, sum of a ring': ('float16', 'ring', 1),
    'float32, sum of a ring': ('float32', 'ring', 1),
}
_STYLES = ('ko-', 'kx-', 'ks--', 'k^:', 'kD-.', 'kv--')
HOST = 8  # workers per host of the tree: the paper's GPUs per node (S)


@dataclasses.dataclass(frozen=True)
class Study:
    """The numbers of a study.

    Attributes:
        workers (tuple of int): Numbers of workers n, ascending.
        local_batch_size (int): Images per worker.
        image_size (int): Image side, in pixels.
        image_root (str): Folder with CLASS/FILE; None: the digits that come with the program.
        steps (int): Updates of momentum SGD before the gradients are taken. Each update uses one
            worker's images. Before the first update most gradients are zero, because the last gamma
            of each block is zero.
        seed (int): Seed of the initial values, the order of images and the augmentation.
    """

    workers: tuple = (8, 64, 1024)
    local_batch_size: int = 32
    image_size: int = 32
    image_root: str | None = None
    steps: int = 50
    seed: int = 0


def run(study: Study, out: str) -> dict:
    """Measures the error, prints the table, and writes OUT/precision.json and OUT/precision.png.

    The error of a mean gradient g is relative to g_64, the mean of the float32 gradients in
    float64. The norms run over all parameters of a kind of layer::

        || g - g_64 || / || g_64 ||

    All workers have the same parameters. Each worker has its own minibatch, and normalizes by its
    own statistics. Sums by our communicator, as in training, are those of
    :class:`~extensions.exact_mpi.HalfPrecisionMpiCommunicator`; ``gradient_scale`` is its option.
    Others are simulated: :func:`tree` and :func:`divided_first`.

    Args:
        study (Study): The numbers.
        out (str): The folder, which is made.

    Returns:
        dict: ``errors``: number of workers, then kind of layer, then name of the sum, to the error.
            ``cast``: number of workers to the effects of the cast to float16.

    Raises:
        DataError: The images cannot be used.
        OSError: The folder cannot be made.
        ValueError: There are fewer images than a minibatch has.
    """
    with tempfile.TemporaryDirectory() as folder:
        if study.image_root is None:
            write_digits(Path(folder) / 'digits')
        listing = list_images(study.image_root or Path(folder) / 'digits' / 'train')
        gradient_of = Gradients(study, listing)
        os.makedirs(out, exist_ok=True)
        gradient_of.train()
        progress = Countdown('gradients', sum(study.workers))
        result: dict = {'study': dataclasses.asdict(study), 'images': len(listing.labels)}
        result['errors'], result['cast'] = {}, {}
        for n in study.workers:
            errors, cast = _measure(gradient_of, n, progress)
            result['errors'][n], result['cast'][n] = errors, cast
    print(table(result), flush=True)
    (Path(out) / 'precision.json').write_text(json.dumps(result, indent=2) + '\n')
    plot(result['errors'], out)
    return result


class Gradients:
    """Computes gradients: a call with a worker's number puts that worker's gradients in ``model``.

    Args:
        study (Study): The numbers.
        listing (ImageFolder): The images.

    Attributes:
        model (ResNet50): The model.
    """

    def __init__(self, study, listing):
        b, size = study.local_batch_size, study.image_size
        self.model = ResNet50(len(listing.classes), seed=study.seed)
        self._steps = study.steps
        self._loader = ImageLoader(
            listing,
            listing,
            ImageOrder(len(listing.labels), 1, b, study.seed),
            images.Preprocessing(
                size,
                size,
                horizontal_flip=study.image_root is not None,
                resize_filter='pillow',  # as in the numbers of reproduce/results/README.md
            ),
            study.seed,
            range(1),
        )
        self._lr = 0.5 * extensions.base_learning_rate(b)

    def train(self):
        optimizer = extensions.RMSpropWarmup(self._lr).setup(self.model)
        for step in range(self._steps):
            self._backward(step)
            optimizer.update()

    def __call__(self, worker):
        self._backward(self._steps + worker)

    def minibatch(self, worker):
        return self._minibatch(self._steps + worker)

    def _minibatch(self, step):
        pixels, t = self._loader.train_batch(step, 0)
        return images.normalize(pixels, images.MEAN, images.STD, np), t

    def _backward(self, step):
        self.backward(*self._minibatch(step))

    def backward(self, x, t):
        self.model.cleargrads()
        F.softmax_cross_entropy(self.model(x), t).backward()


def accumulation(study: Study) -> dict:
    """Compares the paper's step with other ways to the same total batch, and prints a table.

    In the paper's step, each of n workers has its own batch statistics. The gradients are summed in
    float16, and the validation uses the average of the workers' statistics. The other ways are:

    - gradient accumulation in float32, which keeps the last minibatch's statistics;
    - one large batch, which is normalized as a whole.

    A difference is a relative L2 norm, as in :func:`run`.

    Args:
        study (Study): The numbers. Of ``workers``, only the first is used.

    Returns:
        dict: Name of the other way to its three differences: gradient, BN mean and BN variance. The
            means and variances are those that the validation would use.

    Raises:
        DataError: The images cannot be used.
        ValueError: There are fewer images than a minibatch has.
    """
    n = study.workers[0]
    with tempfile.TemporaryDirectory() as folder:
        if study.image_root is None:
            write_digits(Path(folder) / 'digits')
        root = study.image_root or Path(folder) / 'digits' / 'train'
        gradient_of = Gradients(study, list_images(root))
        gradient_of.train()
        model = gradient_of.model
        comm = extensions.create_communicator('mpi')
        statistics = extensions.AllreduceBatchStatistics(model, comm)
        total = 0
        for worker in range(n):
            gradient_of(worker)
            total = total + _flat(model, 'grad')
            comm.add_grad(model)
            statistics.add_worker()
        accumulated = [total / np.float32(n), _flat(model, 'avg_mean'), _flat(model, 'avg_var')]
        comm.mean_grad(model)
        statistics()
        ours = [_flat(model, kind) for kind in ('grad', 'avg_mean', 'avg_var')]
        batches = [gradient_of.minibatch(worker) for worker in range(n)]
        gradient_of.backward(*map(np.concatenate, zip(*batches)))
        whole = [_flat(model, kind) for kind in ('grad', 'avg_mean', 'avg_var')]
    result = {
        'gradient accumulation in float32': _distances(accumulated, ours),
        f'one batch of {n * study.local_batch_size}, normalized as a whole': _distances(
            whole, ours
        ),
    }
    print(f'{f"against {n} workers x {study.local_batch_size}":44}', end='')
    print(f'{"gradient":>12}{"BN mean":>12}{"BN variance":>14}')
    for name, (grad, mean, variance) in result.items():
        print(f'{name:44}{grad:>12.1e}{mean:>12.1e}{variance:>14.1e}')
    return result


def _flat(model, kind):
    if kind == 'grad':
        arrays = [param.grad for _, param in sorted(model.namedparams())]
    else:
        links = [link for link in model.links() if isinstance(link, L.BatchNormalization)]
        arrays = [getattr(link, kind) for link in links]
    return np.concatenate([array.ravel() for array in arrays])


def _distances(arrays, references):
    return tuple(
        float(np.linalg.norm(a - r) / np.linalg.norm(r)) for a, r in zip(arrays, references)
    )


def _measure(gradient_of, n, progress):
    """Returns the errors of n workers' mean by kind and sum, and the effects of the cast."""
    model = gradient_of.model
    comms = {
        name: extensions.create_communicator(
            'mpi', dtype, accumulate=sum_, gradient_scale=scale, stop_on_nonfinite=False
        )
        for name, (dtype, sum_, scale) in REDUCERS.items()
    }
    params = sorted(model.namedparams())
    sums = {name: function(n) for name, function in SIMULATED.items()}
    for simulated in sums.values():
        next(simulated)
    reference = {name: np.zeros(param.shape) for name, param in params}
    means = {}
    for worker in range(n):
        gradient_of(worker)
        for name, param in params:
            reference[name] += param.grad
        for comm in comms.values():
            comm.add_grad(model)
        half = _rounded([param.grad for _, param in params])
        for name, simulated in sums.items():
            try:
                simulated.send(half)
            except StopIteration as end:
                means[name] = end.value
        progress()
    for total in reference.values():
        total /= n
    errors: dict = {kind: {} for kind in KINDS}

    def note(name):
        for kind, type_ in KINDS.items():
            errors[kind][name] = _relative_error(model, reference, type_)

    for name, comm in comms.items():
        comm.mean_grad(model)
        note(name)
    for name, mean in means.items():
        start = 0
        for _, param in params:
            param.grad[...] = mean[start : start + param.size].reshape(param.shape)
            start += param.size
        note(name)
    before, after, n_inf, n_nan = map(int, comms['float16, exact sum'].cast_counts)
    return errors, {'flushed': (before - after) / before, 'inf': n_inf, 'nan': n_nan}


def tree(n):
    """Sums n workers' gradients in float16 as NCCL's tree does, then divides the sum by n.

    The GPUs of a host are a chain, whose end adds the sums of up to two other hosts to its own. If
    b is the lowest set bit of host h, its children are h - b/2 and h + b/2, or h plus the next
    smaller step that exists. Host 0 is the root, with one child. Each addition rounds to float16.
    The source is NCCL's own (of June 2026): ``ncclGetBtree`` in src/graph/trees.cc and
    ``runTreeUpDown`` in src/device/all_reduce.h.

    Simplified: NCCL gives half of the data to a second tree, the mirror of this one. And which GPU
    of a host ends the chain depends on its network cards; here it is the last.

    Args:
        n (int): Number of workers.

    Yields:
        None: Send it each worker's float16 gradients, in the order of the workers.

    Returns:
        array: float16, the mean.
    """
    total = yield from _subtree(0, n)
    return _divided(total, n)


def _subtree(host, n):
    left, right = children(host, -(-n // HOST))
    below = (yield from _subtree(left, n)) if left is not None else None
    total = (yield).copy()
    for _ in range(min(HOST, n - HOST * host) - 1):
        add_rounded(total, (yield))
    if below is not None:
        add_rounded(total, below)
    if right is not None:
        add_rounded(total, (yield from _subtree(right, n)))
    return total


def children(host: int, n_hosts: int) -> tuple:
    """Returns a host's two children in NCCL's tree, None for one that does not exist."""
    lowest = host & -host if host else 1 << (n_hosts - 1).bit_length()
    step = lowest // 2
    left = host - step if host and step else None
    while step and host + step >= n_hosts:
        step //= 2
    return left, host + step if step else None


def divided_first(n):
    """Sums n workers' gradients in float16, each of which was divided by n in float16 before.

    PyTorch's hook for DistributedDataParallel does so from 1.10 on, after the cast
    (``fp16_compress_hook`` in torch/distributed/algorithms/ddp_comm_hooks/default_hooks.py). The
    sum is that of a ring: from worker to worker, each addition rounded. For arguments and result
    see :func:`tree`.
    """
    total = _divided((yield), n)
    for _ in range(n - 1):
        add_rounded(total, _divided((yield), n))
    return total


SIMULATED = {'float16, sum of a tree': tree, 'float16, divided first': divided_first}
SUMS = (*REDUCERS, *SIMULATED)


# A float32 quotient, rounded to float16, equals the float16 quotient; so does a sum. NumPy's own
# float16 is slower.


def _divided(half, n):
    wide = _widened(half)
    wide /= np.float32(n)
    return _rounded([wide])


def add_rounded(total, other):
    """Adds a float16 array to another in place, rounded as float16's addition."""
    wide = _widened(total)
    wide += _widened(other)
    total[...] = _rounded([wide])


def _widened(half):
    wide = np.empty(half.size, np.float32)
    kernels.unpack(half, 1.0, [wide])
    return wide


def _rounded(arrays):
    """Returns float32 arrays as one of float16."""
    half = np.empty(sum(array.size for array in arrays), np.float16)
    kernels.pack(arrays, 1.0, half, np.zeros((len(arrays), 4), np.int64))
    return half


def _relative_error(model, reference, type_):
    distance = norm = 0.0
    for link_name, link in model.namedlinks():
        if isinstance(link, type_):
            for name, param in link.namedparams():
                expected = reference[link_name + name]
                distance += np.sum((param.grad - expected) ** 2)
                norm += np.sum(expected**2)
    return float(np.sqrt(distance / norm))


def table(result) -> str:
    """Returns the errors as text: a row for each kind of layer and number of workers."""
    lines = [f'{"error of the mean":20}{"workers":>10}' + ''.join(f'{name:>24}' for name in SUMS)]
    for kind in KINDS:
        for n, errors in result['errors'].items():
            row = ''.join(f'{errors[kind][name]:>24.2e}' for name in SUMS)
            lines.append(f'{kind:20}{n:>10,}{row}')
    for n, cast in result['cast'].items():
        lines.append(
            f'{n:,} workers: the cast flushed {cast["flushed"]:.2%} of the nonzero gradients to '
            f'zero, and made {cast["inf"]} infinite and {cast["nan"]} NaN'
        )
    return '\n'.join(lines)


def plot(errors: dict, out: str):
    """Draws OUT/precision.png: the error of the mean gradient by number of workers.

    Args:
        errors (dict): Number of workers, then kind of layer, then name of the sum, to the relative
            error.
        out (str): The folder. The file is replaced as a whole.
    """
    workers = list(errors)
    kinds = list(errors[workers[0]])
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(10, 4.2), sharex=True, sharey=True, constrained_layout=True
    )
    for axis, kind in zip(axes, kinds):
        for name, style in zip(errors[workers[0]][kind], _STYLES):
            axis.loglog(workers, [errors[n][kind][name] for n in workers], style, label=name)
        axis.set_title(kind)
        axis.set_xlabel('workers n')
        axis.set_xticks(workers, [f'{n:,}' for n in workers])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel('relative error of the mean')
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc='outside lower center', ncols=3)
    save(figure, os.path.join(out, 'precision.png'))


def main(argv):
    """Runs a study.

    Args:
        argv (list of str): ``precision`` or ``accumulation``, then the options.
    """
    name, *words = argv
    is_precision = name == 'precision'
    parser = Parser(prog=f'./run_mpi.sh benchmark {name}', description=__doc__)
    add = parser.add_argument
    if is_precision:
        text = 'measure each of these numbers of workers [%(default)s]'
        add('--workers', default='8,64,1024', metavar='N,N', help=text)
    else:
        text = 'compare a step of N workers [%(default)s]'
        add('--workers', default='8', metavar='N', help=text)
    add(
        '--image-root',
        metavar='FOLDER',
        help='use the images FOLDER/CLASS/FILE [1,437 digits that come along]',
    )
    add('--image-size', type=int, default=32, metavar='N', help='side, in pixels [%(default)s]')
    add(
        '--local-batch-size',
        type=int,
        default=32,
        metavar='N',
        help='images per worker [%(default)s]',
    )
    if is_precision:
        text = 'write precision.json and precision.png to FOLDER [%(default)s]'
        add('--out', default='results/precision', metavar='FOLDER', help=text)
    options = parser.parse_args(words)
    try:
        workers = tuple(sorted({int(n) for n in options.workers.split(',')}))
    except ValueError:
        parser.refuse(f'--workers must be integers, as in 8,64, not {options.workers}')
    if len(workers) > 1 and not is_precision:
        parser.refuse(f'--workers must be one number for {name}, not {options.workers}')
    numbers = {
        '--workers': workers[0],
        '--image-size': options.image_size,
        '--local-batch-size': options.local_batch_size,
    }
    for option, value in numbers.items():
        if value < 1:
            parser.refuse(f'{option} must be above 0, not {value}')
    study = Study(workers, options.local_batch_size, options.image_size, options.image_root)
    device = chainer.get_device('@numpy')
    functions.use(functions.resolve('auto', device), device)
    try:
        if is_precision:
            run(study, options.out)
            print(f'results in {options.out}')
        else:
            accumulation(study)
    except (DataError, OSError, ValueError) as error:
        parser.refuse(reason(error))
