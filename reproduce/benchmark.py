"""Measures the parts side by side with their peers: quote the ratios, not the milliseconds.

python -m reproduce.benchmark update          the update rule on ResNet-50's parameters, one core
python -m reproduce.benchmark statistics      the all-reduce of BN statistics, on 16 ranks
python -m reproduce.benchmark allreduce       the all-reduce of ResNet-50's gradients, on 4 ranks
python -m reproduce.benchmark precision       what float16 costs the mean of ResNet-50's gradients:
                                              8, 64 and 1,024 workers played by this process
python -m reproduce.benchmark accumulation    8 workers against gradient accumulation, and against
                                              one large batch
python -m reproduce.benchmark workers         8 virtual workers against Chainer's StandardUpdater
python -m reproduce.benchmark checkpoint      a checkpoint of ResNet-50 against a plain np.savez
python -m reproduce.benchmark loader          decoding and augmentation against plain Pillow; two
                                              loader processes against one
python -m reproduce.benchmark listing         1,281,167 names from their manifest, on 4 ranks
python -m reproduce.benchmark iteration       iteration and all-reduce by number of workers, and
                                              against ChainerMN's own way; --help tells more
python -m reproduce.benchmark invariance      8 workers on 1, 2, 4 and 8 processes: the same bits?
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

_THREADS = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


def side_by_side(candidates, repeat, synchronize=lambda: None) -> dict:
    """Times functions in turn, A B C A B C ...: a machine whose speed drifts hits all alike.

    Args:
        candidates (dict): Name to function.
        repeat (int): Rounds that count; one more comes first.
        synchronize (callable): Called before each measurement.

    Returns:
        dict: Name to the list of seconds.
    """
    seconds: dict = {name: [] for name in candidates}
    for round_ in range(repeat + 1):
        for name, function in candidates.items():
            synchronize()
            start = time.perf_counter()
            function()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(title, seconds, ours) -> dict:
    """Prints medians, and the median over the rounds of the ratio ours / peer.

    Returns:
        dict: The same, for JSON.
    """
    print(title)
    print(f'{"":44}{"ms":>9}  {"ours / it":>9}')
    result = {}
    for name, values in seconds.items():
        ratio = float(np.median(np.divide(seconds[ours], values)))
        median = float(np.median(values))
        result[name] = {'median_seconds': median, 'ratio_of_ours': ratio}
        print(f'{name:44}{1000 * median:>9.2f}  {ratio:>9.3f}')
    return result


def update(repeat: int) -> dict:
    """The update rule against moving its seven streams, and against Chainer's optimizers."""
    import extensions  # isort: skip
    from chainer import optimizers

    from extensions import kernels
    from reproduce.resnet50 import ResNet50

    rng = np.random.RandomState(0)

    def update_of(optimizer):
        model = ResNet50(seed=0)
        for param in model.params():
            param.grad = rng.standard_normal(param.shape).astype(np.float32) * 1e-3
        return optimizer.setup(model).update

    n = ResNet50(seed=0).count_params()
    streams = {name: np.ones(n, np.float32) for name in ('param', 'grad', 'm', 'delta')}
    plain = {name: array.copy() for name, array in streams.items()}
    block = 65536
    scratch = np.empty(block, np.float32)

    def move_seven_streams():
        for start in range(0, n, block):
            for name, stream in streams.items():
                part = stream[start : start + block]
                np.copyto(scratch[: len(part)], part)
                if name != 'grad':
                    np.copyto(part, scratch[: len(part)])

    def plain_statements():
        p = plain
        p['m'] = 0.99 * p['m'] + (1 - 0.99) * p['grad'] ** 2
        p['delta'] = 0.9 * p['delta'] - (0.5 + 0.1 / (np.sqrt(p['m']) + 1e-8)) * p['grad']
        p['param'] += 0.1 * p['delta']

    update_in_blocks = update_of(extensions.RMSpropWarmup(0.1, 0.5, 0.1))

    def without_c():
        compiled, kernels.compiled = kernels.compiled, {}
        update_in_blocks()
        kernels.compiled = compiled

    ours = f'RMSpropWarmup, {"C" if kernels.compiled else "NumPy: no C compiler at installation"}'
    candidates = {
        ours: update_of(extensions.RMSpropWarmup(0.1, 0.5, 0.1)),
        'the same, NumPy in blocks': without_c,
        'the same, alpha_rmsprop = 0': update_of(extensions.RMSpropWarmup(0.1)),
        'moving the seven streams': move_seven_streams,
        'plain NumPy statements': plain_statements,
        'chainer.optimizers.RMSprop': update_of(optimizers.RMSprop()),
        'chainer.optimizers.CorrectedMomentumSGD': update_of(optimizers.CorrectedMomentumSGD()),
    }
    return table(f'update of {n:,} float32 parameters', side_by_side(candidates, repeat), ours)


