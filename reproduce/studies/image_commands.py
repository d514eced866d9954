"""Are the images complete, and in class folders? Checks an image folder, or arranges flat images.

./run_mpi.sh images check DIR
    Decodes every image DIR/CLASS/FILE, names broken and odd images, and counts the classes. The
    exit status is 0 if no image is broken, 1 if one is, and 2 if DIR cannot be read.

./run_mpi.sh images arrange FLAT LABELS DIR
    Makes DIR/CLASS/FILE from a flat folder of validation images and a file of their classes. Files
    are linked, or copied to another disk. Nothing is moved.

./run_mpi.sh images check --help and ./run_mpi.sh images arrange --help list the options.
"""

from __future__ import annotations

import collections
import concurrent.futures.process
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from reproduce import images
from reproduce.job.command_line import Parser, reason
from reproduce.listing import SUFFIXES, DataError, list_images, print_any_name

_CHECK = """Decodes every image DIR/CLASS/FILE as training does, and names broken and odd images.

An image is odd if it has CMYK colours, a palette, alpha, 16 bits, one bit, a rotation by EXIF, a
suffix that contradicts its format, or a side below 32 pixels. Training accepts odd images. The exit
status is 0 if no image is broken, 1 if one is, and 2 if DIR cannot be read.
"""
_ARRANGE = """Makes DIR/CLASS/FILE from the images FLAT/FILE and their classes in LABELS.

Files are linked, or copied to another disk. Nothing is moved. DIR appears complete or not at all.
"""
_FORMATS = {'.jpeg': 'JPEG', '.jpg': 'JPEG', '.png': 'PNG'}
_MODES = {
    'CMYK': 'CMYK',
    'P': 'a palette',
    'PA': 'a palette',
    'RGBA': 'alpha',
    'LA': 'alpha',
    '1': 'one bit',
}
_FEW = 20  # classes; of more, only the smallest and the largest are printed


def inspect(path: str) -> tuple[str | None, list]:
    """Decodes an image as training does.

    Args:
        path (str): The image.

    Returns:
        tuple: Why the image is broken, or None, and a list of the ways in which it is odd.
    """
    try:
        images.decode(path)
    except DataError as error:
        return str(error), []
    odd = []
    with Image.open(path) as image:
        expected = _FORMATS[os.path.splitext(path)[1].lower()]
        if image.format != expected:
            odd.append(f'{image.format}, not {expected}')
        if image.mode in _MODES or image.mode.startswith('I'):
            odd.append(_MODES.get(image.mode, '16 bits'))
        if images.orientation(image) != 1:
            odd.append('turned by EXIF')
        if min(image.size) < 32:
            odd.append('less than 32 pixels high or wide')
    return None, odd


def check(root, n_processes: int) -> dict:
    """Inspects every image ROOT/CLASS/FILE.

    Args:
        root (str): The folder.
        n_processes (int): Processes that decode.

    Returns:
        dict: ``classes``: class to number of images. ``broken``: path to reason. ``odd``: kind to
            paths.

    Raises:
        DataError: A folder cannot be used, as in :func:`~reproduce.listing.list_images`; or a
            process died.
    """
    folder = list_images(root)
    paths = [folder.path(i) for i in range(len(folder))]
    broken, odd = {}, collections.defaultdict(list)
    progress = _Progress(len(paths))
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(n_processes, context) as pool:
        try:
            for path, (why, kinds) in zip(paths, pool.map(inspect, paths, chunksize=32)):
                if why:
                    broken[path] = why
                for kind in kinds:
                    odd[kind].append(path)
                progress(len(broken))
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError(
                'a decoding process died, perhaps because memory ran out: lower --processes'
            ) from error
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    ignored = sorted(str(path) for path in Path(root).glob('*/*') if _is_ignored(path))
    if ignored:
        odd['not an image by its suffix, ignored'] = ignored
    classes = dict(zip(folder.classes, map(int, folder.counts)))
    return {'classes': classes, 'broken': broken, 'odd': dict(odd)}


def _is_ignored(path) -> bool:
    return not path.name.lower().endswith(SUFFIXES)


class _Progress:
    """Draws a bar on a terminal. Without a terminal, prints a line every ten seconds."""

    def __init__(self, n: int):
        self._n, self._done = n, 0
        self._start = self._last = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def __call__(self, broken: int):
        self._done += 1
        now = time.monotonic()
        if now < self._last + (0.2 if self._is_terminal else 10) and self._done < self._n:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-3)
        done = 30 * self._done // self._n
        text = (
            f'[{"#" * done}{"." * (30 - done)}] {self._done:,} of {self._n:,} images, '
            f'{rate:,.0f}/s, {(self._n - self._done) / rate:,.0f} s left, {broken:,} broken'
        )
        end = '' if self._is_terminal and self._done < self._n else '\n'
        start = '\r' if self._is_terminal else ''
        print(f'{start}{text}', end=end, file=sys.stderr, flush=True)


