import os
import pickle
import re
import socket
import time

import numpy as np
import pytest

from reproduce import listing
from reproduce.listing import DataError, ImageFolder


def names_of(folder):
    return [folder.name(i) for i in range(len(folder))]


def folder_of(top, **classes):
    for name, files in classes.items():
        (top / name).mkdir(parents=True)
        for file in files:
            (top / name / file).write_bytes(b'')
    return top


def test_listing_is_sorted_and_sees_all_suffixes(tmp_path):
    folder_of(tmp_path, b=['2.png', '10.JPEG', 'ä b.Jpg'], a=['x.png'])
    (tmp_path / 'b' / 'notes.txt').write_text('no image')
    (tmp_path / 'README').write_text('no class')
    folder = listing.list_images(tmp_path)
    assert folder.classes == ('a', 'b') and len(folder) == 4
    assert names_of(folder) == ['a/x.png', 'b/10.JPEG', 'b/2.png', 'b/ä b.Jpg']
    assert folder.labels.tolist() == [0, 1, 1, 1] and folder.labels.dtype == np.int32
    assert folder.path(3) == str(tmp_path / 'b' / 'ä b.Jpg')
    again = ImageFolder.unpack(folder.pack())
    assert names_of(again) == names_of(folder) and again.classes == folder.classes
    assert again.labels.tolist() == folder.labels.tolist() and again.path(3) == folder.path(3)
    assert again.digest() == folder.digest()


def test_impossible_folders_are_named(tmp_path):
    with pytest.raises(DataError, match='none.*No such file'):
        listing.list_images(tmp_path / 'none')
    (tmp_path / 'flat').mkdir()
    with pytest.raises(DataError, match='flat has no class folders'):
        listing.list_images(tmp_path / 'flat')
    folder_of(tmp_path / 'top', full=['1.png'], empty=[])
    with pytest.raises(DataError, match='top/empty has no image'):
        listing.list_images(tmp_path / 'top')


def test_different_classes_are_named(tmp_path):
    train = listing.list_images(folder_of(tmp_path / 'train', cat=['1.png'], dog=['1.png']))
    val = listing.list_images(folder_of(tmp_path / 'val', cat=['1.png']))
    with pytest.raises(DataError, match='train has 1 class folder.*val lacks: dog'):
        listing.check_same_classes(train, val)
    with pytest.raises(DataError, match='dog'):
        listing.check_same_classes(val, train)
    listing.check_same_classes(train, train)


def test_a_name_that_is_no_text_is_found_again(tmp_path):
    (tmp_path / 'a').mkdir()
    with open(os.fsencode(tmp_path / 'a') + b'/\xff\xfe.jpg', 'wb') as file:
        file.write(b'found')
    folder = ImageFolder.unpack(pickle.loads(pickle.dumps(listing.list_images(tmp_path).pack())))
    with open(folder.path(0), 'rb') as file:
        assert file.read() == b'found'


