"""Lines of the sources, found by name: a function, a class, a value, a text on a line.

A place is written ``path`` or ``path:symbol``, as in the project's texts. Line numbers are only
ever results.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
import textwrap
from pathlib import Path

LANGUAGES = {'.py': 'python', '.c': 'c', '.h': 'c', '.cu': 'cuda', '.sh': 'bash', '.json': 'json'}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class NotFound(Exception):
    """A name that is not there, or is there more than once. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines of a file: from ``first`` to ``last``, without the docstrings among them."""

    place: str  # path:symbol
    path: str  # from the project's root
    first: int
    last: int
    text: str

    @property
    def language(self) -> str:
        """The fence's word for the language of the file."""
        return LANGUAGES.get(Path(self.path).suffix, 'text')


def find(root: Path, place: str, start: str = '', end: str = '') -> Lines:
    """Returns the lines of a place, without docstrings.

    Args:
        root (Path): The project's folder.
        place (str): ``path``, ``path:symbol`` or, for a method, ``path:Class.method``. A symbol is
            a function, class or value of Python, or a function of C.
        start (str): A text, as a tag, that stands on one line of the place: the first line. In
            Python, it stands for the statement that the line belongs to.
        end (str): The same for the last line; the line of ``start`` unless given.

    Raises:
        NotFound: There is no such file, symbol or line, or more than one.
    """
    path, _, symbol = place.partition(':')
    if not (root / path).is_file():
        raise NotFound(f'there is no file {path}')
    text = (root / path).read_text('utf-8')
    find_lines = _of_python if path.endswith('.py') else _of_c
    numbers, statements = find_lines(text, symbol, path)
    all_lines = text.splitlines()
    shown = [number for number in numbers if all_lines[number - 1].strip() or number > numbers[0]]
    if start:
        first, _ = _line_with(start, all_lines, shown, place, statements)
        _, last = _line_with(end or start, all_lines, shown, place, statements)
        if last < first:
            raise NotFound(f'in {place}, {end!r} stands before {start!r}')
        shown = [number for number in shown if first <= number <= last]
    while not all_lines[shown[-1] - 1].strip():
        shown.pop()
    code = textwrap.dedent('\n'.join(all_lines[number - 1] for number in shown))
    return Lines(place, path, shown[0], shown[-1], code)


def _line_with(text, all_lines, shown, place, statements) -> tuple[int, int]:
    """The first and the last line of the statement with the text."""
    found = [number for number in shown if text in all_lines[number - 1]]
    if len(found) != 1:
        raise NotFound(f'{len(found) or "no"} lines of {place} have {text!r}; one is needed')
    (line,) = found
    around = [(a, b) for a, b in statements if a <= line <= b]
    return min(around, key=lambda lines: lines[1] - lines[0], default=(line, line))


def _of_python(text, symbol, path):
    """The lines of a symbol but for its docstrings, and the first and last line of statements."""
    tree = ast.parse(text)
    nodes = dict(_named(tree))
    node: ast.AST = tree
    if symbol:
        full = [name for name in nodes if name == symbol or name.endswith(f'.{symbol}')]
        full = [symbol] if symbol in full else full
        if len(full) > 1:
            raise NotFound(f'{path} has {len(full)} of {symbol}: {", ".join(full)}')
        if not full:
            raise NotFound(_no_symbol(path, symbol, nodes))
        node = nodes[full[0]]
    first, last = _span(node, len(text.splitlines()))
    left_out = {number for lines in _docstrings(node, text) for number in lines}
    numbers = [number for number in range(first, last + 1) if number not in left_out]
    return numbers, [_span(n, 0) for n in ast.walk(node) if isinstance(n, ast.stmt)]


def _named(node, prefix=''):
    """(name, node) of functions, classes and values; those within a class or function dotted."""
    for child in getattr(node, 'body', ()):
        if isinstance(child, _DEFINITIONS):
            yield prefix + child.name, child
            yield from _named(child, f'{prefix}{child.name}.')
        elif isinstance(child, (ast.Assign, ast.AnnAssign)) and not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef)
        ):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from ((prefix + t.id, child) for t in targets if isinstance(t, ast.Name))


def _span(node, n_lines) -> tuple[int, int]:
    if isinstance(node, ast.Module):
        return 1, n_lines
    decorators = getattr(node, 'decorator_list', [])
    return min([node.lineno, *(d.lineno for d in decorators)]), node.end_lineno


def _docstrings(node, text):
    """The lines of each docstring, and the blank ones after it."""
    lines = text.splitlines()
    for child in ast.walk(node):
        if isinstance(child, (*_DEFINITIONS, ast.Module)) and ast.get_docstring(child) is not None:
            first, end = child.body[0].lineno, child.body[0].end_lineno or 0
            while end < len(lines) and not lines[end].strip():
                end += 1
            yield range(first, end + 1)


def _of_c(text, symbol, path):
    """The lines of a function of C, or of the whole file."""
    lines = text.splitlines()
    if not symbol:
        return range(1, len(lines) + 1), []
    heads = {
        match[1]: number
        for number, line in enumerate(lines, 1)
        if (match := re.match(r'(?:[A-Za-z_].*?\b)?(\w+)\(', line)) and not line.endswith(';')
    }
    first = heads.get(symbol)
    last = next((n for n in range(first or 1, len(lines) + 1) if lines[n - 1] == '}'), None)
    if not first or not last:
        raise NotFound(_no_symbol(path, symbol, heads))
    return range(first, last + 1), []


def _no_symbol(path, symbol, names) -> str:
    near = difflib.get_close_matches(symbol, names, 1)
    return f'{path} has no {symbol}' + (f'; did you mean {near[0]}?' if near else '')
