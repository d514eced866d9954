import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from reproduce.listing import DataError, list_images
from reproduce.studies import image_commands


def run(root, *arguments):
    return subprocess.run(
        [sys.executable, '-m', 'reproduce.studies.image_commands', *map(str, arguments)],
        cwd=root,
        env={**os.environ, 'PYTHONIOENCODING': 'utf-8:strict'},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope='module')
def odd_folder(tmp_path_factory):
    """Of every kind of file one."""
    top = tmp_path_factory.mktemp('odd')
    for name in ('good', 'bad', 'Kraków 1'):
        (top / name).mkdir()
    rgb = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 50, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30
    rgb.save(top / 'good' / 'rgb.jpg')
    rgb.convert('L').save(top / 'good' / 'grey.JPEG')
    rgb.convert('CMYK').save(top / 'good' / 'cmyk.jpg')
    Image.fromarray(sixteen).save(top / 'good' / 'sixteen.png')
    rgb.quantize(16).save(top / 'good' / 'palette.png')
    rgb.convert('RGBA').save(top / 'good' / 'alpha.png')
    rgb.save(top / 'good' / 'turned.jpg', exif=exif)
    rgb.save(top / 'good' / 'really a png.jpg', 'PNG')
    rgb.resize((20, 40)).save(top / 'Kraków 1' / 'zdjęcie 1.jpg')
    (top / 'good' / 'notes.txt').write_text('no image')
    (top / 'bad' / 'empty.jpg').write_bytes(b'')
    (top / 'bad' / 'text.jpg').write_text('this is text')
    (top / 'bad' / 'cut.jpg').write_bytes((top / 'good' / 'rgb.jpg').read_bytes()[:700])
    return top


def test_check_names_what_is_broken_and_what_is_odd(root, odd_folder, tmp_path):
    done = run(root, 'check', odd_folder, '--processes', 2, '--json', tmp_path / 'found.json')
    assert done.returncode == 1
    found = json.loads((tmp_path / 'found.json').read_text())
    assert found['classes'] == {'Kraków 1': 1, 'bad': 3, 'good': 8}
    bad = [str(odd_folder / 'bad' / name) for name in ('cut.jpg', 'empty.jpg', 'text.jpg')]
    assert sorted(found['broken']) == bad
    odd = {kind: [os.path.basename(path) for path in paths] for kind, paths in found['odd'].items()}
    assert odd == {
        'CMYK': ['cmyk.jpg'],
        '16 bits': ['sixteen.png'],
        'a palette': ['palette.png'],
        'alpha': ['alpha.png'],
        'turned by EXIF': ['turned.jpg'],
        'PNG, not JPEG': ['really a png.jpg'],
        'less than 32 pixels high or wide': ['zdjęcie 1.jpg'],
        'not an image by its suffix, ignored': ['notes.txt'],
    }
    for path in bad:
        assert f'  image {path} cannot be decoded' in done.stdout
    assert f'12 images of 3 classes in {odd_folder}; 1 to 8 per class, median 3' in done.stdout
    assert '        8  good\n' in done.stdout and 'broken: 3\n' in done.stdout
    assert '12 of 12 images' in done.stderr and '3 broken' in done.stderr


def test_check_of_a_sound_folder_ends_with_0(root, odd_folder):
    sound = list_images(odd_folder)
    assert len(sound) == 12
    found = image_commands.check(odd_folder, 1)
    for path in found['broken']:
        os.rename(path, path + '.broken')
    os.rename(odd_folder / 'bad', odd_folder.parent / 'bad')
    try:
        done = run(root, 'check', odd_folder)
        assert done.returncode == 0 and 'broken: 0\n' in done.stdout
    finally:
        os.rename(odd_folder.parent / 'bad', odd_folder / 'bad')
        for path in found['broken']:
            os.rename(path + '.broken', path)


def test_a_name_that_is_no_text_is_told(root, tmp_path):
    folder = os.fsencode(tmp_path) + b'/\xe9t\xe9'
    os.mkdir(folder)
    with open(folder + b'/\xff 1.jpg', 'wb'):
        pass
    done = run(root, 'check', tmp_path)
    assert done.returncode == 1
    assert '        1  \\udce9t\\udce9\n' in done.stdout
    assert r'\udce9t\udce9/\udcff 1.jpg cannot be decoded (empty)' in done.stdout