def test_a_class_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder_of(tmp_path, a=['1.png'], b=['1.png'])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('/b'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(DataError, match='class folder .*/b: Permission denied'):
        listing.list_images(tmp_path)


def test_digest_tells_classes_names_and_their_places(tmp_path):
    layouts = [
        {'a': ['1.png', '2.png'], 'b': ['3.png']},
        {'a': ['1.png'], 'b': ['2.png', '3.png']},
        {'a': ['1.png', '2.png'], 'c': ['3.png']},
        {'a': ['1.png', '2.png'], 'b': ['4.png']},
    ]
    folders = [folder_of(tmp_path / str(i), **layout) for i, layout in enumerate(layouts)]
    digests = [listing.list_images(folder).digest() for folder in folders]
    assert len(set(digests)) == len(layouts)
    elsewhere = folder_of(tmp_path / 'elsewhere', **layouts[0])
    assert listing.list_images(elsewhere).digest() == digests[0]


# --- What is not the user's ----------------------------------------------------------------------

FOREIGN = ('.ipynb_checkpoints', '@eaDir', 'lost+found', '.git', '$RECYCLE.BIN', '#recycle')


def test_foreign_entries_are_passed_over_and_told(tmp_path):
    """Hidden ones, those of a NAS, pipes, sockets, folders; as classes and as images."""
    files = ['1.png', '._1.png', '.jpg', '.DS_Store', 'Thumbs.db', 'x.txt']
    folder_of(tmp_path, cat=files, dog=['2.JPG'])
    folder_of(tmp_path, **{name: ['3.png'] for name in FOREIGN[:3]})
    folder_of(tmp_path, **dict.fromkeys(FOREIGN[3:], ()))
    (tmp_path / 'lost+found').chmod(0)
    (tmp_path / 'README').write_text('no class')
    os.mkfifo(tmp_path / 'cat' / 'pipe.jpg')
    (tmp_path / 'cat' / 'link to a pipe.jpg').symlink_to('pipe.jpg')
    (tmp_path / 'cat' / 'folder.png').mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / 'cat' / 'socket.png'))
    (tmp_path / 'cat' / 'link.png').symlink_to('1.png')
    folder = listing.list_images(tmp_path)
    assert names_of(folder) == ['cat/1.png', 'cat/link.png', 'dog/2.JPG']
    odd = [*files[1:], 'pipe.jpg', 'link to a pipe.jpg', 'folder.png', 'socket.png']
    expected = [tmp_path / name for name in FOREIGN] + [tmp_path / 'cat' / name for name in odd]
    assert sorted(listing.passed_over(tmp_path)) == sorted(map(str, expected))


@pytest.mark.parametrize('place', ['', 'cat'])
@pytest.mark.parametrize('kind', ['loop', 'nowhere'])
def test_a_link_that_leads_nowhere_is_named(tmp_path, place, kind):
    """What it stood for would be missing in silence."""
    folder_of(tmp_path, cat=['1.png'])
    path = tmp_path / place / '2.png'
    path.symlink_to('2.png' if kind == 'loop' else 'none')
    reason = 'Too many levels of symbolic links' if kind == 'loop' else 'No such file or directory'
    with pytest.raises(DataError, match=f'^link {path}: {reason}; mend the link, or remove it$'):
        listing.list_images(tmp_path)


def test_one_folder_is_not_two_classes(tmp_path):
    folder_of(tmp_path / 'store', cat=['1.png'], dog=['1.png'])
    top = tmp_path / 'train'
    top.mkdir()
    for name, target in (('a', 'cat'), ('b', 'dog')):
        (top / name).symlink_to(tmp_path / 'store' / target)
    assert listing.list_images(top).classes == ('a', 'b')
    (top / 'c').symlink_to('a')
    with pytest.raises(DataError, match='train/a and .*train/c are one folder; remove a link'):
        listing.list_images(top)


def test_the_parent_folder_is_told_from_an_empty_class(tmp_path):
    """Nobody is asked to remove what has the images."""
    folder_of(tmp_path / 'train', cat=['1.png'])
    folder_of(tmp_path / 'val', cat=['2.png'])
    with pytest.raises(DataError) as raised:
        listing.list_images(tmp_path)
    assert str(raised.value) == (
        f'{tmp_path}/train has folders, such as cat, but no image; if they are the classes, '
        f'give {tmp_path}/train instead of the folder above it'
    )


# --- Manifests ------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, capsys):
    """A folder that has not changed for a while, and the folder of its manifest."""
    root = folder_of(tmp_path / 'train', a=['1.png', '2.png'], b=['1.png'])
    age(root)
    listing.save_manifest(listing.list_images(root), tmp_path / 'manifests')
    return root, tmp_path / 'manifests'


def age(root, seconds=60.0):
    for path in (root, *root.iterdir()):
        os.utime(path, (time.time() - seconds,) * 2)


def without_listing(monkeypatch):
    def refuse(root):
        raise AssertionError(f'{root} was listed')

    monkeypatch.setattr(listing, 'list_images', refuse)


