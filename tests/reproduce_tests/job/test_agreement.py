from pathlib import Path

import extensions
import reproduce
from reproduce.job import agreement


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
