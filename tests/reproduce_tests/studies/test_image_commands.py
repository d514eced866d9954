import json
import os
import pty
import signal
import subprocess
import sys
import time

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


def test_check_names_what_training_passes_over(root, tmp_path):
    """A pipe does not stop it, nor does a file that has but a suffix."""
    (tmp_path / 'cat').mkdir()
    (tmp_path / '@eaDir').mkdir()
    Image.new('RGB', (32, 32)).save(tmp_path / 'cat' / '1.jpg')
    (tmp_path / 'cat' / '.jpg').write_bytes(b'')
    (tmp_path / 'cat' / 'notes').write_text('')
    os.mkfifo(tmp_path / 'cat' / 'x.jpg')
    done = run(root, 'check', tmp_path, '--json', tmp_path / 'found.json')
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'found.json').read_text()) == {
        'classes': {'cat': 1},
        'broken': {},
        'unreadable': {},
        'odd': {
            'hidden, of the system, or no file, ignored': [
                *(str(tmp_path / name) for name in ('@eaDir', 'cat/.jpg', 'cat/x.jpg'))
            ],
            'not an image by its suffix, ignored': [str(tmp_path / 'cat' / 'notes')],
        },
    }


def test_what_cannot_be_read_is_not_called_broken(root, tmp_path):
    """Reading /proc/self/mem at 0 fails as a disk does."""
    (tmp_path / 'cat').mkdir()
    (tmp_path / 'cat' / '1.jpg').symlink_to('/proc/self/mem')
    done = run(root, 'check', tmp_path)
    assert done.returncode == 1 and 'broken: 0\n' in done.stdout
    host = os.uname().nodename
    assert 'unreadable: 1\n' in done.stdout
    assert f'cat/1.jpg cannot be read on {host} (Input/output error)' in done.stdout


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_an_image_above_pillow_s_limit_is_named(root, tmp_path):
    (tmp_path / 'cat').mkdir()
    for name in ('1.jpg', '2.png'):
        path = tmp_path / 'cat' / name
        Image.new('L', (16_000, 12_000)).save(path)
    done = run(root, 'check', tmp_path)
    assert done.returncode == 1 and 'broken: 2\n' in done.stdout
    for name in ('1.jpg', '2.png'):
        assert f'  image {tmp_path}/cat/{name} cannot be decoded (' in done.stdout


@pytest.fixture(scope='module')
def slow(tmp_path_factory):
    """One image takes a second and 500 MiB to decode, those before and after it little."""
    top = tmp_path_factory.mktemp('slow')
    (top / 'cat').mkdir()
    rows = np.random.RandomState(0).randint(0, 256, (1, 11_000, 3)).astype(np.uint8)
    pixels = rows.repeat(11_000, 0)
    Image.fromarray(pixels).save(top / 'cat' / '5.png', compress_level=1)
    for i in (1, 2, 8, 9):
        Image.new('RGB', (32, 32)).save(top / 'cat' / f'{i}.png')
    return top


CHECK = """
import json, sys
from reproduce.studies import image_commands
if __name__ == '__main__':
    print(json.dumps(image_commands.check(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))
"""


@pytest.mark.parametrize(
    'how, processes, patience',
    [('SIGKILL', 1, 300), ('SIGKILL', 2, 300), ('SIGSEGV', 2, 300), ('SIGSTOP', 2, 10)],
)
def test_whatever_happens_to_a_decoder_the_file_is_named(
    root, slow, tmp_path, how, processes, patience
):
    """And all others are inspected. One that is stopped stands for one that never ends."""
    program = tmp_path / 'program.py'
    program.write_text(CHECK)
    command = [sys.executable, program, slow, str(processes), str(patience)]
    environment = {**os.environ, 'PYTHONPATH': str(root)}
    job = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    victim, deadline = None, time.monotonic() + 60
    while victim is None and time.monotonic() < deadline:
        time.sleep(0.01)
        victim = next((pid for pid in children_of(job.pid) if resident(pid) > 250e6), None)
    os.kill(victim, signal.Signals[how])
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    found = json.loads(out)
    why = 'not done after 10 s' if how == 'SIGSTOP' else f'by {how}'
    assert found['broken'] == {
        f'{slow}/cat/5.png': f'image {slow}/cat/5.png ended the process that decoded it ({why}): '
        'remove the image, or, if memory ran out, lower --processes'
    }
    assert '5 of 5 images' in err and '1 broken' in err


def children_of(pid):
    with open(f'/proc/{pid}/task/{pid}/children') as file:
        return [int(child) for child in file.read().split()]


def resident(pid):
    try:
        with open(f'/proc/{pid}/statm') as file:
            return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:
        return 0


def test_without_memory_to_start_a_decoder_it_ends(root, odd_folder, tmp_path):
    """Instead of starting decoders for ever."""
    (tmp_path / 'program.py').write_text(
        'import os, sys\n'
        'if __name__ != "__main__":\n'
        '    os._exit(3)\n'
        'from reproduce.studies import image_commands\n'
        'image_commands.main()\n'
    )
    done = subprocess.run(
        [sys.executable, tmp_path / 'program.py', 'check', odd_folder],
        env={**os.environ, 'PYTHONPATH': str(root)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert 'error: a decoding process cannot start (3): lower --processes\n' in done.stderr


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


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-16-be'])
@pytest.mark.parametrize('kind', LABELS)
def test_a_byte_order_mark_is_no_letter(flat, tmp_path, kind, encoding):
    """Nor is a carriage return; both come from Windows."""
    mark = '\ufeff' if encoding == 'utf-16-be' else ''
    files = []
    for name, text in zip(('labels', 'classes'), LABELS[kind]):
        if text:
            files.append(tmp_path / name)
            files[-1].write_bytes((mark + text.replace('\n', '\r\n')).encode(encoding))
    assert image_commands.arrange(flat, files[0], tmp_path / 'val', *files[1:]) == 6
    assert list_images(tmp_path / 'val').classes == ('n01', 'n02', 'n03')


def test_arrange_passes_over_what_is_no_image(flat, tmp_path):
    """Else the numbers would belong to other images."""
    (flat / '._ILSVRC2012_val_00000001.JPEG').write_bytes(b'')
    (flat / 'folder.JPEG').mkdir()
    os.mkfifo(flat / 'pipe.JPEG')
    labels, classes = LABELS['numbers']
    (tmp_path / 'labels').write_text(labels)
    (tmp_path / 'classes').write_text(classes)
    arguments = tmp_path / 'labels', tmp_path / 'val', tmp_path / 'classes'
    assert image_commands.arrange(flat, *arguments) == 6


def test_arranged_links_lead_to_the_image(flat, tmp_path):
    """A relative one would lead elsewhere from its new folder."""
    (tmp_path / 'store').mkdir()
    for path in list(flat.iterdir()):
        path.rename(tmp_path / 'store' / path.name)
        path.symlink_to(f'../store/{path.name}')
    (tmp_path / 'labels').write_text(LABELS['names'][0])
    assert image_commands.arrange(flat, tmp_path / 'labels', tmp_path / 'val') == 6
    folder = list_images(tmp_path / 'val')
    for i in range(6):
        with open(folder.path(i), 'rb') as file:
            assert file.read().startswith(b'image ')


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
        (LABELS['names'][0].replace('n02', '.n02'), None, '.n02 is not a name for a folder'),
        (LABELS['names'][0].replace('n02', '@eaDir'), None, '@eaDir is not a name for a folder'),
        (LABELS['names'][0].replace('n02', 'n0\0'), None, 'labels is not a text file: it has zero'),
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
