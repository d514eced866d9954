"""Checks that every host is ready for a run, before anybody books a cluster.

The options are those of reproduce/train.py. Every rank inspects its host. All ranks together
all-reduce gradients of the model's size, and time a minibatch. Nothing is trained. It writes
nothing but temporary files: in --out, or in the nearest existing parent, and in TMPDIR. The exit
status is 0 if all is well, 1 with a problem, 2 for wrong options.

    ./run_mpi.sh preflight --hostfile hostfiles/mn1 -n 1024 -- --train-root TRAIN --val-root VAL
"""

from reproduce.job import start

if __name__ == '__main__':
    start.before_mpi()

import os
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from pathlib import Path

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import chainer.functions as F
import numpy as np
from chainer.backends import cuda
from mpi4py import MPI
from PIL import Image

from extensions import nccl, shared_memory
from extensions.communicator_base import first_few
from extensions.virtual_workers import workers_of
from reproduce import dataset, images, listing, loader
from reproduce.job import agreement, functions, janitor, options, output, ranks, report
from reproduce.job.watchdog import Watchdog
from reproduce.listing import DataError, ImageFolder
from reproduce.order import ImageOrder
from reproduce.resnet50 import ResNet50
from reproduce.settings import InputError

_MIB, _GIB = 2**20, 2**30
_NCCL_SHARED_MEMORY = 10 * _MIB  # bytes per rank, roughly (P)
_MARGIN = 1.5  # factor on memory, for validation and prefetched minibatches (P)
_CLOCK_SKEW = 1.0  # seconds; beyond that, logs of several hosts mislead (P)
_COLUMNS = (  # the columns of the table: key, head, format
    ('ranks', 'ranks', '{:d}'),
    ('cores', 'cores', '{:d}'),
    ('gpus', 'GPUs', '{:d}'),
    ('python', 'Python', '{}'),
    ('mpi', 'MPI', '{}'),
    ('nccl', 'NCCL', '{}'),
    ('memory', 'GiB needed', '{:.1f}'),
    ('available', 'GiB free', '{:.1f}'),
    ('gpu_memory', 'GPU GiB needed', '{:.1f}'),
    ('gpu_total', 'GPU GiB', '{:.1f}'),
    ('shared', 'shm MiB needed', '{:.0f}'),
    ('shared_free', 'shm MiB free', '{:.0f}'),
    ('clock', 'clock s', '{:+.3f}'),
    ('minibatch', 'minibatch s', '{:.3f}'),
    ('loading', 'loading s', '{:.3f}'),
)


def main(argv=None):
    """Runs all checks on all ranks. Exits with status 0 if there are no problems, else 1."""
    mpi = MPI.COMM_WORLD
    _refuse_lack_of_files(mpi)
    janitor.remove_those_of_open_mpi()
    arguments = sys.argv[1:] if argv is None else argv
    with Watchdog(mpi, options.watchdog_of(arguments)) as watchdog:
        settings, _ = ranks.on_rank_zero(
            mpi,
            lambda: options.parse(arguments, mpi.size, __doc__, 'preflight'),
            watchdog.part('the options'),
        )
        preflight = Preflight(mpi, watchdog, settings)
        preflight.run()
        everyone = mpi.gather(
            (MPI.Get_processor_name(), sorted(set(preflight.problems)), preflight.row)
        )
        ready = mpi.bcast(everyone and verdict(settings, preflight.n_images, everyone))
    raise ranks.AgreedExit(0 if ready else 1)


