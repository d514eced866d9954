"""Imports lead one way: extensions <- the story <- job <- train.py <- twin <- studies.

There is no circle. The story is the experiment's own modules. train.py alone joins it to the job.
The twin has its own arithmetic.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    *('extensions', 'reproduce', 'reproduce.job', 'reproduce.train', 'reproduce.twin'),
    'reproduce.studies',
)
# Of the story: reproduce/*.py.
STORY = {
    *('baselines', 'dataset', 'images', 'listing', 'loader', 'order', 'resnet50', 'settings'),
    'train',
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {
    module_of(path): path
    for package in ('extensions', 'reproduce')
    for path in (ROOT / package).rglob('*.py')
}


def imported(name, modules=None):
    """Our modules that a module imports, at its top or in a function."""
    modules = MODULES if modules is None else modules
    found = set()
    for node in ast.walk(ast.parse(modules[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{name} has a relative import'
            full = {f'{node.module}.{alias.name}' for alias in node.names}
            # "from package import module", or a name out of the package itself
            found |= {f if f in modules else node.module for f in full}
    return {f for f in found if f in modules} - {name}


def layer(name):
    return max(
        i for i, prefix in enumerate(LAYERS) if name == prefix or name.startswith(f'{prefix}.')
    )


def test_every_module_has_its_layer():
    assert len(MODULES) > 50
    story = {name.partition('.')[2] for name in MODULES if name.count('.') == 1}
    packages = {'job', 'studies', 'twin'}
    assert {n for n in story if f'reproduce.{n}' in MODULES} - packages == STORY
    assert (layer('extensions.kernels'), layer('reproduce.images')) == (0, 1)
    assert [layer(f'reproduce.{n}') for n in ('job.ranks', 'train', 'studies.speed.update')] == [
        2,
        3,
        5,
    ]
    assert layer('reproduce.twin.train') == 4


@pytest.mark.parametrize('name', sorted(MODULES))
def test_no_module_imports_from_a_layer_above(name):
    above = {other for other in imported(name) if layer(other) > layer(name)}
    assert not above


def test_no_module_imports_itself_through_others():
    # A package's __init__ imports its modules, whose imports of the package give its names.
    graph = {name: imported(name) - {'extensions'} for name in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(' -> '.join(error.args[1]))


def test_extensions_do_not_import_their_own_package():
    for name in MODULES:
        if layer(name) == 0:
            assert 'extensions' not in imported(name), name


def test_the_twin_shares_the_numbers_and_nothing_that_computes():
    arithmetic = {'rmsprop_warmup', 'resnet50', 'half_precision', 'virtual_workers'}
    twin = {name for name in MODULES if name.startswith('reproduce.twin.')}
    assert {f'reproduce.twin.{name}' for name in arithmetic} < twin
    for name in arithmetic:
        assert imported(f'reproduce.twin.{name}') <= twin, name
    assert not imported('reproduce.twin.virtual_workers')  # others may take this file
    numbers = {f'reproduce.{n}' for n in ('settings', 'images', 'loader', 'order', 'job.supervise')}
    shared = imported('reproduce.twin.train') - twin
    assert shared <= numbers | {'reproduce.twin', 'extensions', 'extensions.schedules'}
    assert all('import_module' not in MODULES[name].read_text() for name in twin)


def test_nothing_but_studies_uses_the_twin():
    for name in MODULES:
        if any(other.startswith('reproduce.twin') for other in imported(name)):
            assert name.startswith(('reproduce.twin', 'reproduce.studies')), name


def test_the_experiment_names_nothing_of_the_job():
    tree = ast.parse(MODULES['reproduce.train'].read_text())
    of_job = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('reproduce.job')
        for alias in node.names
    }
    assert {'ranks', 'supervise'} <= of_job
    (experiment,) = (n for n in tree.body if getattr(n, 'name', '') == 'experiment')
    used = {node.id for node in ast.walk(experiment) if isinstance(node, ast.Name)}
    assert not used & of_job
    (main,) = (n for n in tree.body if getattr(n, 'name', '') == 'main')
    assert main.end_lineno - main.lineno <= 15


def test_a_circle_and_an_arrow_upwards_would_be_found(tmp_path):
    (tmp_path / 'a.py').write_text('def f():\n    from reproduce import b\n')
    (tmp_path / 'b.py').write_text('import reproduce.a\n')
    modules = {'reproduce.a': tmp_path / 'a.py', 'reproduce.b': tmp_path / 'b.py'}
    graph = {name: imported(name, modules) for name in modules}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())
    assert layer('reproduce.studies.speed.iteration') > layer('reproduce.job.report')


@pytest.mark.parametrize(
    'name', ['invariance', 'speed.__main__', 'speed.iteration', 'image_commands']
)
def test_programs_that_start_mpiexec_do_not_start_mpi(name):
    """An mpiexec that is started by a process of MPI joins its job; and it costs a second."""
    seen, waiting = set(), {f'reproduce.studies.{name}'}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        text = MODULES[module].read_text()
        tree = ast.parse(text)
        top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
        assert not {n for n in names if n.split('.')[0] in ('mpi4py', 'chainer', 'chainermn')}, (
            module
        )
        waiting |= {m for m in imported_at_top(tree) if m in MODULES} - seen


def imported_at_top(tree):
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f'{node.module}.{alias.name}'
                yield full if full in MODULES else node.module
