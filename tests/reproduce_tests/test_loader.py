import concurrent.futures
import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reproduce import images, loader
from reproduce.listing import DataError, ImageFolder, list_images
from reproduce.order import ImageOrder

PREPROCESSING = images.Preprocessing(image_size=16, resize=20)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp('images')
    rng = np.random.RandomState(0)
    for name in 'abc':
        (top / name).mkdir()
        for i in range(7):
            Image.fromarray(rng.randint(0, 256, (30, 40, 3), np.uint8)).save(
                top / name / f'{i}.png'
            )
    return list_images(top)


def loader_of(folder, how='serial', workers=range(2), **options):
    order = ImageOrder(len(folder), 2, 4, seed=1)
    return loader.ImageLoader(
        folder, folder, order, PREPROCESSING, 1, workers, how, validation_batch_size=4, **options
    )


def test_batches_are_what_the_order_and_the_augmentation_say(folder):
    with loader_of(folder) as serial:
        for iteration in (0, 3, 1000):
            for worker in range(2):
                pixels, labels = serial.train_batch(iteration, worker)
                first = iteration * 8 + worker * 4
                for k in range(4):
                    epoch, position = divmod(first + k, 21)
                    index = np.random.RandomState([1, epoch]).permutation(21)[position]
                    assert labels[k] == index // 7
                    rng = np.random.RandomState([1, epoch, index])
                    expected = images.train_image(folder.path(index), rng, PREPROCESSING)
                    np.testing.assert_array_equal(pixels[k], expected)
    assert pixels.dtype == np.uint8 and labels.dtype == np.int32


@pytest.mark.parametrize('how', ['processes:1', 'processes:3', 'threads:1', 'threads:3'])
def test_same_bits_whoever_decodes_and_after_a_jump(folder, how):
    places = [(i, w) for i in (0, 1, 2, 3, 1000, 1001, 5) for w in range(2)]
    places += [(7, 0), (7, 0), (8, 1), (8, 1)]
    with loader_of(folder) as serial, loader_of(folder, how) as parallel:
        for place in places:
            for one, other in zip(serial.train_batch(*place), parallel.train_batch(*place)):
                np.testing.assert_array_equal(one, other)
        n = 0
        for (pixels, labels), (expected, same), first in zip(
            parallel.validation_batches(3, 20), serial.validation_batches(3, 20), range(3, 20, 4)
        ):
            np.testing.assert_array_equal(pixels, expected)
            np.testing.assert_array_equal(labels, same)
            np.testing.assert_array_equal(labels, folder.labels[first : first + 4][: 20 - first])
            n += len(labels)
            for k, index in enumerate(range(first, min(first + 4, 20))):
                np.testing.assert_array_equal(
                    pixels[k], images.validation_image(folder.path(index), PREPROCESSING)
                )
        assert n == 17


@pytest.mark.parametrize('how', ['an old Python', 'an old kernel', 'no /dev/shm'])
def test_without_files_in_memory(folder, monkeypatch, how):
    """memfd_create came with Linux 3.17 and glibc 2.27."""

    def refuse(*arguments, dir=None):
        if dir is None or dir == '/dev/shm':
            raise OSError(errno.ENOSYS, 'Function not implemented')
        return mkstemp(dir=dir)

    mkstemp = tempfile.mkstemp
    if how == 'an old Python':
        monkeypatch.delattr(os, 'memfd_create')
    else:
        monkeypatch.setattr(os, 'memfd_create', refuse)
    if how == 'no /dev/shm':
        monkeypatch.setattr(tempfile, 'mkstemp', refuse)
    with loader_of(folder) as serial, loader_of(folder, 'processes:1') as batches:
        for iteration in range(3):
            expected, labels = (array.copy() for array in serial.train_batch(iteration, 0))
            pixels, found = batches.train_batch(iteration, 0)
            np.testing.assert_array_equal(pixels, expected)
            np.testing.assert_array_equal(found, labels)