def test_a_manifest_stands_for_the_folder(kept, monkeypatch):
    root, manifests = kept
    expected = listing.list_images(root)
    without_listing(monkeypatch)
    folder = listing.listing_of(root, manifests)
    assert names_of(folder) == names_of(expected) == ['a/1.png', 'a/2.png', 'b/1.png']
    assert folder.digest() == expected.digest() and folder.path(2) == str(root / 'b' / '1.png')
    with np.load(listing.manifest_of(root, manifests), allow_pickle=False) as file:
        assert file['counts'].tolist() == [2, 1]


def test_folders_of_one_name_have_manifests_of_their_own(tmp_path):
    paths = {listing.manifest_of(tmp_path / top / 'train', tmp_path) for top in 'ab'}
    assert len(paths) == 2 and all(path.name.startswith('train-') for path in paths)


@pytest.mark.parametrize('change', ['added', 'removed', 'renamed', 'class added', 'class renamed'])
def test_a_folder_that_changed_is_listed_again(kept, change, capsys):
    root, manifests = kept
    before = listing.list_images(root).digest()
    if change == 'added':
        (root / 'a' / '3.png').write_bytes(b'')
    elif change == 'removed':
        (root / 'a' / '1.png').unlink()
    elif change == 'renamed':
        (root / 'b' / '1.png').rename(root / 'b' / '2.png')
    elif change == 'class added':
        folder_of(root, c=['1.png'])
    else:
        (root / 'b').rename(root / 'c')
    age(root, 30)
    folder = listing.listing_of(root, manifests)
    assert folder.digest() == listing.list_images(root).digest() != before
    assert 'the folder has changed since' in capsys.readouterr().out
    listing.save_manifest(folder, manifests)
    assert listing.listing_of(root, manifests).digest() == folder.digest()
    assert 'is not used' not in capsys.readouterr().out


@pytest.mark.parametrize('change', ['added', 'removed'])
def test_times_that_are_set_back_hide_no_change(tmp_path, change, capsys):
    """rsync, tar and touch set the modification time of folders; the time of change is kept."""
    root = folder_of(tmp_path / 'train', a=['1.png', '2.png'], b=['1.png'])
    for path in (root / 'a', root / 'b'):
        os.utime(path, (0, 0))
    listing.save_manifest(listing.list_images(root), tmp_path / 'manifests')
    assert 'list kept in' in capsys.readouterr().out
    time.sleep(0.05)
    if change == 'added':
        (root / 'a' / '3.png').write_bytes(b'')
    else:
        (root / 'a' / '1.png').unlink()
    os.utime(root / 'a', (0, 0))
    folder = listing.listing_of(root, tmp_path / 'manifests')
    assert len(folder) == (4 if change == 'added' else 2)
    assert 'the folder has changed since' in capsys.readouterr().out


@pytest.mark.parametrize('times', ['of another system', 'all 0'])
def test_where_folders_keep_no_times_every_start_lists(kept, times, monkeypatch, capsys):
    """As below FUSE, where neither time moves when an image is added."""
    root, manifests = kept
    device = os.stat(root).st_dev
    still = os.stat(root / 'a')
    if times == 'all 0':
        fields = {name: getattr(still, name) for name in ('st_mode', 'st_ino', 'st_dev')}
        none = dict.fromkeys(('st_mtime', 'st_ctime', 'st_mtime_ns', 'st_ctime_ns'), 0)
        still = type('Stat', (), {**fields, **none})
    else:
        here = {f'{os.major(device)}:{os.minor(device)}'}
        monkeypatch.setattr(listing, '_devices_that_pass_on', lambda: here)
    (root / 'a' / '3.png').write_bytes(b'')
    stat = os.stat
    monkeypatch.setattr(os, 'stat', lambda p, **k: still if p == str(root / 'a') else stat(p, **k))
    folder = listing.listing_of(root, manifests)
    assert names_of(folder) == ['a/1.png', 'a/2.png', 'a/3.png', 'b/1.png']
    path = listing.manifest_of(root, manifests)
    assert f'note: manifest {path} is not used (the file system' in capsys.readouterr().out
    path.unlink()
    listing.save_manifest(folder, manifests)
    assert f'note: every start lists {root} anew' in capsys.readouterr().out
    assert not path.exists()


