"""train.py --evaluate: the validation of a run, once more, from the file that it has left."""

import json
import re

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.mpi
OPTIONS = '--preset smoke --width 4 --shallow --workers 4 --local-batch-size 32 --epochs 2'.split()
LINE = re.compile(
    r'^top-1 \S+% \(([\d,]+) of ([\d,]+) images\), top-5 \S+%, loss (\S+)$', re.MULTILINE
)


@pytest.fixture
def train(mpirun, root):
    def run(n, *options, **keywords):
        return mpirun(n, root / 'reproduce' / 'train.py', *OPTIONS, *options, **keywords)

    return run


def validated(done):
    """Correct images, images and loss, of the one line with the result."""
    assert done.returncode == 0, done.stdout
    [found] = LINE.findall(done.stdout)
    return int(found[0]), int(found[1]), float(found[2])


def of_log(entry):
    n = entry['validation/images']
    return round(entry['validation/main/accuracy'] * n), n, entry['validation/main/loss']


def content(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    'n, options, processes',
    [(2, '', (1, 2, 4)), (1, '--pooled-variance', (2,)), (4, '--bn-decay 0.9', (3,))],
)
def test_the_bits_of_the_last_validation(train, tmp_path, n, options, processes):
    """Workers, processes, kinds of statistics: what a run's file has gives what its log says."""
    out = tmp_path / 'out'
    done = train(n, *options.split(), '--out', out)
    assert done.returncode == 0, done.stdout
    log = json.loads((out / 'log').read_text())
    before = content(tmp_path)
    for number in processes:
        again = train(number, '--out', out, '--evaluate', out / 'model.npz')
        assert validated(again) == of_log(log[-1]), number
    assert content(tmp_path) == before


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_best_checkpoint_and_other_statistics(train, tmp_path):
    out = tmp_path / 'out'
    done = train(2, '--epochs', '3', '--seed', '3', '--out', out)
    assert done.returncode == 0, done.stdout
    log = json.loads((out / 'log').read_text())
    best = max(log, key=lambda entry: entry['validation/main/accuracy'])
    again = train(3, '--out', out, '--evaluate', out / 'checkpoints' / 'best.npz')
    assert validated(again) == of_log(best)
    with np.load(out / 'model.npz') as file:
        arrays = dict(file)
    arrays['bn1/avg_mean'] = arrays['bn1/avg_mean'] + np.float32(0.01)
    np.savez(tmp_path / 'other.npz', **arrays)
    other = validated(train(1, '--out', out, '--evaluate', tmp_path / 'other.npz'))
    assert other[2] != log[-1]['validation/main/loss']


@pytest.mark.slow
def test_images_of_a_folder_and_another_size(train, image_folders, tmp_path):
    """5 of 10 validation images in minibatches of 3; --train-root is not needed."""
    folders = [f'--{name}-root={image_folders / name}' for name in ('train', 'val')]
    own = '--image-size 24 --resize 28 --validation-batch-size 3 --local-batch-size 2'.split()
    out = tmp_path / 'out'
    assert train(2, *own, *folders, '--out', out).returncode == 0
    [*_, last] = json.loads((out / 'log').read_text())
    done = train(2, *own, folders[1], '--evaluate', out / 'model.npz')
    assert validated(done) == of_log(last) and 'note: ' not in done.stdout
    assert f'10 images in {image_folders / "val"}, on 2 processes' in done.stdout
    done = train(1, folders[1], '--evaluate', out / 'model.npz')
    assert done.returncode == 0
    [note] = [line for line in done.stdout.splitlines() if line.startswith('note: ')]
    assert 'image_size 24 (now 32)' in note and 'validation_batch_size 3 (now 64)' in note


BAD = {
    'no file': (
        ['--evaluate', '{top}/none.npz'],
        '{top}/none.npz: No such file or directory; give',
    ),
    'no images': (['--evaluate', '{top}/model.npz', '--val-root', '{top}/none'], '{top}/none'),
    'classes': (
        ['--evaluate', '{top}/model.npz', '--val-root', '{images}/val'],
        'the 2 classes of {images}/val need float32 [2, 128]',
    ),
    'width': (['--evaluate', '{top}/model.npz', '--width', '8'], 'but --width 8, --stem imagenet'),
    'damaged': (['--evaluate', '{top}/damaged.npz'], 'damaged.npz is damaged or not a model'),
}


@pytest.mark.parametrize('case', BAD)
def test_what_cannot_be_validated_is_one_line(train, image_folders, tmp_path, case):
    from reproduce.resnet50 import ResNet50  # here, as the ranks do not need it
    import chainer  # isort: skip

    chainer.serializers.save_npz(tmp_path / 'model.npz', ResNet50(10, width=4, shallow=True))
    data = bytearray((tmp_path / 'model.npz').read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / 'damaged.npz').write_bytes(data)
    options, message = BAD[case]
    places = {'top': tmp_path, 'images': image_folders}
    out = tmp_path / 'out'
    done = train(2, *(option.format(**places) for option in options), '--out', out, timeout=60)
    assert done.returncode == 2, done.stdout
    [error] = [line for line in done.stdout.splitlines() if line.startswith('error: ')]
    assert message.format(**places) in error and 'Traceback' not in done.stdout
    assert not LINE.search(done.stdout)


def test_an_image_that_cannot_be_decoded(train, tmp_path):
    import chainer  # isort: skip
    from reproduce.resnet50 import ResNet50

    chainer.serializers.save_npz(tmp_path / 'model.npz', ResNet50(2, width=4, shallow=True))
    for name in ('cat', 'dog'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        for i in range(40):
            Image.new('RGB', (40, 40)).save(tmp_path / 'val' / name / f'{i:02d}.png')
    (tmp_path / 'val' / 'dog' / '39.png').write_bytes(b'not an image')
    options = '--val-root', tmp_path / 'val', '--evaluate', tmp_path / 'model.npz'
    done = train(2, *options, timeout=60)
    assert done.returncode not in (0, 2)
    assert re.search(r'^error: rank 1 on \S+ failed: .*dog/39.png', done.stdout, re.MULTILINE)
    done = train(2, *options, '--bad-images', 'skip', timeout=60)
    assert done.returncode == 0
    assert re.search(r'of 79 images\), .*; 1 bad images skipped$', done.stdout, re.MULTILINE)
