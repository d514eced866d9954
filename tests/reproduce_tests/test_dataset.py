import hashlib
import shutil

import numpy as np
import pytest
from PIL import Image

from reproduce import dataset
from reproduce.listing import check_same_classes, list_images
from reproduce.settings import InputError, Settings


def test_the_file_is_the_published_one(root):
    content = (root / 'reproduce' / 'data' / 'digits.csv.gz').read_bytes()
    assert len(content) < 150_000
    readme = (root / 'reproduce' / 'data' / 'README.md').read_text()
    assert hashlib.sha256(content).hexdigest() in readme and 'CC BY 4.0' in readme


def test_load():
    pixels, labels = dataset.load_digits()
    assert pixels.shape == (1797, 8, 8) and pixels.dtype == np.uint8 and pixels.max() == 16
    # Counts of the digits as the data set's description states them for its test part.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_split_is_fixed_and_complete():
    train, val = dataset.split_digits()
    assert len(train) == 1437 and len(val) == 360
    assert sorted([*train, *val]) == list(range(1797))
    _, labels = dataset.load_digits()
    assert np.bincount(labels[val]).min() > 20


def test_image_folder(tmp_path):
    root = tmp_path / 'digits'
    dataset.write_digits(root)
    assert [path.name for path in tmp_path.iterdir()] == ['digits']
    train, val = list_images(root / 'train'), list_images(root / 'val')
    check_same_classes(train, val)
    assert (len(train.labels), len(val.labels), train.classes) == (1437, 360, tuple('0123456789'))
    pixels, labels = dataset.load_digits()
    for folder in (train, val):
        for name, label in list(zip(map(folder.name, range(len(folder))), folder.labels))[::50]:
            number = int(name.split('/')[1].split('.')[0])
            assert labels[number] == label
            image = Image.open(f'{folder.root}/{name}')
            assert image.size == (32, 32) and image.mode == 'L'
            means = np.asarray(image, float).reshape(8, 4, 8, 4).mean(axis=(1, 3))
            assert np.corrcoef(means.ravel(), pixels[number].ravel())[0, 1] > 0.95


def test_a_total_batch_may_be_the_whole_training_set():
    settings = Settings(workers=2, local_batch_size=5)
    dataset.check_total_batch(settings, 10)
    with pytest.raises(InputError, match='= 10 is larger than the training set of 9 images'):
        dataset.check_total_batch(settings, 9)


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / 'digits').mkdir()
    dataset.write_digits(tmp_path / 'digits')
    assert list((tmp_path / 'digits').iterdir()) == []


def test_nothing_half_written_is_taken_for_complete(tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(OSError):
        dataset.write_digits(tmp_path / 'digits')
    assert not (tmp_path / 'digits').exists()


# --- Folders that were mistaken ------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """4 training and 2 validation images of two classes."""
    for split, count in (('train', 2), ('val', 1)):
        for name in ('cat', 'dog'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f'{split} {i}.png').write_bytes(b'')
    return tmp_path


def settings_of(train, val):
    return Settings(train_root=str(train), val_root=str(val), out=str(train.parent / 'out'))


@pytest.mark.parametrize(
    'train, val, how',
    [
        ('train', 'train', 'are one folder'),
        ('train', 'link', 'are one folder'),
        ('link', 'val/../train', 'are one folder'),
        ('', 'val', 'lie one in the other'),
        ('train', '', 'lie one in the other'),
        ('train', 'link/cat', 'lie one in the other'),
    ],
)
def test_one_folder_is_not_both(two, train, val, how):
    (two / 'link').symlink_to('train')
    settings = settings_of(two / train, two / val)
    for use in (dataset.roots, dataset.count_images, dataset.list_folders):
        with pytest.raises(InputError) as raised:
            use(settings)
        assert str(raised.value) == (
            f'the training images {two / train} and the validation images {two / val} {how}: '
            'give two folders of class folders to --train-root and --val-root'
        )


def test_imagenet_root_is_looked_at_too(two, monkeypatch):
    monkeypatch.setenv('IMAGENET_ROOT', str(two))
    assert dataset.roots(Settings()) == (str(two / 'train'), str(two / 'val'))
    (two / 'val').rename(two / 'elsewhere')
    (two / 'val').symlink_to('train')
    with pytest.raises(InputError, match='are one folder'):
        dataset.roots(Settings())


def test_swapped_folders_are_noticed(two, capsys):
    dataset.list_folders(settings_of(two / 'train', two / 'val'))
    assert capsys.readouterr().out == ''
    dataset.list_folders(settings_of(two / 'val', two / 'train'))
    assert capsys.readouterr().out == (
        f'note: more images for validation (4 in {two}/train) than for training (2 in {two}/val): '
        'are --train-root and --val-root swapped?\n'
    )


def test_a_copy_is_noticed(two, capsys):
    shutil.copytree(two / 'train', two / 'copy')
    dataset.list_folders(settings_of(two / 'train', two / 'copy'))
    said = capsys.readouterr().out
    assert said.startswith('note: ') and 'have the same file names in all classes' in said
