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