def test_without_any_shared_memory_it_says_what_to_do(folder, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.delattr(os, 'memfd_create')
    monkeypatch.setattr(os, 'posix_fallocate', refuse)
    with pytest.raises(DataError, match='No space left on device; .* or give --loader serial'):
        loader_of(folder, 'processes:1')


def test_minibatches_on_three_ranks_are_those_of_one(folder):
    """Workers spread over processes, in every layout of six workers."""
    order = ImageOrder(len(folder), 6, 2, seed=1)

    def batches(workers, how):
        with loader.ImageLoader(folder, folder, order, PREPROCESSING, 1, workers, how) as one:
            for place in [(i, w) for i in (0, 1, 2, 1000) for w in workers]:
                pixels, labels = one.train_batch(*place)
                yield place, (pixels.tobytes(), labels.tobytes())

    expected = dict(batches(range(6), 'serial'))
    assert len(expected) == 24
    for n, how in ((3, 'processes:1'), (2, 'threads:2')):
        each = 6 // n
        for rank in range(n):
            for place, batch in batches(range(rank * each, rank * each + each), how):
                assert expected[place] == batch


@pytest.mark.parametrize('how', ['processes:1', 'threads:1'])
def test_following_batches_are_decoded_ahead(folder, how):
    with loader_of(folder, how, workers=range(1, 2), prefetch=3) as parallel:
        parallel.train_batch(4, 1)
        assert [batch.place for batch in parallel._ahead] == [(5, 1), (6, 1), (7, 1)]
        parallel.train_batch(9, 1)
        assert [batch.place for batch in parallel._ahead] == [(10, 1), (11, 1), (12, 1)]
    with loader_of(folder, how, prefetch=3) as parallel:
        parallel.train_batch(4, 0)
        assert [batch.place for batch in parallel._ahead] == [(4, 1), (5, 0), (5, 1)]


@pytest.mark.parametrize('how', ['processes:2', 'threads:2'])
def test_training_goes_on_after_a_validation_that_was_left(folder, how):
    """What was given up may still be written while its place is wanted again."""
    with loader_of(folder) as serial, loader_of(folder, how) as parallel:
        for iteration in range(30):
            wanted = iteration * 7 % 30, iteration % 2
            pixels, labels = parallel.train_batch(*wanted)
            expected, same = serial.train_batch(*wanted)
            np.testing.assert_array_equal(pixels, expected)
            np.testing.assert_array_equal(labels, same)
            for k, (pixels, _) in zip(range(2), parallel.validation_batches(0, 20)):
                expected = images.validation_image(folder.path(4 * k), PREPROCESSING)
                np.testing.assert_array_equal(pixels[0], expected)


def test_a_place_is_not_given_away_while_it_is_written(folder, monkeypatch):
    """A minibatch ahead that nobody wants any more, still being decoded when its place is due."""
    goes_on, original = threading.Event(), images.train_image

    def decode(path, rng, preprocessing, out):
        if threading.current_thread() is not threading.main_thread() and path in held:
            goes_on.wait()
        return original(path, rng, preprocessing, out)

    order = ImageOrder(21, 2, 4, seed=1)
    held = {folder.path(i) for i in order(0, 1)[1]}
    others = [
        {folder.path(i) for worker in range(2) for i in order(j, worker)[1]} for j in range(99)
    ]
    jump = next(j for j in range(5, 99) if not held & (others[j] | others[0] - held))
    held -= {folder.path(i) for i in order(0, 0)[1]}
    with loader_of(folder) as serial, loader_of(folder, 'threads:2', prefetch=1) as parallel:
        expected = serial.train_batch(jump, 1)[0].copy()
        monkeypatch.setattr(images, 'train_image', decode)
        parallel.train_batch(0, 0)
        threading.Timer(0.5, goes_on.set).start()
        parallel.train_batch(jump, 0)
        pixels, _ = parallel.train_batch(jump, 1)
        goes_on.wait()
        time.sleep(0.2)
        np.testing.assert_array_equal(pixels, expected)


def test_a_minibatch_is_not_copied(folder):
    with loader_of(folder, 'processes:1') as parallel:
        pixels, _ = parallel.train_batch(0, 0)
        assert np.shares_memory(pixels, parallel._slots[0].pixels)


@pytest.mark.filterwarnings('error::pytest.PytestUnhandledThreadExceptionWarning')
@pytest.mark.parametrize('other', ['runs', 'is stopped'])
def test_a_killed_process_is_an_error_at_once(folder, other):
    """Nor is another waited for, which may never get a lock that the dead one held."""
    with loader_of(folder, 'processes:2') as parallel:
        for iteration in range(3):
            parallel.train_batch(iteration, 0)
        dead, living = parallel._executor._processes
        if other != 'runs':
            os.kill(living, signal.SIGSTOP)
        os.kill(dead, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=f'process {dead} that loads .* ended by SIGKILL'):
            for iteration in range(1000):
                parallel.train_batch(iteration, 1)
    assert time.monotonic() - start < 5


def ignores(process, signum):
    status = Path(f'/proc/{process}/status').read_text()
    return int(re.search(r'SigIgn:\s*([0-9a-f]+)', status)[1], 16) >> (signum - 1) & 1


def test_sigterm_of_a_batch_system_to_all_processes_loses_no_image(folder):
    with loader_of(folder, 'processes:2') as parallel, loader_of(folder, 'serial') as serial:
        parallel.train_batch(0, 0)
        processes = list(parallel._executor._processes.values())
        assert len(processes) == 2
        deadline = time.monotonic() + 30
        while not all(ignores(process.pid, signal.SIGTERM) for process in processes):
            assert time.monotonic() < deadline  # a process begins with its imports
            time.sleep(0.01)
        for iteration in range(1, 6):
            for process in processes:
                os.kill(process.pid, signal.SIGTERM)
            np.testing.assert_array_equal(
                parallel.train_batch(iteration, 0)[0], serial.train_batch(iteration, 0)[0]
            )
        assert all(process.is_alive() for process in processes)
    assert not any(process.is_alive() for process in processes)


def test_a_minibatch_of_a_dead_process_is_not_waited_for(folder):
    """Even where the pool never tells so."""
    with loader_of(folder, 'processes:1') as parallel:
        parallel.train_batch(0, 0)
        (dead,) = parallel._executor._processes
        os.kill(dead, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=f'process {dead} that loads .* ended by SIGKILL'):
            parallel._wait(concurrent.futures.Future())


def test_of_dead_processes_the_one_that_others_were_ended_for_is_named(folder):
    with loader_of(folder, 'serial') as serial:
        for n, signum in enumerate((loader._END, signal.SIGSEGV, loader._END)):
            process = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,))
            process.start()
            os.kill(process.pid, signum)
            process.join()
            serial._processes[n] = process
        dead = serial._processes[1].pid
        assert f'process {dead} that loads images ended by SIGSEGV' in str(serial._died())


