"""Are the images complete, and in class folders? Checks an image folder, or arranges flat images.

./run_mpi.sh images check DIR
    Decodes every image DIR/CLASS/FILE, names broken and odd images, and counts the classes. The
    exit status is 0 if all images can be decoded, 1 if one cannot, and 2 if DIR cannot be read.

./run_mpi.sh images arrange FLAT LABELS DIR
    Makes DIR/CLASS/FILE from a flat folder of validation images and a file of their classes. Files
    are linked, or copied to another disk. Nothing is moved.

./run_mpi.sh images check --help and ./run_mpi.sh images arrange --help list the options.
"""

from __future__ import annotations

import codecs
import collections
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from reproduce import images
from reproduce.job.command_line import Parser, reason, run_program
from reproduce.listing import (
    SUFFIXES,
    BadImage,
    DataError,
    image_files,
    is_foreign,
    list_images,
    passed_over,
    print_any_name,
)

_CHECK = """Decodes every image DIR/CLASS/FILE as training does, and names broken and odd images.

An image is odd if it has CMYK colours, a palette, alpha, 16 bits, one bit, a rotation by EXIF, a
suffix that contradicts its format, or a side below 32 pixels. Training accepts odd images. Hidden
files and folders, those of a NAS, pipes, and files with another suffix are named, too: training
passes over them. The exit status is 0 if all images can be decoded, 1 if one cannot, and 2 if DIR
cannot be read.
"""
_ARRANGE = """Makes DIR/CLASS/FILE from the images FLAT/FILE and their classes in LABELS.

Files are linked, or copied to another disk. Nothing is moved. DIR appears complete or not at all.
"""
_MODES = {
    'CMYK': 'CMYK',
    'P': 'a palette',
    'PA': 'a palette',
    'RGBA': 'alpha',
    'LA': 'alpha',
    '1': 'one bit',
}
_FEW = 20  # classes; of more, only the smallest and the largest are printed
_PATIENCE = 300  # seconds for one image


def inspect(path: str) -> tuple[str, list]:
    """Decodes an image as training does.

    Args:
        path (str): The image.

    Returns:
        tuple: ``'broken'`` or ``'unreadable'``, and the reason in a list; or ``'odd'``, and the
            list of the ways in which it is odd.
    """
    try:
        images.decode(path)
    except BadImage as error:
        return 'broken', [str(error)]
    except DataError as error:
        return 'unreadable', [str(error)]
    odd = []
    try:
        with Image.open(path) as image:
            expected = 'PNG' if path.lower().endswith('.png') else 'JPEG'
            if image.format != expected:
                odd.append(f'{image.format}, not {expected}')
            if image.mode in _MODES or image.mode.startswith('I'):
                odd.append(_MODES.get(image.mode, '16 bits'))
            if images.orientation(image) != 1:
                odd.append('turned by EXIF')
            if min(image.size) < 32:
                odd.append('less than 32 pixels high or wide')
    except Exception:  # noqa: BLE001  (what Pillow raises for damaged bytes is its own affair)
        odd.append('Pillow cannot open it, but another decoder can')
    return 'odd', odd


def check(root, n_processes: int, patience: float = _PATIENCE) -> dict:
    """Inspects every image ROOT/CLASS/FILE.

    Args:
        root (str): The folder.
        n_processes (int): Processes that decode.
        patience (float): Seconds for one image. Then its process is killed, and the image named.

    Returns:
        dict: ``classes``: class to number of images. ``broken``: path to reason; also of an image
            with which its process died. ``unreadable``: path to reason. ``odd``: kind to paths.

    Raises:
        DataError: A folder cannot be used, as in :func:`~reproduce.listing.list_images`; or no
            process can start.
    """
    folder = list_images(root)
    found: dict = {'broken': {}, 'unreadable': {}}
    odd = collections.defaultdict(list)
    progress = _Progress(len(folder))
    paths = (folder.path(i) for i in range(len(folder)))
    for path, (kind, reasons) in _inspect_all(paths, min(n_processes, len(folder)), patience):
        if kind == 'odd':
            for reason_ in reasons:
                odd[reason_].append(path)
        else:
            found[kind][path] = reasons[0]
        progress(len(found['broken']) + len(found['unreadable']))
    for path in passed_over(root):
        name = os.path.basename(path)
        other = not is_foreign(name) and not name.lower().endswith(SUFFIXES)
        kind = 'not an image by its suffix' if other else 'hidden, of the system, or no file'
        odd[f'{kind}, ignored'].append(path)
    return {
        'classes': dict(zip(folder.classes, map(int, folder.counts))),
        **{kind: dict(sorted(by_path.items())) for kind, by_path in found.items()},
        'odd': {kind: sorted(paths) for kind, paths in odd.items()},
    }


