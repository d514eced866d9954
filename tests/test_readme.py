"""The READMEs are true: their links, names, tags, commands, and the program that README.md shows.

A name of this project is written from its root, as `path` or `path:symbol`. As the text of a link,
it leads to that path. In a table and in README.md each such name is a link.
"""

import ast
import json
import re
import subprocess
from pathlib import Path

import extensions  # isort: skip  (first: makes Chainer importable on NumPy 2)
import numpy as np
import pytest

from reproduce.settings import PRESETS, Settings

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('extensions', 'reproduce', 'hostfiles', 'tests')
PATHS = sorted(
    [ROOT / 'README.md', *(path for name in FOLDERS for path in (ROOT / name).rglob('README.md'))]
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
README = TEXTS['README.md']
SOURCES = sorted(path for name in FOLDERS[:2] for path in (ROOT / name).rglob('*.py'))
TAGS = ['[W1]', '[W2]', '[W3]', '[W4]', '[W5]', '[L]', '[N]', '[H]']

POINTER = re.compile(rf'`((?:{"|".join(FOLDERS)})/[\w./-]*|run_mpi\.sh|setup\.py)(?::(\w+))?`')
LINK = re.compile(r'\[([^][]*)\]\(([^()\s]+)\)')
SCRIPT = './run_mpi.sh'


def without_code(text):
    """Prose, tables and links: all but blocks of code."""
    return re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE)


def links_of(name, text):
    """(link text, target's path, anchor) of each link within the project."""
    for words, target in LINK.findall(without_code(text)):
        if not target.startswith(('http://', 'https://')):
            path, _, anchor = target.partition('#')
            yield words, (ROOT / name).parent / path if path else ROOT / name, anchor


def anchors_of(text):
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r'^#+ (.*)$', without_code(text), re.MULTILINE)
    return [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]


def lines_at(path, anchor):
    """The lines of a source at GitHub's anchor, as L7 or L7-L13."""
    first, last = re.fullmatch(r'L(\d+)(?:-L(\d+))?', anchor).groups()
    return path.read_text().splitlines()[int(first) - 1 : int(last or first)]


def section(text, heading):
    (found,) = re.findall(
        rf'^## {re.escape(heading)}\n(.*?)(?=^## |\Z)', text, re.DOTALL | re.MULTILINE
    )
    return found


def rows_of(text):
    """The cells of each row of its tables."""
    return [
        [cell.strip() for cell in line.strip().strip('|').split('|')]
        for line in text.splitlines()
        if line.startswith('|') and not line.startswith('|--')
    ]


def names_of(path):
    text = path.read_text()
    if path.suffix == '.py':
        names = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
        return names
    if path.suffix == '.json':
        found = []
        json.loads(text, object_pairs_hook=lambda pairs: found.extend(key for key, _ in pairs))
        return set(found)
    if path.suffix == '.sh':
        return set(re.findall(r'^(\w+)\(\) \{', text, re.MULTILINE))
    return set(re.findall(r'\w+', text))  # .c and .h


def docstrings_of(path):
    with_docstring = (ast.Module, ast.FunctionDef, ast.ClassDef)
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, with_docstring)]
    return [docstring for docstring in map(ast.get_docstring, nodes) if docstring]


def states(text, tag):
    """Whether a line of a docstring begins with the tag: an equation."""
    return re.search(rf'^ *{re.escape(tag)}  ', text, re.MULTILINE)


def computes(path, tag):
    """Whether a line of code ends with the tag."""
    return re.search(rf'\S.*  (#|//) {re.escape(tag)}$', path.read_text(), re.MULTILINE)


# ---------------------------------------------------------------- links and names


@pytest.mark.parametrize('name', TEXTS)
def test_every_link_leads_somewhere(name):
    for words, path, anchor in links_of(name, TEXTS[name]):
        assert path.exists(), f'{words}: {path}'
        if anchor and path.suffix == '.md':
            assert anchor in anchors_of(path.read_text()), f'{words}: {path}#{anchor}'
        elif anchor:
            assert lines_at(path, anchor), f'{words}: {path}#{anchor}'


@pytest.mark.parametrize('name', TEXTS)
def test_a_link_leads_where_its_text_says(name):
    for words, path, _ in links_of(name, TEXTS[name]):
        pointer = POINTER.fullmatch(words)
        if pointer:
            assert path.resolve() == (ROOT / pointer.group(1)).resolve()


@pytest.mark.parametrize('name', TEXTS)
def test_every_name_exists(name):
    for path, symbol in POINTER.findall(TEXTS[name]):
        assert (ROOT / path).exists(), path
        if symbol:
            assert symbol in names_of(ROOT / path), f'{path} has no {symbol}'


@pytest.mark.parametrize('name', TEXTS)
def test_a_name_in_a_table_or_in_readme_is_a_link(name):
    table = '\n'.join(line for line in TEXTS[name].splitlines() if line.startswith('|'))
    text = README if name == 'README.md' else table
    bare = re.findall(rf'(?<!\[){POINTER.pattern}|{POINTER.pattern}(?!\]\()', text)
    assert not bare


