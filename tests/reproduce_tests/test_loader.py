import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from reproduce import images, loader
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
    return images.list_images(top)


def loader_of(folder, n_processes, workers=range(2), **options):
    order = ImageOrder(len(folder.labels), 2, 4, seed=1)
    return loader.ImageLoader(
        folder, folder, order, PREPROCESSING, 1, workers, n_processes, **options
    )


def test_batches_are_what_the_order_and_the_augmentation_say(folder):
    with loader_of(folder, 0) as serial:
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


_KILLED_WHILE_WRITING = """
import os, signal, sys, threading, time
from reproduce import loader, images
from reproduce.order import ImageOrder

loader.start_forkserver()
folder = images.list_images(sys.argv[1])
large = images.Preprocessing(image_size=3000, resize=3000)
batches = loader.ImageLoader(folder, folder, ImageOrder(21, 1, 4, 0), large, 0, range(1), 1)


def received():
    with open('/proc/self/io') as file:
        return int(file.readline().split()[1])


def kill():
    before = received()
    while received() < before + 2**22:
        time.sleep(0.001)
    for process in batches._executor._processes.values():
        os.kill(process.pid, signal.SIGKILL)


threading.Thread(target=kill, daemon=True).start()
try:
    for i in range(3):
        batches.train_batch(i, 0)
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)  # as MPI's abort does: the pool's own thread waits for ever
"""


def test_a_process_killed_while_it_hands_over_a_batch_is_an_error(folder, root):
    done = subprocess.run(
        [sys.executable, '-c', _KILLED_WHILE_WRITING, folder.root],
        cwd=root,
        env={**os.environ, 'PYTHONPATH': str(root)},
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith('a process that loads images died')


@pytest.mark.parametrize('n_processes', [1, 3])
def test_same_bits_from_processes_and_after_a_jump(folder, n_processes):
    places = [(i, w) for i in (0, 1, 2, 3, 1000, 1001, 5) for w in range(2)]
    with loader_of(folder, 0) as serial, loader_of(folder, n_processes) as parallel:
        for place in places:
            for one, other in zip(serial.train_batch(*place), parallel.train_batch(*place)):
                np.testing.assert_array_equal(one, other)
        one, other = (list(x.validation_batches(3, 20, 4)) for x in (serial, parallel))
    assert [len(labels) for _, labels in other] == [4, 4, 4, 4, 1]
    np.testing.assert_array_equal(np.concatenate([t for _, t in other]), folder.labels[3:20])
    for (pixels, _), (expected, _), first in zip(other, one, range(3, 20, 4)):
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(
            pixels[0], images.validation_image(folder.path(first), PREPROCESSING)
        )


def test_following_batches_are_decoded_ahead(folder):
    with loader_of(folder, 1, workers=range(1, 2), prefetch=3) as parallel:
        parallel.train_batch(4, 1)
        assert [place for place, _ in parallel._ahead] == [(5, 1), (6, 1), (7, 1)]


def test_a_killed_process_is_an_error_at_once(folder):
    with loader_of(folder, 2) as parallel:
        parallel.train_batch(0, 0)
        os.kill(next(iter(parallel._executor._processes)), signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match='died'):
            for iteration in range(1000):
                parallel.train_batch(iteration, 1)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize('n_processes', [0, 1])
def test_a_broken_file_is_named(tmp_path, n_processes):
    for name in 'ab':
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f'{i}.png').write_bytes(b'nothing')
    message = pytest.raises(images.DataError, match=r'[ab]/\d.png cannot be decoded')
    with loader_of(images.list_images(tmp_path), n_processes) as broken, message:
        broken.train_batch(0, 0)


SCRIPT = """
from reproduce import loader
loader.start_forkserver()
print('top level of', __name__, flush=True)
import sys
if 'reproduce.order' not in sys.modules:
    from reproduce.order import ImageOrder
from reproduce import images
folder = images.list_images(sys.argv[1])
parallel = loader.ImageLoader(
    folder, folder, ImageOrder(21, 2, 4, 1), images.Preprocessing(16, 20), 1, range(2), 2
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
        'import sys; from reproduce import digits, images, loader, order; '
        'print([m for m in ("mpi4py", "chainer", "chainermn", "extensions") if m in sys.modules])'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == '[]\n'
