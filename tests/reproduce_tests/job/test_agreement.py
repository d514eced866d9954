from pathlib import Path

import chainer
import pytest

import extensions
import reproduce
from extensions import kernels
from reproduce.job import BLAS_THREADS, agreement
from reproduce.settings import Settings


def names(package):
    folder = Path(package.__file__).parent
    return {str(path.relative_to(folder)) for path in agreement._sources(folder)}


def test_the_code_that_ranks_must_share_is_all_sources():
    assert {'schedules.py', 'rmsprop_warmup_element.h', 'kernels/kernels.c'} <= names(extensions)
    found = names(reproduce)
    assert {'train.py', 'job/ranks.py', 'studies/speed/update.py'} <= found
    assert not [name for name in found if name.startswith(('results/', 'data/'))]


def test_any_change_of_a_source_changes_the_hash(monkeypatch, tmp_path):
    monkeypatch.setattr(extensions, '__path__', [str(tmp_path)])
    seen = {agreement._code()}
    for name, text in (('a.py', '1'), ('a.py', '2'), ('b.py', '2'), ('kernels/k.c', '2')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        assert agreement._code() not in seen, name
        seen.add(agreement._code())


def test_each_thing_that_ranks_must_share_is_compared_under_its_name(monkeypatch):
    def items(bias=0.5, seed=1, words=('--seed', '1'), size=10):
        model = chainer.links.Linear(2, 3, initialW=0.25, initial_bias=bias)
        return agreement.items(model, Settings(seed=seed), words, {'a.png': size})

    first = items()
    assert items() == first
    for name, other in (
        ('parameters', items(bias=0.75)),
        ('settings', items(seed=2)),
        ('options', items(words=('--seed', '2'))),
        ('images', items(size=11)),
    ):
        assert {key for key in first if first[key] != other[key]} == {name}


def test_which_processors_matter_to_which_functions(monkeypatch):
    """Compiled functions have the same bits on all; images that OpenCV shrinks need FMA for it."""

    def kinds(functions, fma=True):
        monkeypatch.setattr(kernels, 'has_fma', lambda: fma)
        found = set()
        for model in ('A', 'B'):
            text = f'processor : 0\nmodel name : {model}\n'
            monkeypatch.setattr(Path, 'read_text', lambda self, text=text: text)
            found.add(agreement._processor(functions))
        return found

    for functions in ('chainer', 'numpy', 'torch'):
        assert kinds(functions) == {'A', 'B'}
    (with_fma,), (without,) = kinds('compiled'), kinds('compiled', fma=False)
    assert with_fma != without


@pytest.mark.parametrize('name', BLAS_THREADS)
def test_every_number_of_blas_threads_is_compared(monkeypatch, name):
    monkeypatch.setenv(name, '1')
    first = agreement.of_host()
    monkeypatch.setenv(name, '2')
    other = agreement.of_host()
    assert {key for key in first if first[key] != other[key]} == {'BLAS threads'}