def test_there_are_links_and_names_to_test():
    assert len(TEXTS) >= 8
    for name, n in {'README.md': 20, 'extensions/README.md': 25, 'tests/README.md': 30}.items():
        assert len(list(links_of(name, TEXTS[name]))) >= n
        assert len(POINTER.findall(TEXTS[name])) >= n


# ---------------------------------------------------------------- tags and sources

TABLE = section(TEXTS['extensions/README.md'], 'From the paper to the code')
ROW_OF = {tag: row for row in rows_of(TABLE) for tag in re.findall(r'\[[A-Z]\d?\]', row[0])}


def test_the_table_has_all_tags():
    assert list(ROW_OF) == TAGS


@pytest.mark.parametrize('tag', TAGS)
def test_a_tag_stands_in_one_docstring_on_code_lines_and_in_a_test(tag):
    stated, computed, tested = (
        [ROOT / path for path, _ in POINTER.findall(cell)] for cell in ROW_OF[tag][2:]
    )
    found = [path for path in SOURCES for text in docstrings_of(path) if states(text, tag)]
    assert found == stated
    assert computed and all(computes(path, tag) for path in computed), computed
    assert tested and all(tag in path.read_text() for path in tested), tested


def test_every_tag_in_the_code_is_in_the_table():
    files = [*SOURCES, *(ROOT / 'extensions').rglob('*.h'), *(ROOT / 'extensions').rglob('*.c')]
    found = {
        tag
        for path in files
        for tag in re.findall(r'  (?:#|//) (\[[A-Z]\d?\])$', path.read_text(), re.MULTILINE)
    }
    assert found == set(TAGS)


def test_the_legend_is_that_of_the_code():
    legend = rows_of(section(TEXTS['extensions/README.md'], 'Sources'))[1:]
    assert {letter: text for letter, text in legend} == extensions.SOURCES


# ---------------------------------------------------------------- commands


@pytest.fixture(scope='module')
def verbs():
    """The verbs that run_mpi.sh --help lists, each with its names; those of most are none."""
    done = subprocess.run(
        ['/bin/bash', ROOT / 'run_mpi.sh', '--help'], check=True, capture_output=True, text=True
    )
    listed, names = done.stdout.split('\nExamples:')[0].split('\nNames:')
    found = {verb: [] for verb in re.findall(r'^  ([a-z-]+) +\S', listed, re.MULTILINE)}
    return {**found, **{verb: words.split() for verb, words in re.findall(r'  (\w+) +(.*)', names)}}


def commands_of(text):
    """The words after ./run_mpi.sh in each command, its comment left out."""
    for line in text.splitlines():
        for words in re.findall(rf'{re.escape(SCRIPT)} ([^`#]*)', line):
            yield words.split()


@pytest.mark.parametrize('name', TEXTS)
def test_commands_are_those_of_the_script(name, verbs):
    assert '-m reproduce' not in TEXTS[name]
    for words in commands_of(TEXTS[name]):
        if words and words[0] != '...':
            assert words[0] in verbs, words
            assert not verbs[words[0]] or words[1] in verbs[words[0]], words


def test_every_verb_and_name_stands_in_a_readme(verbs):
    used = [words[:2] for text in TEXTS.values() for words in commands_of(text)]
    for verb in set(verbs) - {'help', 'python'}:
        assert verb in [words[0] for words in used if words], verb
    text = TEXTS['reproduce/README.md']
    for verb, names in verbs.items():
        for name in names:
            assert [verb, name] in used or f'`{name}`' in text, (verb, name)


SLURM = """
--nodes --nodelist --ntasks-per-node --ntasks-per-socket --gpus-per-node --gpus-per-task
--cpus-per-task --cpu-bind --time --signal --requeue --no-requeue --exclusive --overcommit
--batch --mpi
"""


def test_options_exist():
    """Every --option in a README is train.py's, or another command's, or one of mpiexec, Slurm or
    pip."""
    code = ''.join(path.read_text() for path in SOURCES)
    own = {'--' + name.replace('_', '-') for name in Settings.__dataclass_fields__} | {'--dry-run'}
    others = set('--help --hostfile --host --map-by --bind-to --oversubscribe --nv'.split())
    others |= {'--report-bindings', *SLURM.split()}
    pip = set('--no-deps --no-binary --no-build-isolation'.split())
    for name, text in TEXTS.items():
        for option in re.findall(r'(?<![\w-])--[a-z][a-z0-9-]*', text):
            known = option in own | others | pip or f"'{option}'" in code
            assert known or option.replace('--no-', '--', 1) in own, (name, option)


# ---------------------------------------------------------------- README.md


def test_readme_can_be_read_in_one_go():
    assert len(README.splitlines()) <= 150
    assert '![' in '\n'.join(README.splitlines()[:10])


def test_readme_names_no_machine_and_no_date():
    found = re.findall(
        r'\b20\d\d-\d\d(?:-\d\d)?\b|\b(?:AMD|EPYC|Intel|Xeon|VM|virtual machine)\b',
        without_code(README),
    )
    assert not found