class Preflight:
    """The checks of one rank, all of them collective.

    Attributes:
        problems (list of str): The problems that the rank has found.
        row (dict): The rank's values for the table of hosts.
        n_images (int): Number of training images.
    """

    def __init__(self, mpi, watchdog, settings):
        self.problems = []
        self.row = {}
        self.n_images = settings.n_train_images
        self._mpi, self._watchdog, self._settings = mpi, watchdog, settings
        self._folders: list = []
        self._n_classes = 1000
        self._fits = self._has_functions = True
        self._free_disk = None
        self._comm = self._model = self._optimizer = None
        self._start = (_resident(), _available_memory())

    def run(self):
        """Runs all checks. Without a communicator or enough memory, skips those that need it."""
        self._list_images()
        self._check('versions', self._versions)
        self._check('clocks', self._clocks)
        self._check('--out', self._output)
        self._check('plots', self._plots)
        self._check('images', self._images)
        self._check('the communicator', self._communicator)
        if self._comm:
            on_gpus = extensions.device_of(self._comm).xp is not np
            self._check('the all-reduce', self._all_reduce)
            if on_gpus:
                self._check('--functions', self._functions)
            self._check('memory', self._memory)
            if self._mpi.allreduce(self._fits, MPI.LAND):
                self._check('--loader', self._loader)
                if not on_gpus:
                    self._check('--functions', self._functions)
                if self._mpi.allreduce(self._has_functions, MPI.LAND):
                    self._check('a minibatch', self._minibatch)

    def _check(self, name, function):
        if self._mpi.rank == 0:
            print(f'checking {name} ...', flush=True)
        with self._watchdog.part(f'the check of {name}'):
            function()
        self._mpi.barrier()

    def _list_images(self):
        """Lists the images on rank 0, once, and sends the lists to all ranks."""
        packed = None
        with self._watchdog.part('the list of images', listing.position):
            if self._mpi.rank == 0:
                packed = self._listed()
        self._folders = [ImageFolder.unpack(folder) for folder in self._mpi.bcast(packed) or ()]

    def _listed(self):
        try:
            train_root, _ = dataset.roots(self._settings)
            if not train_root:
                return None
            print('listing the images ...', flush=True)
            folders = dataset.list_folders(self._settings)
            self.n_images = len(folders[0])
            dataset.check_total_batch(self._settings, self.n_images)
            return [folder.pack() for folder in folders]
        except (InputError, DataError) as error:
            self.problems.append(str(error))
            return None

    def _versions(self):
        try:
            functions.find(self._settings.functions)  # its version is compared, too
        except InputError as error:
            self._has_functions = False
            self.problems.append(str(error))
        own = agreement.of_host()
        for name, first in self._mpi.bcast(own).items():
            if own.get(name) != first:
                self.problems.append(
                    f'{name} is {own.get(name)}, but {first} on rank 0: use the same on every host'
                )
        gpus = nccl.inspect(self._mpi.rank)
        hosts = self._mpi.allgather(MPI.Get_processor_name())
        self.row.update(
            ranks=hosts.count(hosts[self._mpi.rank]),
            cores=len(os.sched_getaffinity(0)),
            gpus=len(gpus.bus_ids),
            python=own['python'],
            mpi=own['mpi'].rpartition(' ')[2],
            nccl=gpus.nccl_version,
        )

    def _clocks(self):
        """Measures the clocks against rank 0's, by the quickest of ten questions and answers."""
        mpi, quickest, ahead = self._mpi, np.inf, 0.0
        for rank in range(1, mpi.size):
            for _ in range(10):
                if mpi.rank == 0:
                    mpi.recv(source=rank, tag=0)
                    mpi.send(time.time(), rank)
                elif mpi.rank == rank:
                    asked = time.time()
                    mpi.send(None, 0)
                    theirs = mpi.recv(source=0, tag=0)
                    answered = time.time()
                    if answered - asked < quickest:
                        quickest, ahead = answered - asked, (asked + answered) / 2 - theirs
        self.row['clock'] = ahead
        if abs(ahead) > _CLOCK_SKEW:
            self.problems.append(
                f"its clock is {ahead:+.1f} s off rank 0's: synchronize clocks, by NTP or chrony"
            )

    def _output(self):
        """Writes a temporary file, on rank 0 alone, and measures the free space."""
        if self._mpi.rank:
            return
        out = Path(self._settings.out).absolute()
        try:
            output.refuse_other_run(self._settings)
            place = next(folder for folder in (out, *out.parents) if folder.exists())
            with tempfile.NamedTemporaryFile(dir=place) as file:
                file.write(bytes(_MIB))
                file.flush()
                os.fsync(file.fileno())
            self._free_disk = shutil.disk_usage(place).free
        except InputError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(
                f'--out {out} cannot be written: {error.strerror}; choose another folder'
            )

    def _plots(self):
        """Draws the plot of a training that has ended its first epoch, on rank 0 alone."""
        if self._mpi.rank:
            return
        keys = 'main/loss validation/main/loss validation/main/accuracy lr alpha_sgd'.split()
        try:
            from reproduce.job import plots  # here, because the other ranks need no matplotlib

            with tempfile.TemporaryDirectory() as folder:
                plots.curves([{'epoch': 1, **dict.fromkeys(keys, 0.5)}], self._settings, folder)
        except Exception as error:  # noqa: BLE001  (of matplotlib, fonts, or folders)
            self.problems.append(f'curves.png cannot be drawn: {error!r}; mend matplotlib')

    def _images(self):
        """Compares the sizes of some images with rank 0's, and decodes a few."""
        if not self._folders:
            return
        self._n_classes = len(self._folders[0].classes)
        sample = agreement.sample(*self._folders)
        unreadable = sorted(path for path, size in sample.items() if size is None)
        if unreadable:
            self.problems.append(f'{unreadable[0]} cannot be read: copy the folder to every host')
        elif self._mpi.bcast(sample) != sample:
            self.problems.append("its images differ in size from rank 0's: copy the folder again")
        else:
            self._decode(list(sample))

    def _decode(self, paths, n=8):
        s = self._settings
        start = time.perf_counter()
        try:
            for i, path in enumerate(paths[:: max(1, len(paths) // n)]):
                images.train_image(path, images.augmentation_rng(0, 0, i), s.preprocessing)
        except DataError as error:
            self.problems.append(str(error))
            return
        seconds = (time.perf_counter() - start) / (i + 1) * s.local_batch_size
        self.row['loading'] = seconds / max(1, loader.parse(s.loader)[1])

    def _loader(self):
        """Loads a minibatch as the training does: --loader's processes, its memory, its sockets."""
        s = self._settings
        with tempfile.TemporaryDirectory() as folder:
            janitor.remove_after_end(folder)
            os.mkdir(os.path.join(folder, '0'))
            Image.new('RGB', (s.image_size, s.image_size)).save(os.path.join(folder, '0', '0.png'))
            counts = np.array([s.local_batch_size])
            one = ImageFolder(folder, ('0',), counts, b'0.png\0' * s.local_batch_size)
            order = ImageOrder(len(one), 1, s.local_batch_size, s.seed)
            pair = one, one, order, s.preprocessing, s.seed, range(1)
            try:
                with loader.ImageLoader(*pair, s.loader, s.validation_batch_size) as batches:
                    batches.train_batch(0, 0)
            except (DataError, OSError, RuntimeError, MemoryError) as error:
                self.problems.append(f'--loader {s.loader} does not work: {error!r}')

    def _communicator(self):
        s = self._settings
        try:
            workers_of(self._mpi.rank, self._mpi.size, s.workers)
            self._comm = extensions.create_communicator(
                mpi_comm=self._mpi, **s.communicator_options
            )
        except (ValueError, extensions.CommunicatorError) as error:  # raised on all ranks
            self.problems += [str(error)] * (self._mpi.rank == 0)
            return
        model = ResNet50(self._n_classes, s.width, s.stem, s.seed, s.shallow)
        model.to_device(extensions.device_of(self._comm))
        self._model = model
        self._optimizer = extensions.RMSpropWarmup(s.lr_base).setup(model)

    def _all_reduce(self, repeat=5):
        """All-reduces zeros and ones, whose sum float16 holds exactly in any order."""
        xp = extensions.device_of(self._comm).xp
        size, seconds = self._mpi.size, []
        for _ in range(1 + repeat):
            for param in self._model.params():
                ramp = xp.arange(param.size).reshape(param.shape)
                param.grad = ((ramp + self._mpi.rank) % 3 == 0).astype(np.float32)
            self._mpi.barrier()
            start = time.perf_counter()
            self._comm.multi_node_mean_grad(self._model)
            _synchronize(xp)
            seconds.append(time.perf_counter() - start)
        self.row['all_reduce'] = float(np.median(seconds[1:]))
        for name, param in self._model.namedparams():
            ramp = xp.arange(param.size).reshape(param.shape)
            # The share of ranks r with (ramp + r) % 3 == 0.
            expected = (size + 2 - (-ramp) % 3) // 3 / size
            error = float(abs(param.grad - expected).max())
            if not error < 2e-3:  # float16 rounds 1 / size and the mean
                self.problems.append(
                    f'the all-reduce is wrong: {name} is {error:.3g} off; check MPI and the network'
                )
                return

    def _memory(self):
        """Estimates the memory of a run, from the peaks of memory for two and for three images."""
        s = self._settings
        peaks = []
        tracemalloc.start()
        for n in (2, 3):
            tracemalloc.reset_peak()
            self._step_of(n)
            peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        image = peaks[1] - peaks[0]
        before, available = self._start
        rank = _peak_memory() + max(0, s.local_batch_size - 3) * image
        kind, n = loader.parse(s.loader)
        processes = n if kind == 'processes' else 0
        shared = (2 * n + 1) * (s.local_batch_size + s.validation_batch_size) * 3 * s.image_size**2
        need = _MARGIN * self.row['ranks'] * (rank + processes * before + shared)
        self.row['memory'] = need / _GIB
        self.row['available'] = (available + self.row['ranks'] * before) / _GIB
        if self.row['memory'] > self.row['available']:
            self._fits = False
            self.problems.append(
                'not enough memory (see the table): use fewer ranks per host, a smaller '
                '--local-batch-size, or fewer processes in --loader'
            )
        self._device_memory()
        on_gpus = extensions.device_of(self._comm).xp is not np
        files: dict = {}
        host = MPI.Get_processor_name()
        for theirs, mapped in self._mpi.allgather((host, _shared_memory_to_come())):
            files.update(mapped if theirs == host else {})
        shared = sum(files.values()) + on_gpus * self.row['ranks'] * _NCCL_SHARED_MEMORY
        free = shutil.disk_usage('/dev/shm').free
        self.row.update(shared=shared / _MIB, shared_free=free / _MIB)
        if shared > free:
            self.problems.append(
                '/dev/shm is too small (see the table): enlarge it; docker run has --shm-size'
            )
        checkpoints = (s.keep_checkpoints + 2) * 12 * self._model.count_params()
        if self._free_disk is not None and self._free_disk < checkpoints:
            self.problems.append(
                f'--out {s.out} has {self._free_disk / _GIB:.1f} GiB left, but checkpoints take '
                f'{checkpoints / _GIB:.1f} GiB: choose another folder, or free space'
            )

    def _device_memory(self):
        """Estimates the memory of a GPU in the same way, from the size of the memory pools."""
        if extensions.device_of(self._comm).xp is np:
            return
        taken = []
        for n in (2, 3):
            report.free_device_memory()
            self._step_of(n)
            taken.append(report.device_memory())
        need = taken[1] + max(0, self._settings.local_batch_size - 3) * (taken[1] - taken[0])
        _, total = cuda.cupy.cuda.runtime.memGetInfo()
        self.row.update(gpu_memory=_MARGIN * need / _GIB, gpu_total=total / _GIB)
        if _MARGIN * need > total:
            self._fits = False
            self.problems.append(
                'not enough memory on a GPU (see the table): choose a smaller --local-batch-size'
            )

    def _functions(self):
        """Chooses --functions for what is measured next.

        On CPUs this is not the memory: only that of Chainer's own functions, which need more, can
        be measured.
        """
        if not self._mpi.allreduce(self._has_functions, MPI.LAND):
            return
        try:
            device = extensions.device_of(self._comm)
            functions.choose(self._mpi, self._settings.functions, device)
        except InputError as error:
            self._has_functions = False
            self.problems.append(str(error))

    def _minibatch(self):
        """Times forward, backward and update, on all ranks at once."""
        self._step_of(self._settings.local_batch_size)
        seconds = []
        while len(seconds) < 3 and sum(seconds) < 10:
            self._mpi.barrier()
            start = time.perf_counter()
            self._step_of(self._settings.local_batch_size)
            seconds.append(time.perf_counter() - start)
        self.row['minibatch'] = float(np.median(seconds))
        start = time.perf_counter()
        self._optimizer.update()
        _synchronize(extensions.device_of(self._comm).xp)
        self.row['update'] = time.perf_counter() - start

    def _step_of(self, n_images):
        device = extensions.device_of(self._comm)
        side = self._settings.image_size
        x = device.send(np.random.RandomState(0).rand(n_images, 3, side, side).astype(np.float32))
        t = device.send(np.zeros(n_images, np.int32))
        self._model.cleargrads()
        F.softmax_cross_entropy(self._model(x), t).backward()
        _synchronize(device.xp)


def _refuse_lack_of_files(mpi):
    """Ends the preflight before the ranks connect to each other: without files they would hang."""
    lack = start.lack_of_files(mpi.size)
    if not lack:
        return
    if os.environ.get('OMPI_COMM_WORLD_LOCAL_RANK', '0') == '0':  # one line per host
        who = f'rank {mpi.rank} on {MPI.Get_processor_name()}'
        print(f'problem: {lack} ({who})\nnot ready: 1 problem', flush=True)
        mpi.Abort(1)
    time.sleep(60)


def verdict(settings, n_images, everyone) -> bool:
    """Prints the table of hosts, the predicted time and the problems.

    Args:
        settings (~reproduce.settings.Settings): Settings of the run.
        n_images (int): Number of training images.
        everyone (list): For each rank, its host, problems and row.

    Returns:
        bool: Whether no rank has a problem.
    """
    hosts, who = defaultdict(list), defaultdict(list)
    for rank, (host, problems, row) in enumerate(everyone):
        hosts[host].append(row)
        for problem in problems:
            who[problem].append(f'rank {rank} on {host}')
    head = ['host', *(title for _, title, _ in _COLUMNS)]
    lines = [head, *([host, *_cells(rows)] for host, rows in hosts.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print('  '.join(cell.rjust(width) for cell, width in zip(line, widths)))
    print(f'versions: {report.in_words(report.versions())}')
    rows = [row for _, _, row in everyone]
    if all('minibatch' in row for row in rows):
        print(_estimate(settings, n_images, rows))
    for problem, of_ranks in who.items():
        print(f'problem: {problem} ({first_few(of_ranks)})')
    n = len(who)
    print(f'not ready: {n} problem{"s" * (n > 1)}' if n else 'ready', flush=True)
    return not who


def _cells(rows):
    """Yields the cells of a host: for each column, the worst value of its ranks."""
    for key, _, form in _COLUMNS:
        values = [row[key] for row in rows if key in row]
        yield form.format(max(values, key=abs if key == 'clock' else None)) if values else '-'


def _estimate(settings, n_images, rows) -> str:
    each = settings.workers // len(rows)
    slowest = {
        key: max(row.get(key, 0) for row in rows)
        for key in ('minibatch', 'loading', 'all_reduce', 'update')
    }
    # With a core for every loader process, loading runs beside the computation.
    beside = all(r['cores'] >= r['ranks'] * (1 + loader.parse(settings.loader)[1]) for r in rows)
    both = slowest['minibatch'], slowest['loading']
    seconds = each * (max(both) if beside else sum(both))
    seconds += slowest['all_reduce'] + slowest['update']
    n_iterations = settings.iterations(n_images)
    return (
        f'all-reduce in {settings.allreduce_grad_dtype}: right, {slowest["all_reduce"]:.3f} s; '
        f'update {slowest["update"]:.3f} s\n'
        f'predicted: {seconds:.3g} s per iteration of {each:,} minibatch{"es" * (each > 1)} per '
        f'rank; {n_iterations:,} iteration{"s" * (n_iterations > 1)} in '
        f'{report.duration(n_iterations * seconds)}, without validation; loading is '
        + ('measured' if slowest['loading'] else 'not included: no image folder was given')
    )


def _synchronize(xp):
    if xp is not np:
        xp.cuda.Device().synchronize()


def _status(path, key) -> int:
    """Returns a value from a file of /proc, which has kB, in bytes."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(':')
        if name == key:
            return 1024 * int(value.split()[0])
    raise KeyError(key)


def _resident() -> int:
    """Returns the memory that this process has now, in bytes."""
    return _status('/proc/self/status', 'VmRSS')


def _peak_memory() -> int:
    """Returns the most memory that this process has had, in bytes."""
    return _status('/proc/self/status', 'VmHWM')


def _available_memory() -> int:
    """Returns the free memory of the host, or of this process's control group if less, in bytes."""
    available = _status('/proc/meminfo', 'MemAvailable')
    group = Path('/sys/fs/cgroup')
    try:
        limit = int((group / 'memory.max').read_text())
        used = int((group / 'memory.current').read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return available
    return min(available, limit - used)


def _shared_memory_to_come() -> dict:
    """Returns {path: bytes} that each file of this process in /dev/shm may still take.

    MPI's files have their final size at once, but get memory only when MPI writes to them. Files of
    processes that have ended, and of other jobs, do not count.
    """
    to_come = {}
    for path in shared_memory.mapped():
        if not path.startswith('/dev/shm/'):
            continue
        try:
            status = os.stat(path)
        except OSError:  # removed
            continue
        to_come[path] = max(0, status.st_size - 512 * status.st_blocks)
    return to_come


if __name__ == '__main__':
    ranks.run(main)