def allreduce(repeat: int) -> dict | None:
    """Our float16 all-reduce against MPI's, whose sum of float16 has to be written in Python.

    From float32 gradients to their float32 mean: the casts are included on all sides.
    """
    import extensions  # isort: skip
    from mpi4py import MPI

    from reproduce.resnet50 import ResNet50

    comm = extensions.create_communicator('mpi', 'float16')
    model = ResNet50(seed=0)
    params = [param for _, param in sorted(model.namedparams())]
    rng = np.random.RandomState(comm.rank)
    for param in params:
        param.grad = rng.standard_normal(param.shape).astype(np.float32) * 1e-3
    n = sum(param.size for param in params)
    buffers = {dtype: np.empty(n, dtype) for dtype in (np.float16, np.float32)}

    def add_float16(source, target, _):
        total = np.frombuffer(target, np.float16)
        total += np.frombuffer(source, np.float16)

    sum_of_float16 = MPI.Op.Create(add_float16, commute=True)

    def plain(dtype, datatype, op):
        flat, start = buffers[dtype], 0
        for param in params:
            flat[start : start + param.size] = param.grad.ravel()
            start += param.size
        comm.mpi_comm.Allreduce(MPI.IN_PLACE, [flat, datatype], op)
        flat /= comm.size
        start = 0
        for param in params:
            param.grad[...] = flat[start : start + param.size].reshape(param.shape)
            start += param.size

    ours = 'HalfPrecisionMpiCommunicator, float16'
    candidates = {
        ours: lambda: comm.multi_node_mean_grad(model),
        'MPI.Allreduce float16, operator in NumPy': lambda: plain(
            np.float16, MPI.INT16_T, sum_of_float16
        ),
        'MPI.Allreduce float32': lambda: plain(np.float32, MPI.FLOAT, MPI.SUM),
    }
    title = f'mean of {n:,} gradients'
    return slowest_rank(title, candidates, repeat, comm, ours)


def statistics(repeat: int) -> dict | None:
    """The all-reduce of ResNet-50's BN statistics against ChainerMN's ``AllreducePersistent``."""
    import extensions  # isort: skip
    from chainermn.extensions import AllreducePersistent

    from reproduce.resnet50 import ResNet50

    comm = extensions.create_communicator('naive', 'float32')
    model = ResNet50(seed=0)
    ours = 'AllreduceBatchStatistics'
    candidates = {
        ours: extensions.AllreduceBatchStatistics(model, comm),
        'chainermn AllreducePersistent': AllreducePersistent(model, comm),
    }
    return slowest_rank('BN statistics of ResNet-50', candidates, repeat, comm, ours)


def slowest_rank(title, candidates, repeat, comm, ours) -> dict | None:
    """The table, on rank 0, of the times that the slowest rank took."""
    from mpi4py import MPI

    seconds = side_by_side(candidates, repeat, comm.mpi_comm.Barrier)
    slowest = {name: np.array(values) for name, values in seconds.items()}
    for values in slowest.values():
        comm.mpi_comm.Allreduce(MPI.IN_PLACE, values, MPI.MAX)
    if comm.rank > 0:
        return None
    where = f'{comm.size} ranks on {comm.inter_size} host(s), slowest rank'
    return table(f'{title}, {where}', slowest, ours)