def _inspect_all(paths, n_processes, patience):
    """Yields each path with the result of :func:`inspect`, whatever happens to the processes."""
    helpers = [_Helper() for _ in range(n_processes)]
    try:
        while helpers:
            by_pipe = {helper.pipe: helper for helper in helpers}
            for pipe in multiprocessing.connection.wait(list(by_pipe), timeout=1):
                helper = by_pipe[pipe]
                result = helper.result()
                if helper.path is not None:
                    yield helper.path, result
                if not helper.lives:
                    helpers[helpers.index(helper)] = _Helper()
                elif not helper.ask(next(paths, None)):
                    helpers.remove(helper)
            for helper in helpers:
                if helper.path is not None and time.monotonic() > helper.since + patience:
                    helper.kill(f'not done after {patience:g} s')
    finally:
        for helper in helpers:
            helper.process.kill()


class _Helper:
    """A process that inspects one image after the other."""

    def __init__(self):
        context = multiprocessing.get_context('spawn')
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_inspect_on_request, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.path, self.since, self.lives, self._why = None, 0.0, True, ''

    def ask(self, path) -> bool:
        """Hands over the next image. Returns False if there is none, and lets the process end."""
        self.path, self.since = path, time.monotonic()
        try:
            if path is None:
                self.pipe.close()
            else:
                self.pipe.send(path)
        except OSError:
            pass  # the process has died, which result() notices
        return path is not None

    def result(self):
        """Returns the result for ``path``, even if the process has died; None after its start."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.lives = False
        self.process.join(5)
        code = self.process.exitcode
        how = self._why or (f'by {signal.Signals(-code).name}' if code and code < 0 else str(code))
        if self.path is None:
            raise DataError(f'a decoding process cannot start ({how}): lower --processes')
        reason_ = (
            f'image {self.path} ended the process that decoded it ({how}): remove the image, or, '
            'if memory ran out, lower --processes'
        )
        return 'broken', [reason_]

    def kill(self, why):
        self._why = why
        self.process.kill()


def _inspect_on_request(pipe):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the first process
    pipe.send(None)
    while True:
        try:
            pipe.send(inspect(pipe.recv()))
        except (EOFError, OSError):
            return


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
    for kind in ('unreadable', 'broken'):
        if found[kind] or kind == 'broken':
            print(f'{kind}: {len(found[kind]):,}')
            print(''.join(f'  {why}\n' for why in found[kind].values()), end='')


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
        names = image_files(flat)
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
            if os.path.basename(label) != label or is_foreign(label):
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
    """Returns the words of each non-empty line. A byte order mark belongs to none."""
    data = Path(path).read_bytes()
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        lines = data.decode('utf-16' if is_utf16 else 'utf-8-sig').splitlines()
    except UnicodeError as error:
        raise DataError(f'{path} is not a text file: {error}') from error
    if any('\0' in line for line in lines):
        raise DataError(f'{path} is not a text file: it has zero bytes; write it in UTF-8')
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
    source = os.path.realpath(source)  # a relative link would lead elsewhere from the new folder
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
    sys.exit(1 if found['broken'] or found['unreadable'] else 0)


if __name__ == '__main__':
    run_program(main)