def test_an_exception_in_a_loader_process_brings_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(ImageFolder, 'path', lambda *_: None)  # a mistake in the program
    with loader_of(folder, 'processes:1') as parallel, pytest.raises(TypeError) as raised:
        parallel.train_batch(0, 0)
    assert 'in _fill' in str(raised.value.__cause__) and 'in decode' in str(raised.value.__cause__)


CRASH = """
import faulthandler, sys
from reproduce import loader
loader.start_forkserver()
from reproduce import images
from reproduce.listing import list_images
from reproduce.order import ImageOrder
folder = list_images(sys.argv[1])
order = ImageOrder(21, 2, 4, 1)
with loader.ImageLoader(folder, folder, order, images.Preprocessing(16, 20), 1, range(2),
                        'processes:1') as batches:
    batches.train_batch(0, 0)
    batches._executor.submit(faulthandler._sigsegv)
    for iteration in range(1000):
        batches.train_batch(iteration, 1)
"""


def test_a_crash_of_a_loader_process_shows_where(folder, root):
    done = subprocess.run(
        [sys.executable, '-c', CRASH, folder.root],
        env={**os.environ, 'PYTHONPATH': str(root)},
        check=False,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert 'Segmentation fault' in done.stderr and 'in _process_worker' in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith('RuntimeError: process ')
    assert 'ended by SIGSEGV' in done.stderr


SIGNALLED = """
import os, signal, sys
from reproduce import loader
loader.start_forkserver()
from reproduce import images
from reproduce.listing import list_images
from reproduce.order import ImageOrder
folder = list_images(sys.argv[1])
order = ImageOrder(21, 2, 4, 1)
handled = []
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(signum, lambda *_: handled.append(None))
with loader.ImageLoader(folder, folder, order, images.Preprocessing(16, 20), 1, range(2),
                        'processes:2') as batches:
    batches.train_batch(0, 0)
    processes = set(batches._processes)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(os.getpgrp(), signum)
    for iteration in range(1, 20):
        batches.train_batch(iteration, 0)
    print(len(handled), set(batches._processes) == processes)
"""


def test_a_signal_to_the_ranks_group_does_not_reach_loader_processes(folder, root):
    """mpiexec, timeout and terminals send signals to groups. The rank goes on, to a checkpoint."""
    done = subprocess.run(
        [sys.executable, '-c', SIGNALLED, folder.root],
        env={**os.environ, 'PYTHONPATH': str(root)},
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout) == (0, '3 True\n'), done.stderr


def broken(tmp_path, which):
    """Eight images of two classes; those in ``which`` cannot be decoded."""
    for label in range(2):
        (tmp_path / f'{label}').mkdir()
        for i in range(4):
            path = tmp_path / f'{label}' / f'{i}.png'
            Image.fromarray(np.full((20, 20, 3), 4 * label + i, np.uint8)).save(path)
            if 4 * label + i in which:
                path.write_bytes(b'nothing')
    return list_images(tmp_path)


@pytest.mark.parametrize('how', ['serial', 'threads:1', 'processes:1'])
def test_a_bad_image_is_an_error_that_names_it(tmp_path, how):
    folder = broken(tmp_path, {5})
    message = pytest.raises(DataError, match='1/1.png cannot be decoded.*--bad-images skip')
    with loader_of(folder, how) as batches, message:
        for worker in range(2):
            batches.train_batch(0, worker)
    with loader_of(folder, how) as batches, message:
        list(batches.validation_batches(0, 8))


@pytest.mark.parametrize('how', ['serial', 'threads:1', 'processes:1'])
@pytest.mark.parametrize('reason', ['No such file or directory', 'Input/output error'])
def test_an_image_that_cannot_be_read_is_not_skipped(tmp_path, how, reason):
    """A fault of the disk is none of the image. Reading /proc/self/mem fails as a disk does."""
    folder = broken(tmp_path, {3})
    path = tmp_path / '1' / '1.png'
    path.unlink()
    if reason.startswith('Input'):
        path.symlink_to('/proc/self/mem')
    message = pytest.raises(
        DataError, match=rf'1/1.png cannot be read on {os.uname().nodename} \({reason}\)(?!.*skip)'
    )
    with loader_of(folder, how, bad_images='skip') as batches, message:
        for worker in range(2):
            batches.train_batch(0, worker)
    with loader_of(folder, how, bad_images='skip') as batches, message:
        list(batches.validation_batches(0, 8))


@pytest.mark.parametrize('how', ['serial', 'threads:2', 'processes:2'])
def test_bad_images_are_skipped_and_counted(tmp_path, how, capsys):
    """In training the next image stands in, with its label; validation leaves them out."""
    folder = broken(tmp_path, {3, 6, 7})
    stands_in = {3: 4, 6: 0, 7: 0}
    with loader_of(folder, how, bad_images='skip') as batches:
        seen = 0
        for iteration, worker in ((0, 0), (0, 1), (1, 0), (1, 1)):
            pixels, labels = batches.train_batch(iteration, worker)
            _, indices = ImageOrder(8, 2, 4, seed=1)(iteration, worker)
            for k, index in enumerate(indices):
                shown = stands_in.get(index, index)
                assert np.all(pixels[k] == shown) and labels[k] == shown // 4
                seen += 1
        assert seen == 16
        (one, first), (two, second) = (
            (pixels.copy(), labels) for pixels, labels in batches.validation_batches(0, 8)
        )
        assert [*first, *second] == [0, 0, 0, -1, 1, 1, -1, -1]
        assert np.all(one[3] == 0) and np.all(two[1] == 5) and np.all(two[2:] == 0)
        assert sorted(batches.bad) == [folder.path(i) for i in (3, 6, 7)]
    said = capsys.readouterr().err
    assert said.count('note: image') == 3
    assert '0/3.png cannot be decoded' in said


def test_a_replacement_is_cropped_as_the_bad_image_would_have_been(folder, tmp_path):
    """So the run with it is a pure function of seed, epoch and image, too."""
    for label, name in enumerate('abc'):
        (tmp_path / name).mkdir()
        for i in range(7):
            index = 7 * label + i
            content = b'' if index == 9 else Path(folder.path(index)).read_bytes()
            (tmp_path / name / f'{i}.png').write_bytes(content)
    spoilt = list_images(tmp_path)
    with loader_of(spoilt, 'processes:1', bad_images='skip') as batches:
        for iteration in range(3):
            for worker in range(2):
                pixels, _ = batches.train_batch(iteration, worker)
                epochs, indices = ImageOrder(21, 2, 4, seed=1)(iteration, worker)
                for k in np.flatnonzero(indices == 9):
                    rng = np.random.RandomState([1, epochs[k], 9])
                    expected = images.train_image(folder.path(10), rng, PREPROCESSING)
                    np.testing.assert_array_equal(pixels[k], expected)
                    return
    raise AssertionError('image 9 was not in the epoch')


def test_nothing_but_bad_images_is_an_error(tmp_path):
    folder = broken(tmp_path, set(range(8)))
    message = pytest.raises(DataError, match='no image of .* can be decoded')
    with loader_of(folder, bad_images='skip') as batches, message:
        batches.train_batch(0, 0)


@pytest.mark.parametrize(
    'how', ['', 'processes', 'processes:0', 'threads:-1', 'serial:2', 'forks:2']
)
def test_who_decodes_must_be_known(how):
    with pytest.raises(ValueError, match='must be serial, threads:N or processes:N'):
        loader.parse(how)


SCRIPT = """
from reproduce import loader
loader.start_forkserver()
print('top level of', __name__, flush=True)
import sys
if 'reproduce.order' not in sys.modules:
    from reproduce.order import ImageOrder
from reproduce import images
from reproduce.listing import list_images
folder = list_images(sys.argv[1])
order = ImageOrder(21, 2, 4, 1)
parallel = loader.ImageLoader(
    folder, folder, order, images.Preprocessing(16, 20), 1, range(2), 'processes:2'
)
parallel.train_batch(0, 0)
print('children', *parallel._executor._processes, flush=True)
sys.stdin.read()
"""


def test_processes_do_not_import_the_script_and_end_with_their_owner(folder, tmp_path, root):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    owner = subprocess.Popen(
        [sys.executable, script, folder.root],
        env={**os.environ, 'PYTHONPATH': str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout.readline() == 'top level of __main__\n'
    word, *children = owner.stdout.readline().split()
    assert word == 'children' and len(children) == 2
    assert all(alive(pid) for pid in children)
    owner.kill()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)
    assert owner.stdout.read() == ''
    owner.wait()


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_nothing_of_it_imports_mpi_or_chainer(root):
    program = (
        'import sys; from reproduce import images, listing, loader, order; '
        'print([m for m in ("mpi4py", "chainer", "chainermn", "extensions") if m in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == '[]\n'