def workers(repeat: int) -> dict:
    """256 images by 8 virtual workers of this process, and by 8 updates of plain ones."""
    import extensions  # isort: skip
    import chainer
    import chainer.functions as F

    from reproduce.resnet50 import ResNet50

    n, b = 8, 32
    rng = np.random.RandomState(0)
    x = rng.standard_normal((b, 3, 32, 32)).astype(np.float32)
    t = rng.randint(10, size=b).astype(np.int32)
    comm = extensions.create_communicator('mpi')

    def optimizer():
        return extensions.RMSpropWarmup(0.01).setup(ResNet50(10, width=16, seed=0))

    def virtual(n_workers):
        target = optimizer()
        updater = extensions.VirtualWorkersUpdater(
            lambda iteration, worker: (x, t),
            target,
            lambda x, t: F.softmax_cross_entropy(target.target(x), t),
            comm,
            n_workers,
            (n_workers * b, 10**6),
            batch_statistics=extensions.AllreduceBatchStatistics(target.target, comm),
        )
        return lambda: [updater.update() for _ in range(n // n_workers)]

    def standard():
        target = optimizer()
        iterator = chainer.iterators.SerialIterator(
            chainer.datasets.TupleDataset(x, t), b, shuffle=False
        )
        updater = chainer.training.StandardUpdater(
            iterator,
            target,
            converter=lambda batch, device: (x, t),
            loss_func=lambda x, t: F.softmax_cross_entropy(target.target(x), t),
        )
        return lambda: [updater.update() for _ in range(n)]

    ours = f'VirtualWorkersUpdater, {n} workers'
    candidates = {
        ours: virtual(n),
        f'the same, 1 worker, {n} updates': virtual(1),
        f'chainer StandardUpdater, {n} updates': standard(),
    }
    title = f'{n} x {b} images through a ResNet-50 of width 16'
    return table(title, side_by_side(candidates, repeat), ours)


def checkpoint(repeat: int) -> dict:
    """A checkpoint, on the disk and read again, against np.savez and against copying the bytes."""

    from extensions.checkpoint import write
    from reproduce.resnet50 import ResNet50

    rng = np.random.RandomState(0)
    entries = {
        f'{name}/{kind}': rng.standard_normal(param.shape).astype(np.float32)
        for name, param in ResNet50(seed=0).namedparams()
        for kind in ('data', 'm', 'delta')
    }
    everything = np.concatenate([array.ravel() for array in entries.values()])
    with tempfile.TemporaryDirectory(dir='.') as folder:
        path = Path(folder)

        def save(name, function, flush):
            with open(path / 'new', 'wb') as file:
                function(file)
                file.flush()
                if flush:
                    os.fsync(file.fileno())
            os.replace(path / 'new', path / name)

        def savez(file):
            np.savez(file, **entries)

        ours = 'Checkpointer: flushed to the disk, verified'
        candidates = {
            ours: lambda: write(path / 'checkpoint.npz', entries, {}),
            'np.savez, flushed to the disk': lambda: save('flushed', savez, True),
            'np.savez': lambda: save('plain', savez, False),
            'the bytes, flushed to the disk': lambda: save('bytes', everything.tofile, True),
            'the bytes': lambda: save('unflushed', everything.tofile, False),
        }
        title = f'{everything.nbytes / 2**20:,.0f} MiB: parameters, m and delta of ResNet-50'
        return table(title, side_by_side(candidates, repeat), ours)


def invariance(layouts=((1, 8), (2, 4), (4, 2), (8, 1))) -> bool:
    """Trains with 8 workers on several numbers of processes, and prints digests of the results.

    Each run is 23 iterations of 128 digits, over the border of an epoch, augmented, with loader
    processes.

    Args:
        layouts (tuple): Pairs of processes and workers each.

    Returns:
        bool: Whether all runs gave the same bits.
    """
    found = []
    for processes, each in layouts:
        with tempfile.TemporaryDirectory() as out:
            options = (
                f'--preset smoke --workers {processes * each} --local-batch-size 16 --epochs 2'
            )
            done = start_ranks(
                processes,
                [out, *options.split(), '--width', '8', '--communicator', 'mpi'],
                'reproduce.invariance',
                stdout=subprocess.DEVNULL,
            )
            if done.returncode:
                sys.exit(done.returncode)
            found.append(json.loads((Path(out) / 'digests.json').read_text()))
        if len(found) == 1:
            print(f'{"processes x workers each":26}' + ''.join(f'{n:18}' for n in found[0]))
        row = ''.join(f'{digest[:16]:18}' for digest in found[-1].values())
        print(f'{processes:9} x {each:<14}{row}', flush=True)
    same = all(digests == found[0] for digests in found)
    print('the same bits' if same else 'the bits differ')
    return same


def _names_like_imagenet(root):
    """A listing of ROOT with as many classes and images as ImageNet's; makes the empty folders."""
    from reproduce.listing import ImageFolder, fingerprint

    rng = np.random.RandomState(0)
    classes = [f'n{number:08}' for number in np.sort(rng.choice(10**8, 1000, replace=False))]
    counts = np.full(1000, 1281) + (np.arange(1000) < 167)
    files = bytearray()
    for name, n in zip(classes, counts):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (0, 0))
        numbers = np.sort(rng.choice(10**5, n, replace=False))
        files += ''.join(f'{name}_{number}.JPEG\0' for number in numbers).encode()
    mark, _ = fingerprint(root)
    return ImageFolder(str(root), tuple(classes), counts, bytes(files), mark)


def manifest(repeat: int) -> dict | None:
    """A training set of ImageNet's size: from its manifest to all ranks, against pickling names."""
    from mpi4py import MPI

    from reproduce import listing

    mpi = MPI.COMM_WORLD
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / 'train'
        if mpi.rank == 0:
            made = _names_like_imagenet(root)
            listing.keep(made, folder)
        sent = None

        def from_manifest():
            nonlocal sent
            sent = listing.listing_of(root, folder).pack() if mpi.rank == 0 else None
            return listing.ImageFolder.unpack(mpi.bcast(sent)).labels

        names = [made.name(i) for i in range(len(made))] if mpi.rank == 0 else None
        ours = 'manifest, packed, on every rank'
        candidates = {ours: from_manifest, 'pickled list of names': lambda: mpi.bcast(names)}
        seconds = side_by_side(candidates, repeat, mpi.barrier)
        slowest = {name: np.max(mpi.allgather(values), axis=0) for name, values in seconds.items()}
    if mpi.rank > 0:
        return None
    result = table(f'{len(made):,} images in 1,000 classes, {mpi.size} ranks', slowest, ours)
    megabytes = len(pickle.dumps(sent)) / 1e6
    print(f'{megabytes:.1f} MB on the wire; pickled names: {len(pickle.dumps(names)) / 1e6:.1f} MB')
    return {**result, 'megabytes': megabytes}


def load(repeat: int) -> dict:
    """Loading images: see :mod:`reproduce.loading`."""
    from reproduce import loading

    return loading.run(repeat)


_MEASURES = {
    'update': update,
    'statistics': statistics,
    'allreduce': allreduce,
    'workers': workers,
    'checkpoint': checkpoint,
    'loader': load,
    'listing': manifest,
}


def start_ranks(n: int, arguments, module='reproduce.benchmark', hostfile=None, **options):
    """Runs a module under mpiexec; returns the CompletedProcess."""
    beside = Path(sys.executable).parent / 'mpiexec'
    mpiexec = os.environ.get('MPIEXEC') or (str(beside) if beside.exists() else 'mpiexec')
    environment = {
        'PRTE_MCA_rmaps_default_mapping_policy': ':oversubscribe',
        'OMPI_MCA_rmaps_base_oversubscribe': '1',  # the same for Open MPI 4
        # A rank's loader processes would share the one core that it is tied to.
        'PRTE_MCA_hwloc_default_binding_policy': 'none',
        'OMPI_MCA_hwloc_base_binding_policy': 'none',
        **{name: '1' for name in _THREADS},
        **os.environ,
    }
    if os.geteuid() == 0:
        environment.update(OMPI_ALLOW_RUN_AS_ROOT='1', OMPI_ALLOW_RUN_AS_ROOT_CONFIRM='1')
    on_hosts = []
    if hostfile:
        on_hosts = ['--hostfile', str(hostfile)]
        version = subprocess.run([mpiexec, '--version'], check=True, stdout=subprocess.PIPE).stdout
        if b'Open' in version:  # which hands on to other hosts what is named
            names = (*_THREADS, 'PATH', 'LD_LIBRARY_PATH', 'PYTHONPATH')
            on_hosts += [word for name in names if name in environment for word in ('-x', name)]
    command = [mpiexec, '-n', str(n), *on_hosts, sys.executable, '-m', module, *arguments]
    return subprocess.run(command, env=environment, check=False, **options)


def study_precision(parser, options):
    from reproduce import precision
    from reproduce.listing import DataError

    try:
        workers = tuple(sorted(int(n) for n in options.workers.split(',')))
    except ValueError:
        workers = (0,)
    if min(*workers, options.image_size, options.local_batch_size, 1) < 1:
        parser.error('--workers, --image-size and --local-batch-size must be integers above 0')
    study = precision.Study(
        workers, options.local_batch_size, options.image_size, options.image_root
    )
    try:
        if options.what == 'accumulation':
            precision.accumulation(study)
            return
        precision.run(study, options.out)
    except (DataError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f'results in {options.out}')


def main():
    if sys.argv[1:2] == ['iteration']:
        from reproduce import iteration

        iteration.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog='python -m reproduce.benchmark',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    others = ('precision', 'accumulation', 'iteration', 'invariance')
    parser.add_argument('what', choices=[*_MEASURES, *others])
    parser.add_argument(
        '--ranks', type=int, help='of statistics [16], allreduce [4] and listing [4]'
    )
    parser.add_argument('--repeat', type=int, default=15, help='rounds that count [15]')
    parser.add_argument('--json', metavar='FILE', help='write the figures there too')
    group = parser.add_argument_group('precision and accumulation')
    group.add_argument('--workers', default='8,64,1024', help='numbers of workers [8,64,1024]')
    group.add_argument('--image-root', metavar='FOLDER', help='CLASS/FILE [the digits that ship]')
    group.add_argument('--image-size', type=int, default=32, help='pixels [32]')
    group.add_argument('--local-batch-size', type=int, default=32, help='images of a worker [32]')
    group.add_argument('--out', default='results/precision', help='folder [results/precision]')
    options = parser.parse_args()
    if options.what in ('precision', 'accumulation'):  # with all cores
        study_precision(parser, options)
        return
    if options.what == 'invariance':
        sys.exit(0 if invariance() else 1)
    for name in _THREADS:
        os.environ.setdefault(name, '1')
    is_rank = any(name in os.environ for name in ('OMPI_COMM_WORLD_SIZE', 'PMI_SIZE'))
    ranks = {'statistics': 16, 'allreduce': 4, 'listing': 4}.get(options.what)
    if ranks and not is_rank:
        sys.exit(start_ranks(options.ranks or ranks, sys.argv[1:]).returncode)
    result = _MEASURES[options.what](options.repeat)
    if result is not None and options.json:
        content = {'benchmark': options.what, 'machine': platform.platform(), 'figures': result}
        content['python'], content['numpy'] = platform.python_version(), np.__version__
        Path(options.json).write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
    main()
