"""Folders of images through the whole program: manifests, and images that cannot be decoded."""

import json
import os
import time

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.mpi

OPTIONS = (
    '--preset cifar10 --workers 4 --local-batch-size 4 --epochs 2 --width 2 --image-size 16 '
    '--resize 20 --stem imagenet --validation-batch-size 2'
).split()


TOP = 'images \udcff'  # as Python has a name that is not UTF-8
SHOWN = r'images \udcff'


@pytest.fixture
def folders(tmp_path):
    """16 training and 6 validation images of two classes, one of each broken."""
    rng = np.random.RandomState(0)
    for split, count in (('train', 8), ('val', 3)):
        for name in ('cat ä', 'dog'):
            folder = tmp_path / TOP / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 256, (10, 12, 3)).repeat(4, 0).repeat(4, 1)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{i} a.png')
        broken = tmp_path / TOP / split / 'dog' / '1 a.png'
        broken.write_bytes(broken.read_bytes()[:100])
        for folder in (tmp_path / TOP / split).iterdir():
            os.utime(folder, (time.time() - 60,) * 2)
    return ['--train-root', tmp_path / TOP / 'train', '--val-root', tmp_path / TOP / 'val']


@pytest.fixture
def train(mpirun, root, folders, tmp_path):
    def run(n, name, *options):
        out = tmp_path / name
        program = root / 'reproduce' / 'train.py'
        options = [*OPTIONS, *folders, '--out', out, *options]
        return out, mpirun(n, program, *options, PYTHONIOENCODING='utf-8:strict')

    return run


def test_a_bad_image_ends_the_job_by_name_or_is_skipped_and_counted(
    train, tmp_path, leaves_nothing
):
    out, done = train(2, 'error')
    assert done.returncode not in (0, 124)
    assert 'dog/1 a.png cannot be decoded' in done.stdout and '--bad-images skip' in done.stdout
    assert (
        f'16 images in {tmp_path / SHOWN / "train"}; list kept in {tmp_path / "manifests"}'
        in done.stdout
    )

    summaries = []
    for n, how in ((1, 'serial'), (2, 'processes:1'), (4, 'threads:2')):
        out, done = train(n, f'{n}', '--bad-images', 'skip', '--loader', how)
        assert done.returncode == 0, done.stdout
        assert 'list kept in' not in done.stdout  # the first run's is used
        assert 'train/dog/1 a.png cannot be decoded' in done.stdout
        assert '; the run uses dog/2 a.png instead' in done.stdout
        assert '; validation does not count it' in done.stdout
        assert '2 bad images skipped' in done.stdout
        summaries.append(json.loads((out / 'summary.json').read_text()))
        bad = summaries[-1]['bad_images']
        assert bad['count'] == 2
        assert [tmp_path.name in message for message in bad['messages']] == [True, True]
        assert summaries[-1]['validation_images'] == 5
        with np.load(out / 'model.npz') as file:
            summaries[-1]['model'] = {name: file[name].tobytes() for name in file.files}
    for name in ('top1', 'top5', 'validation_loss', 'training_loss', 'model', 'bad_images'):
        assert summaries[0][name] == summaries[1][name] == summaries[2][name], name


@pytest.mark.parametrize(
    'train_root, val_root, message',
    [
        ('train', 'train', 'are one folder: give two folders'),
        ('', 'val', 'lie one in the other: give two folders'),
        ('', 'elsewhere', '/train has folders, such as cat ä, but no image; if they are the cl'),
    ],
)
def test_mistaken_folders_end_the_job_before_it_starts(
    mpirun, root, folders, tmp_path, train_root, val_root, message
):
    (tmp_path / 'elsewhere').mkdir()
    top = tmp_path / TOP
    val = tmp_path / val_root if val_root == 'elsewhere' else top / val_root
    options = ['--train-root', top / train_root, '--val-root', val, '--out', tmp_path / 'out']
    program = root / 'reproduce' / 'train.py'
    done = mpirun(2, program, *OPTIONS, *options, PYTHONIOENCODING='utf-8:strict')
    assert done.returncode == 2, done.stdout
    assert message in done.stdout and 'Traceback' not in done.stdout
    assert not (tmp_path / 'out').exists()


def test_an_image_that_was_added_or_removed_is_noticed_though_times_are_set_back(train, tmp_path):
    """And one that the disk cannot read ends the job, though bad images are skipped."""
    skip = ('--bad-images', 'skip')
    assert train(1, 'first', *skip)[1].returncode == 0
    cat = tmp_path / TOP / 'train' / 'cat ä'
    times = os.stat(cat).st_atime_ns, os.stat(cat).st_mtime_ns
    (cat / '8 a.png').write_bytes((cat / '7 a.png').read_bytes())
    os.utime(cat, ns=times)
    _, done = train(1, 'second', *skip)
    assert done.returncode == 0 and 'the folder has changed since' in done.stdout
    assert f'17 images in {tmp_path / SHOWN / "train"}; list kept' in done.stdout
    (cat / '8 a.png').unlink()
    os.utime(cat, ns=times)
    assert f'16 images in {tmp_path / SHOWN / "train"}; list kept' in train(1, '3', *skip)[1].stdout
    (cat / '7 a.png').unlink()
    (cat / '7 a.png').symlink_to('/proc/self/mem')
    _, done = train(2, 'fourth', *skip)
    assert done.returncode not in (0, 124)
    assert f'7 a.png cannot be read on {os.uname().nodename} (Input/output error)' in done.stdout
    assert 'skip the image' not in done.stdout