def test_mounts_are_told_by_their_kind(monkeypatch):
    """Of this machine's own, /proc."""
    device = os.stat('/proc').st_dev
    here = f'{os.major(device)}:{os.minor(device)}'
    assert here not in listing._devices_that_pass_on()
    monkeypatch.setattr(listing, '_PASS_ON', ('fuse', 'proc'))
    assert here in listing._devices_that_pass_on()


@pytest.mark.parametrize('damage', ['cut short', 'empty', 'text', 'a flipped bit', 'other layout'])
def test_a_damaged_manifest_is_not_used(kept, damage, capsys):
    root, manifests = kept
    path = listing.manifest_of(root, manifests)
    content = path.read_bytes()
    if damage == 'other layout':
        with np.load(path) as file:
            np.savez(path, **{**{name: file[name] for name in file.files}, 'layout': 99})
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        damaged = {
            'cut short': content[:-50],
            'empty': b'',
            'text': b'none',
            'a flipped bit': flipped,
        }
        path.write_bytes(damaged[damage])
    folder = listing.listing_of(root, manifests)
    assert names_of(folder) == ['a/1.png', 'a/2.png', 'b/1.png']
    listing.save_manifest(folder, manifests)
    assert listing.listing_of(root, manifests).digest() == folder.digest()


def test_a_folder_that_is_changing_is_not_kept(kept):
    root, manifests = kept
    path = listing.manifest_of(root, manifests)
    path.unlink()
    age(root, 1)
    listing.save_manifest(listing.list_images(root), manifests)
    assert not path.exists()
    listed = listing.list_images(root)
    (root / 'a' / '9.png').write_bytes(b'')
    age(root, 3)  # changed after it was listed, and not just now
    listing.save_manifest(listed, manifests)
    assert not path.exists()
    listing.save_manifest(listing.list_images(root), manifests)
    assert path.exists()


def test_a_manifest_that_cannot_be_written_is_a_note(kept, tmp_path, capsys):
    root, _ = kept
    (tmp_path / 'file').write_text('')
    listing.save_manifest(listing.list_images(root), tmp_path / 'file' / 'manifests')
    assert re.search('note: manifest .* cannot be written', capsys.readouterr().out)


@pytest.mark.slow
def test_imagenet_s_names_are_small_on_the_wire():
    """Names as ImageNet's are: the class, and a random number of up to five digits."""
    rng = np.random.RandomState(0)
    counts = np.full(1000, 1281)
    counts[:167] += 1
    classes = [f'n{i:08}' for i in np.sort(rng.choice(10**8, 1000, replace=False))]
    files = b''.join(
        b''.join(b'%s_%d.JPEG\0' % (name.encode(), i) for i in rng.randint(10**5, size=n))
        for name, n in zip(classes, counts)
    )
    folder = ImageFolder('/data/train', tuple(classes), counts, files)
    assert len(folder) == 1_281_167
    wire = pickle.dumps(folder.pack())
    assert len(wire) < 20e6
    again = ImageFolder.unpack(pickle.loads(wire))
    assert again.name(1_281_166).startswith(classes[-1] + '/' + classes[-1] + '_')
    assert again.digest() == folder.digest()


def test_the_position_tells_of_every_file_and_of_every_class_that_is_asked_for_its_time(tmp_path):
    folder_of(tmp_path, b=['1.png', 'notes.txt'], a=['2.png', '3.png'])
    (tmp_path / 'README').write_text('no class')

    def seen():
        done, left, words = listing.position()
        assert (done, left) == (0, None)
        return int(re.search(r' ([\d,]+) files and folders seen$', words)[1].replace(',', ''))

    before = seen()
    listing.fingerprint(tmp_path)
    assert seen() - before == 3 + 2  # what is in the folder, and its classes
    before = seen()
    listing.list_images(tmp_path)
    assert seen() - before == 3 + (3 + 2) + 2 + 2
