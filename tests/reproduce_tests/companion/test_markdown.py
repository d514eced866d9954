"""Excerpts, tests and tables in the Markdown: what they have, and that they are up to date."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reproduce.companion import markdown
from reproduce.companion.__main__ import PAGES, main
from reproduce.companion.excerpts import find
from reproduce.companion.markdown import TextError, renewed
from reproduce.settings import Settings
from reproduce.studies.pictures import step

ROOT = Path(__file__).resolve().parents[3]
ELEMENT = 'extensions/rmsprop_warmup_element.h'
PYTHON = '''"""Of the module."""

VALUE = {
    'a': 1,
}


@decorated
def function(x):
    """Of the function.

    With a second line.
    """

    y = (
        x + 1
    )  # [W1]
    return y


class Class:
    """Of the class."""

    def method(self):
        """Of the method."""
        return 1

    def other(self): pass


class Second:
    def method(self):
        return 3
'''
C = """#define MACRO(x) f(x)
static int declared(int);
/* Of the function. */
static inline int twice(int x)
{
    int y = x; // [W2]
    return 2 * y;
}
int last(void)
{
    return 0;
}
"""


@pytest.fixture
def project(tmp_path):
    """A small project. ``project(line)``: what a page becomes with such a line of cogapp."""
    (tmp_path / 'a.py').write_text(PYTHON)
    (tmp_path / 'a.c').write_text(C)
    (tmp_path / 'texts').mkdir()
    shutil.copytree(ROOT / 'tests' / 'extensions_tests', tmp_path / 'tests' / 'extensions_tests')
    page = tmp_path / 'texts' / 'README.md'

    def write(line):
        page.write_text(f'First\n<!-- [[[cog {line} ]]] -->\nold\n<!-- [[[end]]] -->\nlast\n')
        return renewed(page, tmp_path)

    write.root, write.page = tmp_path, page
    return write


# ---------------------------------------------------------------- the pages


@pytest.mark.parametrize('name', PAGES)
def test_what_is_generated_is_up_to_date(name):
    text = (ROOT / name).read_text()
    assert renewed(ROOT / name, ROOT) == text, 'run ./run_mpi.sh companion'


def test_a_missing_package_is_one_line_with_the_remedy(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    lacking = lambda name, *args: None if name == 'cogapp' else find_spec(name, *args)
    monkeypatch.setattr(importlib.util, 'find_spec', lacking)
    with pytest.raises(SystemExit) as ended:
        main(['--check'])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count('\n') == 1
    assert ' has no package cogapp: ' in error and '".[companion]"' in error


def companion(copy, *words):
    return subprocess.run(
        [sys.executable, '-m', 'reproduce.companion', *words],
        cwd=copy,
        env={**os.environ, 'PYTHONPATH': str(copy)},
        check=False,
        capture_output=True,
        text=True,
    )


def test_a_changed_line_of_the_update_rule_is_noticed_until_the_page_is_renewed(tmp_path):
    for name in ('extensions', 'reproduce', 'hostfiles', 'tests', 'README.md', 'run_mpi.sh'):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns('*.so', '__pycache__')
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path)
    for name in ('setup.py', 'constraints.txt', 'pyproject.toml', 'LICENSE'):
        shutil.copy(ROOT / name, tmp_path)
    page, element = tmp_path / PAGES[0], tmp_path / ELEMENT
    marker = f"<!-- [[[cog excerpt('{ELEMENT}', '[W1]', '[W3]') ]]] -->\n<!-- [[[end]]] -->\n"
    equations = '\n\n'.join(f'$$x \\tag{{W{n}}}$$' for n in (1, 2, 3))
    page.write_text(f'# A\n\n{equations}\n\n{marker}')
    for name in PAGES[1:]:
        (tmp_path / name).write_text(f'# {name}\n')
    stale = companion(tmp_path, '--check')
    assert stale.returncode == 1
    line = len(page.read_text().splitlines())
    assert stale.stderr == f'error: not up to date: {PAGES[0]}:{line}. Run ./run_mpi.sh companion\n'
    assert not (tmp_path / 'results').exists()
    done = companion(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{PAGES[0]} renewed\nresults/companion.html written\n'
    assert companion(tmp_path, '--check').returncode == 0
    text = element.read_text()
    assert text.count('mu1 * delta') == 1
    element.write_text(text.replace('mu1 * delta', 'mu2 * delta'))
    changed = companion(tmp_path, '--check')
    assert changed.returncode == 1 and f'not up to date: {PAGES[0]}:' in changed.stderr
    assert companion(tmp_path).returncode == 0
    assert companion(tmp_path, '--check').returncode == 0
    assert 'mu2 * delta' in page.read_text()
    assert 'mu2 * delta' in re.sub('<[^>]*>', '', (tmp_path / 'results/companion.html').read_text())


# ---------------------------------------------------------------- excerpts


@pytest.mark.parametrize(
    'place, words, lines, text',
    [
        ('a.py:VALUE', (), (3, 5), "VALUE = {\n    'a': 1,\n}"),
        (
            'a.py:function',
            (),
            (8, 18),
            '@decorated\ndef function(x):\n    y = (\n        x + 1\n    )  # [W1]\n    return y',
        ),
        ('a.py:function', ('[W1]',), (15, 17), 'y = (\n    x + 1\n)  # [W1]'),
        ('a.py:function', ('x + 1', 'return'), (15, 18), 'y = (\n    x + 1\n)  # [W1]\nreturn y'),
        ('a.py:Class.method', (), (24, 26), 'def method(self):\n    return 1'),
        ('a.py:other', (), (28, 28), 'def other(self): pass'),
        (
            'a.py:Class',
            (),
            (21, 28),
            'class Class:\n    def method(self):\n        return 1\n\n    def other(self): pass',
        ),
        (
            'a.c:twice',
            (),
            (4, 8),
            'static inline int twice(int x)\n{\n    int y = x; // [W2]\n    return 2 * y;\n}',
        ),
        ('a.c:twice', ('[W2]',), (6, 6), 'int y = x; // [W2]'),
        ('a.c:last', (), (9, 12), 'int last(void)\n{\n    return 0;\n}'),
        ('a.c', ('MACRO', 'declared'), (1, 2), '#define MACRO(x) f(x)\nstatic int declared(int);'),
    ],
)
def test_lines_are_found_by_name(project, place, words, lines, text):
    found = find(project.root, place, *words)
    assert ((found.first, found.last), found.text) == (lines, text)
    new = project(f'excerpt({place!r}, *{words})')
    anchor = f'L{lines[0]}' + (f'-L{lines[1]}' if lines[0] < lines[1] else '')
    language = 'python' if '.py' in place else 'c'
    link = f'[`{place}`](../{place.partition(":")[0]}#{anchor})'
    assert f']]] -->\n\n{link}\n\n```{language}\n{text}\n```\n\n<!-- [[[end]]] -->\nlast' in new
    assert 'old' not in new and new.startswith('First\n<!-- [[[cog excerpt(')


def test_a_whole_file_has_all_but_its_docstrings(project):
    found = find(project.root, 'a.py')
    assert found.text.startswith('VALUE = {') and 'Of the' not in found.text
    assert found.text.endswith('return 3')


def test_renewing_twice_changes_nothing(project):
    new = project("excerpt('a.py:function')")
    project.page.write_text(new)
    assert renewed(project.page, project.root) == new


# What a line of the Markdown asks for, and the error.
WRONG = {
    "excerpt('b.py:f')": 'there is no file b.py',
    "excerpt('a.py:functoin')": 'a.py has no functoin; did you mean function?',
    "excerpt('a.py:method')": 'a.py has 2 of method: Class.method, Second.method',
    "excerpt('a.py:x')": 'a.py has no x',
    "excerpt('a.c:twise')": 'a.c has no twise; did you mean twice?',
    "excerpt('a.c:declared')": 'a.c has no declared',
    "excerpt('a.py:function', '[W9]')": "no lines of a.py:function have '[W9]'; one is needed",
    "excerpt('a.py:Class', 'self')": "2 lines of a.py:Class have 'self'; one is needed",
    "excerpt('a.py:function', 'Of the')": "no lines of a.py:function have 'Of the'; one is needed",
    "excerpt('a.py:function', 'return', '[W1]')": "in a.py:function, '[W1]' stands before 'return'",
    'excerpt()': "excerpt: missing a required argument: 'place'",
    "excerpt('a.py', begin='x')": "excerpt: got an unexpected keyword argument 'begin'",
    "excrept('a.py')": "NameError: name 'excrept' is not defined",
    'excerpt(': "'(' was never closed",
    "tested('W1', 'tests/extensions_tests/test_schedules.py:test_x')": "'W1' is not tags",
    "tested('[W1]', 'a.py:function')": 'a.py:function is not a test, as "tests/test_x.py:test_y"',
    "tested('[W1]', 'tests/extensions_tests/test_schedules.py:test_x')": 'has no test_x',
    "mistake('none')": "test_known_mistakes.py has no 'none'. It has: the RMSprop term outside",
    "settings('mu3')": 'reproduce/settings.py:Settings has no mu3',
    "picture('none')": 'reproduce/studies/pictures has no none',
}


@pytest.mark.parametrize('line', WRONG)
def test_an_error_has_the_file_the_line_and_the_name(project, line):
    with pytest.raises(TextError) as caught:
        project(line)
    message = str(caught.value)
    if (line, sys.version_info < (3, 10)) == ('excerpt(', True):
        assert 'unexpected EOF' in message
    else:
        assert WRONG[line] in message
    assert message.startswith('texts/README.md:2: ') and '\n' not in message


def test_an_excerpt_that_would_end_the_comment_is_refused(project):
    (project.root / 'b.py').write_text('x = [[[1]]]\n')
    with pytest.raises(TextError, match=r'texts/README.md:2: excerpt.* has "]]]"'):
        project("excerpt('b.py')")


def test_a_comment_that_does_not_end(project):
    project.page.write_text("<!-- [[[cog excerpt('a.py') ]]] -->\n")
    with pytest.raises(TextError, match=r"^texts/README.md\(\d\): Missing '\[\[\[end"):
        renewed(project.page, project.root)


# ---------------------------------------------------------------- tests, mistakes, tables


def test_a_test_has_the_mistakes_that_it_catches(project):
    place = 'tests/extensions_tests/test_schedules.py'
    new = project(f"tested('[L] [W4]', '{place}:test_all_3519_updates_of_the_paper')")
    assert re.search(
        r'\*\*Test of \[L\] \[W4\]:\*\* '
        rf'\[`test_all_3519_updates_of_the_paper`\]\(\.\./{place}#L\d+-L\d+\)\. '
        r'It catches \*iterations counted as epochs\* and \*whole epochs instead of fractions\*: '
        r'\[`MISTAKES`\]\(\.\./tests/extensions_tests/test_known_mistakes.py#L\d+-L\d+\)\.\n',
        new,
    )
    alone = project(f"tested('[L]', '{place}:test_learning_rates_of_the_paper')")
    assert 'catches' not in alone and '**Test of [L]:**' in alone


def test_a_section_without_equations_has_its_test_too(project):
    place = 'tests/extensions_tests/test_schedules.py'
    new = project(f"tested('', '{place}:test_learning_rates_of_the_paper')")
    assert f'\n**Test:** [`test_learning_rates_of_the_paper`](../{place}#L' in new


# Lists, and tables of results.
WITHOUT_TEST = {'Results', 'Studies', 'In your own program', 'Against ChainerMN', 'Sources'}


@pytest.mark.parametrize('name', PAGES[:2])
def test_from_each_section_one_link_leads_to_a_test(name):
    sections = re.split(r'^## ', (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
    lacking = {s.partition('\n')[0] for s in sections if not re.search(r'/tests/[^)]+\.py', s)}
    assert lacking <= WITHOUT_TEST and len(sections) >= 8


def test_a_mistake_is_a_diff(project):
    new = project("mistake('a kernel with a misspelt parameter')")
    assert '```diff\n- mu1 * delta\n+ mu_1 * delta\n```\n' in new
    assert f'*A kernel with a misspelt parameter*, in `{ELEMENT}`, caught by [`test_body_' in new


def test_the_settings_have_their_values_and_letters(project):
    rows = project("settings('lr_rmsprop', 'eps', 'alpha_form', 'n_train_images', 'train_root')")
    assert "\n\n| option | the paper's run | source | meaning |\n|---|---|---|---|\n" in rows
    assert '| `--eps` | 1e-8 | R | constant added to the root of the mean square |\n' in rows
    assert '| `--lr-rmsprop` | 0.0003 | R |' in rows
    assert '| `--alpha-form` | `printed` | P, S | form of' in rows
    assert '| `--n-train-images` | 1,281,167 |  |' in rows and '| `--train-root` |  |  |' in rows
    everything = project('settings()')
    assert everything.count('\n| `--') == len(Settings.__dataclass_fields__)


def test_the_legend(project):
    assert '| R | agreement of public re-implementations' in project('legend()')


def test_two_letters_after_a_setting_are_two_sources():
    row = markdown.settings(ROOT, ROOT / 'README.md', 'lr_per_256').splitlines()[2]
    assert row.startswith('| `--lr-per-256` | 0.1 | G, S |') and '(S, G)' not in row


def test_a_picture_has_its_alt_text_its_caption_and_its_command():
    text = markdown.picture(ROOT, ROOT / 'extensions' / 'README.md', 'step')
    assert text.startswith(f'![{step.ALT}](../reproduce/results/figures/step.png)\n\n')
    assert text.endswith(f'*{step.CAPTION} `./run_mpi.sh figures step`*\n')