def test_the_first_rows_say_what_did_not_run():
    first, second = rows_of(section(README, 'What is reproduced'))[1:3]
    assert '15 minutes' in first[1] and 'Not run' in first[3] and 'GPU' in first[3]
    assert '74.9 %' in second[1] and 'not run' in second[3]
    ((_, path, anchor),) = links_of('README.md', first[2])
    heading = next(
        heading
        for heading in re.findall(r'^## (.*)$', path.read_text(), re.MULTILINE)
        if anchors_of(f'## {heading}') == [anchor]
    )
    assert '15 minutes' in section(path.read_text(), heading)


def test_from_an_equation_one_link_leads_to_its_lines():
    text = section(README, 'The paper in five equations')
    assert text.count('$$') == 2 * 5
    found = []
    for line in text.splitlines():
        tags = re.findall(r'\[[A-Z]\d?\]', line.split('**')[1]) if line.startswith('**') else []
        if tags:
            ((_, path, anchor),) = links_of('README.md', line)
            found += tags
            if tags != ['[H]']:
                lines = lines_at(path, anchor)
                ends = [re.search(r' (?:#|//) (\[\w+\])$', line) for line in lines]
                assert [end[1] for end in ends if end] == tags, line
                assert ends[0] and ends[-1], f'{line}: the tagged lines have moved'
    assert found == TAGS
    assert next(links_of('README.md', text))[1].name == 'rmsprop_warmup_element.h'


def test_from_half_precision_a_second_link_leads_to_both_casts():
    docstring = ast.get_docstring(ast.parse((ROOT / 'extensions/half_precision.py').read_text()))
    assert '``pack``' in docstring
    for path, name in {
        'extensions/kernels/kernels.c': 'pack_float16',
        'extensions/exact_mpi.py': 'kernels.pack',
        'extensions/nccl.py': 'packs',
    }.items():
        assert path in docstring and name in (ROOT / path).read_text()


def test_the_output_has_the_values_of_the_schedules():
    """lr, alpha_sgd and alpha_rmsprop of each epoch's last update, by the smoke run's numbers."""
    settings, batch, n_images = PRESETS['smoke'](), 64, 1437
    (output,) = re.findall(r'^```\n(total batch.*?)^```$', README, re.DOTALL | re.MULTILINE)
    assert f'total batch   {batch} = 2 x 32' in output and f'training      {n_images:,} ' in output
    row = r'^ +(\d+) +(\S+) +(\S+) +(\S+) +\S+ +\S+ +\S+% +\S+% +\S+$'
    rows = re.findall(row, output, re.MULTILINE)
    assert len(rows) >= 3 and int(rows[-1][0]) == settings.epochs
    for epoch, lr, alpha_sgd, alpha_rmsprop in rows:
        last = -(-int(epoch) * n_images // batch) - 1
        of_90 = 90 * last * batch / (n_images * settings.epochs)
        expected_lr = extensions.learning_rate(of_90, batch)
        expected = extensions.alpha_sgd(of_90)
        assert (lr, alpha_sgd) == (f'{expected_lr:.5f}', f'{expected:.5f}')
        assert alpha_rmsprop == f'{extensions.alpha_rmsprop(expected, expected_lr):.3e}'


def test_six_files_to_read():
    items = re.findall(r'^(\d)\. ', section(README, 'Read the code, in this order'), re.MULTILINE)
    assert items == list('123456')


def test_the_program_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r'^```python\n(.*?)^```$', README, re.DOTALL | re.MULTILINE)
    setup, run = code[: code.index('trainer.run()')], 'trainer.run()\n'
    assert code == setup + run
    program = {}
    exec(setup, program)  # noqa: S102  (README's own)
    model, comm, optimizer = program['model'], program['comm'], program['optimizer']
    before = {name: param.array.copy() for name, param in model.namedparams()}
    loss = float(model(program['x'], program['t']).array)
    # Each worker's gradient is rounded on its own, and the extensions see every update.
    workers, alphas = [], []
    add_grad, update = comm.add_grad, optimizer.update
    monkeypatch.setattr(comm, 'add_grad', lambda *a: (workers.append(1), add_grad(*a)))
    monkeypatch.setattr(optimizer, 'update', lambda: (alphas.append(optimizer.alpha_sgd), update()))
    exec(run, program)  # noqa: S102
    assert comm.allreduce_grad_dtype == np.float16
    assert len(workers) == 8 * optimizer.t == 8 * 60
    assert alphas == [extensions.alpha_sgd(90 * i / 60) for i in range(60)]
    for name, param in model.namedparams():
        assert not np.array_equal(param.array, before[name]), name
    assert float(model(program['x'], program['t']).array) < loss / 2


# ---------------------------------------------------------------- the companion


def test_the_first_program_of_the_companion_runs(capsys):
    (code,) = re.findall(
        r'^```python\n(import.*?)^```$', TEXTS['extensions/README.md'], re.DOTALL | re.MULTILINE
    )
    np.random.seed(0)  # of the link's initial values
    exec(code, {})  # noqa: S102  (README's own)
    epochs, losses = zip(*(line.split() for line in capsys.readouterr().out.splitlines()))
    assert epochs == ('1', '2', '3')
    assert float(losses[2]) < float(losses[0])