def test_check_draws_a_bar_on_a_terminal(root, odd_folder):
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        '-m',
        'reproduce.studies.image_commands',
        'check',
        odd_folder,
        '--processes',
        '1',
    ]
    done = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b''
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how a terminal ends
        pass
    os.close(ours)
    assert done.wait(60) == 1
    assert b'\r[' + b'#' * 30 + b'] 12 of 12 images' in shown


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['check', 'nowhere'], 'image folder nowhere: No such file'),
        (['check', '.', '--processes', '0'], '--processes must be at least 1, not 0'),
        (['check', 'nowhere', '--json', 'nowhere/found'], 'nowhere/found: No such file'),
        (['arrange', 'nowhere', 'setup.py', 'out'], 'nowhere'),
        (['check'], 'DIR'),
        ([], 'COMMAND'),
    ],
)
def test_what_cannot_be_done_is_said(root, arguments, message):
    done = run(root, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr


def test_help_tells_the_commands(root):
    done = run(root, '--help')
    assert done.returncode == 0 and 'check DIR' in done.stdout and 'arrange FLAT' in done.stdout


# --- A flat folder and its labels ----------------------------------------------------------------


@pytest.fixture
def flat(tmp_path):
    """Six images, each with its number inside."""
    (tmp_path / 'flat').mkdir()
    for i in range(1, 7):
        (tmp_path / 'flat' / f'ILSVRC2012_val_0000000{i}.JPEG').write_bytes(b'image %d' % i)
    return tmp_path / 'flat'


CLASSES = ['n03', 'n01', 'n03', 'n02', 'n01', 'n03']  # of images 1 to 6
LABELS = {
    # The archive's: the number of the class of each image; names by number are another file.
    'numbers': ('3\n1\n3\n2\n1\n3\n', 'n01 first\nn02 second\nn03 third\n'),
    'names': (
        ''.join(f'ILSVRC2012_val_0000000{i}.JPEG {c}\n' for i, c in enumerate(CLASSES, 1)),
        None,
    ),
    # Kaggle's: a head, no suffix, boxes behind the class, another order.
    'table': (
        'ImageId,PredictionString\n'
        + ''.join(
            f'ILSVRC2012_val_0000000{i},{CLASSES[i - 1]} 1 2 3 4 {CLASSES[i - 1]} 5 6 7 8\n'
            for i in (4, 1, 6, 5, 3, 2)
        ),
        None,
    ),
}


@pytest.mark.parametrize('kind', LABELS)
def test_arrange_makes_the_usual_layout(root, flat, tmp_path, kind):
    labels, classes = LABELS[kind]
    (tmp_path / 'labels').write_text(labels)
    options = []
    if classes:
        (tmp_path / 'classes').write_text(classes)
        options = ['--classes', tmp_path / 'classes']
    done = run(root, 'arrange', flat, tmp_path / 'labels', tmp_path / 'val', *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'6 images in {tmp_path / "val"}\n'
    folder = list_images(tmp_path / 'val')
    assert folder.classes == ('n01', 'n02', 'n03')
    for i in range(6):
        with open(folder.path(i), 'rb') as file:
            number = int(file.read().split()[1])
        assert folder.classes[folder.labels[i]] == CLASSES[number - 1]
    assert len(list(flat.iterdir())) == 6
    assert sorted(path.name for path in tmp_path.iterdir() if 'unfinished' in path.name) == []


@pytest.mark.parametrize(
    'labels, classes, message',
    [
        ('3\n1\n3\n2\n1\n', 'a\nb\nc\n', 'has 5 lines for 6 images'),
        ('0\n1\n2\n2\n1\n0\n', 'a\nb\nc\n', 'class number 0 must be 1 to 3 ('),
        ('3\n1\n3\n4\n1\n3\n', 'a\nb\nc\n', 'class number 4 must be 1 to 3 ('),
        ('3\n1\n3\n2\n1\n3\n', None, 'need --classes FILE'),
        ('ILSVRC2012_val_00000001.JPEG a\n', None, 'no class for ILSVRC2012_val_00000002.JPEG'),
        (LABELS['names'][0] + 'other.JPEG n01\n', None, 'no image for other.JPEG'),
        (LABELS['names'][0].replace('n02', '../n02'), None, '../n02 is not a name for a folder'),
        (LABELS['names'][0].replace('n02', '..'), None, '.. is not a name for a folder'),
        ('3\n1\n\udcff', 'a\nb\nc\n', 'labels is not a text file'),
    ],
)
def test_labels_that_do_not_fit_are_refused(flat, tmp_path, labels, classes, message):
    (tmp_path / 'labels').write_text(labels, errors='surrogateescape')
    if classes:
        (tmp_path / 'classes').write_text(classes)
        classes = tmp_path / 'classes'
    with pytest.raises(DataError) as raised:
        image_commands.arrange(flat, tmp_path / 'labels', tmp_path / 'val', classes)
    assert message in str(raised.value)
    assert not (tmp_path / 'val').exists()


def test_a_folder_that_is_there_is_left_alone(flat, tmp_path):
    (tmp_path / 'labels').write_text(LABELS['names'][0])
    (tmp_path / 'val').mkdir()
    with pytest.raises(DataError, match='exists: choose another folder'):
        image_commands.arrange(flat, tmp_path / 'labels', tmp_path / 'val')


def test_files_are_copied_where_they_cannot_be_linked(flat, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, 'Invalid cross-device link')

    monkeypatch.setattr(os, 'link', refuse)
    (tmp_path / 'labels').write_text(LABELS['names'][0])
    assert image_commands.arrange(flat, tmp_path / 'labels', tmp_path / 'val') == 6
    assert len(list_images(tmp_path / 'val')) == 6


def test_what_was_begun_is_removed_when_it_fails(flat, tmp_path, monkeypatch):
    link = image_commands._link

    def full(source, target):
        if source.endswith('3.JPEG'):
            raise OSError(28, 'No space left on device', target)
        link(source, target)

    monkeypatch.setattr(image_commands, '_link', full)
    (tmp_path / 'labels').write_text(LABELS['names'][0])
    with pytest.raises(DataError, match='No space left on device'):
        image_commands.arrange(flat, tmp_path / 'labels', tmp_path / 'val')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['flat', 'labels']
