"""The names that CuPy 14 has, and what stands for those that nothing here needs.

The list is ``dir()`` of the modules and classes of CuPy 14.2.0, without private names.
"""

import re
from pathlib import Path

_LIST = Path(__file__).parents[1] / 'names_of_cupy_14.txt'
NAMES = {
    owner: names.split()
    for owner, names in re.findall(r'^(\S+)\n((?: .+\n)+)', _LIST.read_text(), re.MULTILINE)
}


class NotHere:
    """Exists in CuPy, and can be passed on, but not called."""

    def __init__(self, name):
        self._name = name

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f'the CuPy of host memory lacks {self._name}: add it there')


def complete(target, owner, make=NotHere):
    """Sets each public name that CuPy's module or class ``owner`` has and ``target`` lacks."""
    for name in NAMES[owner]:
        if not (name.startswith('_') or hasattr(target, name)):
            setattr(target, name, make(f'{owner}.{name}'))