def _report(root, found: dict):
    counts = np.array(list(found['classes'].values()))
    print(
        f'{counts.sum():,} images of {len(counts):,} classes in {root}; '
        f'{counts.min():,} to {counts.max():,} per class, median {np.median(counts):,.0f}'
    )
    by_count = sorted(found['classes'].items(), key=lambda item: item[1])
    shown = by_count if len(by_count) <= _FEW else by_count[: _FEW // 2] + by_count[-_FEW // 2 :]
    for name, count in sorted(shown):
        print(f'  {count:9,}  {name}')
    if len(shown) < len(by_count):
        print('  these are the smallest and the largest classes; --json FILE writes all')
    for kind, paths in sorted(found['odd'].items()):
        print(f'odd, {kind}: {len(paths):,}')
        print(''.join(f'  {path}\n' for path in paths), end='')
    print(f'broken: {len(found["broken"]):,}')
    print(''.join(f'  {why}\n' for why in found['broken'].values()), end='')


def arrange(flat, labels, target, classes=None) -> int:
    """Makes TARGET/CLASS/FILE from a flat folder. Files are linked, or copied to another disk.

    Args:
        flat (str): The folder of images, as the archive of the validation images has them.
        labels (str): A file with a line for each image. A line has the name and the class, with a
            blank or a comma between them; the rest of the line is ignored. With ``classes``, a line
            has only the number of the class, and the lines are in the order of the sorted names.
        target (str): The folder that is made. It appears complete or not at all.
        classes (str): A file with the names of class 1, 2, 3, ..., one per line.

    Returns:
        int: Number of images.

    Raises:
        DataError: The files do not belong together, or cannot be read or written.
    """
    try:
        names = sorted(n for n in os.listdir(flat) if n.lower().endswith(SUFFIXES))
        class_of = _read_labels(labels, names, classes)
        if os.path.exists(target):
            raise DataError(f'{target} exists: choose another folder or remove it')
        unlabelled = [name for name in names if name not in class_of]
        missing = sorted(set(class_of) - set(names))
        if unlabelled or missing or not names:
            problem = f'no class for {unlabelled[0]}' if unlabelled else 'no image'
            if missing and not unlabelled:
                problem += f' for {missing[0]}'
            raise DataError(
                f'{labels} and {flat} do not belong together: {problem} '
                f'({len(names):,} images, {len(class_of):,} lines with a class)'
            )
        for label in class_of.values():
            if os.path.basename(label) != label or label in ('.', '..'):
                raise DataError(f'{labels}: {label} is not a name for a folder; correct that line')
        unfinished = f'{os.path.normpath(target)}.unfinished-{os.getpid()}'
        try:
            for name in names:
                folder = os.path.join(unfinished, class_of[name])
                os.makedirs(folder, exist_ok=True)
                _link(os.path.join(flat, name), os.path.join(folder, name))
            os.rename(unfinished, target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise DataError(reason(error)) from error
    return len(names)


def _read_labels(path, names, classes) -> dict:
    rows = _words(path)
    if classes is not None:
        by_number = [row[0] for row in _words(classes)]
        if len(rows) != len(names):
            raise DataError(
                f'{path} has {len(rows):,} lines for {len(names):,} images: it needs one per image'
            )
        return {name: _numbered(row, by_number, path, classes) for name, row in zip(names, rows)}
    if any(len(row) < 2 for row in rows):
        raise DataError(
            f'{path} has a line of one word: numbers of classes need --classes FILE with the names'
        )
    if rows and rows[0][0] == 'ImageId':  # the header of Kaggle's table
        rows = rows[1:]
    by_stem = {os.path.splitext(name)[0]: name for name in names}
    return {by_stem.get(os.path.splitext(name)[0], name): label for name, label, *_ in rows}


def _words(path) -> list:
    """Returns the words of each non-empty line."""
    try:
        lines = Path(path).read_text().splitlines()
    except UnicodeError as error:
        raise DataError(f'{path} is not a text file: {error}') from error
    return [words for line in lines if (words := line.replace(',', ' ').split())]


def _numbered(row, by_number, path, classes) -> str:
    number = int(row[0]) if row[0].isdigit() else 0
    if not 1 <= number <= len(by_number):
        raise DataError(
            f'{path}: class number {row[0]} must be 1 to {len(by_number):,} '
            f'({classes} has {len(by_number):,} line{"s" * (len(by_number) != 1)})'
        )
    return by_number[number - 1]


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def main(arguments=None):
    parser = Parser(prog='./run_mpi.sh images', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    text = 'decode every image, and name broken and odd images'
    checker = commands.add_parser('check', help=text, description=_CHECK)
    checker.add_argument('root', metavar='DIR', help='folder with a folder of images per class')
    checker.add_argument(
        '--processes',
        type=int,
        default=os.cpu_count(),
        metavar='N',
        help='decode with N processes [one per core: %(default)s]',
    )
    checker.add_argument(
        '--json', metavar='FILE', help='write the report to FILE, too, as JSON [no file]'
    )
    text = 'make class folders from a flat folder'
    arranger = commands.add_parser('arrange', help=text, description=_ARRANGE)
    arranger.add_argument('flat', metavar='FLAT', help='folder with all images')
    arranger.add_argument(
        'labels',
        metavar='LABELS',
        help='file with a line NAME CLASS per image; with --classes, a line NUMBER per image',
    )
    arranger.add_argument('target', metavar='DIR', help='folder that is made; it must not exist')
    arranger.add_argument(
        '--classes',
        metavar='FILE',
        help='file with the names of class 1, 2, 3, ..., one per line [LABELS has the names]',
    )
    options = parser.parse_args(arguments)
    print_any_name()
    try:
        if options.command == 'arrange':
            n = arrange(options.flat, options.labels, options.target, options.classes)
            print(f'{n:,} images in {options.target}')
            return
        if options.processes < 1:
            raise DataError(f'--processes must be at least 1, not {options.processes}')
        if options.json:
            Path(options.json).touch()  # so that it fails before the work, not after it
        found = check(options.root, options.processes)
        _report(options.root, found)
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=2) + '\n')
    except (DataError, OSError) as error:
        parser.refuse(reason(error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if found['broken'] else 0)


if __name__ == '__main__':
    main()
