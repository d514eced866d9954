"""What cogapp writes into the Markdown: excerpts, tests, tables.

The functions in :data:`WRITERS` are called in comments of the Markdown::

    <!-- [[[cog excerpt('extensions/schedules.py:alpha_sgd', start='u = 2', end='[W5]') ]]] -->
    <!-- [[[end]]] -->
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import io
import os
import re
import runpy
import textwrap
from pathlib import Path

from cogapp.cogapp import Cog, CogError

from reproduce.companion.excerpts import Lines, NotFound, find

MISTAKES = 'tests/extensions_tests/test_known_mistakes.py'
TAG = re.compile(r'\[[A-Z]\d?\]')


class TextError(Exception):
    """The Markdown asks for what is not there. The message has its file and line."""


def link(lines: Lines, page: Path, root: Path, words: str = '') -> str:
    """A link from the page to the lines; its words are their place unless given."""
    target = os.path.relpath(root / lines.path, page.parent)
    anchor = f'L{lines.first}' + (f'-L{lines.last}' if lines.last > lines.first else '')
    return f'[`{words or lines.place}`]({target}#{anchor})'


def excerpt(root, page, place, start='', end='') -> str:
    """The lines of a place, by :func:`~reproduce.companion.excerpts.find`, below a link to them."""
    lines = find(root, place, start, end)
    return f'{link(lines, page, root)}\n\n```{lines.language}\n{lines.text}\n```\n'


def tested(root, page, tags, place) -> str:
    """The test that guards the equations with these tags, or the section if there are none, and the
    known mistakes that it catches."""
    if TAG.sub('', tags).strip():
        raise NotFound(f'{tags!r} is not tags, as "[W1] [W2]"')
    path, _, name = place.partition(':')
    if not name.startswith('test_') or not path.startswith('tests/'):
        raise NotFound(f'{place} is not a test, as "tests/test_x.py:test_y"')
    title = f'Test of {tags}' if tags else 'Test'
    text = f'**{title}:** {link(find(root, place), page, root, name)}.'
    caught = [what for what, (*_, by) in _mistakes(root).items() if _place(by) == place]
    if caught:
        catalogue = link(find(root, f'{MISTAKES}:MISTAKES'), page, root, 'MISTAKES')
        text += f' It catches {_listed([f"*{what}*" for what in caught])}: {catalogue}.'
    return f'{text}\n'


def mistake(root, page, what) -> str:
    """A mistake of a published implementation as a diff, and the test that catches it."""
    mistakes = _mistakes(root)
    if what not in mistakes:
        raise NotFound(f'{MISTAKES} has no {what!r}. It has: {"; ".join(mistakes)}')
    file, old, new, by = mistakes[what]
    test = _place(by)
    name = link(find(root, test), page, root, test.partition(':')[2])
    removed, added = (_marked(sign, code) for sign, code in (('-', old), ('+', new)))
    return (
        f'*{what[0].upper()}{what[1:]}*, in `{file}`, caught by {name}\n\n'
        f'```diff\n{removed}{added}```\n'
    )


def settings(root, page, *names) -> str:
    """A table of the settings with these names, or of all: option, value, sources, meaning."""
    from reproduce.settings import Settings

    fields = {field.name: field for field in dataclasses.fields(Settings)}
    unknown = [name for name in names if name not in fields]
    if unknown:
        raise NotFound(f'reproduce/settings.py:Settings has no {unknown[0]}')
    rows = [('option', "the paper's run", 'source', 'meaning')]
    for name in names or fields:
        text = fields[name].metadata['help']
        letters = sorted(
            {letter for found in _LETTERS.findall(text) for letter in found.split(', ')}
        )
        meaning = re.sub(r' \([A-Z](?:, [A-Z])*\)$', '', text).replace('|', r'\|')
        value = fields[name].default
        rows.append((f'`--{name.replace("_", "-")}`', _value(value), ', '.join(letters), meaning))
    return _table(rows)


def legend(root, page) -> str:
    """The table of the source letters."""
    from extensions import SOURCES

    return _table([('letter', 'source'), *SOURCES.items()])


def picture(root, page, name) -> str:
    """A picture of reproduce/studies/pictures, with its caption and the command that draws it."""
    try:
        module = importlib.import_module(f'reproduce.studies.pictures.{name}')
    except ModuleNotFoundError as error:
        raise NotFound(f'reproduce/studies/pictures has no {name}') from error
    target = os.path.relpath(root / f'reproduce/results/figures/{name}.png', page.parent)
    return f'![{module.ALT}]({target})\n\n*{module.CAPTION} `./run_mpi.sh figures {name}`*\n'


WRITERS = (excerpt, tested, mistake, settings, legend, picture)
_LETTERS = re.compile(r'\(([A-Z](?:, [A-Z])*)\)')


def renewed(page: Path, root: Path) -> str:
    """Returns the page's text with all that is generated made anew.

    Raises:
        TextError: With the file, the line, and the name that is not there.
    """
    name = page.relative_to(root)
    cog = Cog()

    def writer(function, *args, **options):
        try:
            inspect.signature(function).bind(root, page, *args, **options)
        except TypeError as error:
            raise CogError(f'{function.__name__}: {error}') from error
        try:
            text = function(root, page, *args, **options)
        except NotFound as error:
            raise CogError(str(error)) from error
        if ']]]' in text:
            raise CogError(f'{function.__name__}{args} has "]]]", which ends a comment of cogapp')
        cog.cogmodule.out(f'\n{text}\n')

    functions = {f.__name__: functools.partial(writer, f) for f in WRITERS}
    new = io.StringIO()
    try:
        cog.process_file(io.StringIO(page.read_text('utf-8')), new, str(name), functions)
    except (CogError, SyntaxError) as error:
        message = str(error).splitlines()[-1]
        if not message.startswith(f'{name}('):
            message = f'{name}:{cog.cogmodule.firstLineNum}: {message}'
        raise TextError(message) from error
    return new.getvalue()


@functools.cache
def _mistakes(root) -> dict:
    return runpy.run_path(str(root / MISTAKES))['MISTAKES']


def _place(test: str) -> str:
    """path:name of pytest's path::name[parameters]."""
    return test.partition('[')[0].replace('::', ':')


def _marked(sign: str, code: str) -> str:
    return ''.join(f'{sign} {line}\n' for line in textwrap.dedent(code).splitlines())


def _listed(words) -> str:
    return ' and '.join(filter(None, [', '.join(words[:-1]), words[-1]]))


def _value(value) -> str:
    if value is None or isinstance(value, bool):
        return {None: '', True: 'yes', False: 'no'}[value]
    if isinstance(value, int):
        return f'{value:,}'
    return f'{value:g}'.replace('e-0', 'e-') if isinstance(value, float) else f'`{value}`'


def _table(rows) -> str:
    head, *body = ['| ' + ' | '.join(map(str, row)) + ' |\n' for row in rows]
    return ''.join([head, '|' + '---|' * len(rows[0]) + '\n', *body])
