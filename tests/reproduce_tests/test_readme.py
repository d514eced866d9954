"""README's table and its pointers are true."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()
POINTERS = sorted(set(re.findall(r'`([\w/.]+\.(?:py|sh|txt))(?::(\w+))?`', README)))
ROWS = [row for row in README.splitlines() if row.startswith('| [')]
TAGS = [tag for row in ROWS for tag in re.findall(r'\[(?:W\d|A|L|B|H)\]', row.split('|')[1])]
SOURCES = sorted((ROOT / 'extensions').glob('*.py')) + sorted((ROOT / 'reproduce').glob('*.py'))


def names_of(path):
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def docstrings_of(path):
    with_docstring = (ast.Module, ast.FunctionDef, ast.ClassDef)
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, with_docstring)]
    return [docstring for docstring in map(ast.get_docstring, nodes) if docstring]


def test_links_lead_where_their_text_says():
    links = re.findall(r'\[`([\w/.]+)(?::\w+)?`\]\(([^)]*)\)', README)
    assert len(links) > 15
    for text, target in links:
        assert text == target
    for target in re.findall(r'\]\((?!https?:)([^)]*)\)', README):
        assert (ROOT / target).exists(), target


def test_the_table_has_all_tags():
    assert TAGS == ['[W1]', '[W2]', '[W3]', '[W4]', '[A]', '[L]', '[B]', '[H]']
    assert len(POINTERS) > 15


@pytest.mark.parametrize('path, name', POINTERS)
def test_every_pointer_resolves(path, name):
    assert (ROOT / path).exists(), path
    if name:
        assert name in names_of(ROOT / path), f'{path} has no {name}'


@pytest.mark.parametrize('tag', TAGS)
def test_every_tag_stands_in_one_docstring_on_a_code_line_and_in_a_test(tag):
    in_docstrings = [path.name for path in SOURCES for d in docstrings_of(path) if tag in d]
    row = next(row for row in ROWS if tag in row)
    code, test = re.findall(r'`(\S+\.py\S*)`', row)
    assert in_docstrings == [Path(code.split(':')[0]).name]
    on_code_lines = [
        line
        for line in (ROOT / code.split(':')[0]).read_text().splitlines()
        if re.search(rf'\S.*  (#|//) {re.escape(tag)}$', line)
    ]
    assert on_code_lines
    assert tag in (ROOT / test.split(':')[0]).read_text()
