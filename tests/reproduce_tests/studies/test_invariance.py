"""The digests notice one bit."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import chainer
import numpy as np
import pytest

from extensions import RMSpropWarmup, kernels
from reproduce.studies import invariance, invariance_program


def test_each_digest_is_of_its_part():
    model = chainer.Chain(fc=chainer.links.Linear(2, 3), bn=chainer.links.BatchNormalization(3))
    optimizer = RMSpropWarmup(0.1).setup(model)
    model.cleargrads()
    chainer.functions.sum(model.bn(model.fc(np.ones((4, 2), np.float32)))).backward()
    optimizer.update()
    updater = types.SimpleNamespace(get_optimizer=lambda name: optimizer)
    trainer = types.SimpleNamespace(updater=updater)
    log = [{'main/loss': 0.25, 'validation/main/accuracy': 0.5, 'elapsed_time': 3.0}]

    def changed(before):
        after = invariance_program.digests(trainer, log)
        return [name for name in before if before[name] != after[name]]

    before = invariance_program.digests(trainer, log)
    assert len(set(before.values())) == 5
    log[0]['elapsed_time'] = 4.0
    assert changed(before) == []
    for array, name in (
        (model.fc.W.data, 'parameters'),
        (model.bn.avg_var, 'BN statistics'),
        (model.fc.b.update_rule.state['m'], 'optimizer'),
        (model.fc.b.update_rule.state['delta'], 'optimizer'),
    ):
        before = invariance_program.digests(trainer, log)
        array.flat[-1] = np.nextafter(array.flat[-1], np.float32(9))
        assert changed(before) == [name]
    for key, name in (
        ('main/loss', 'training losses'),
        ('validation/main/accuracy', 'validation'),
    ):
        before = invariance_program.digests(trainer, log)
        log[0][key] = np.nextafter(log[0][key], 9)
        assert changed(before) == [name]


@pytest.mark.parametrize('odd', [None, 0, 1, 2])
def test_one_layout_with_other_bits_is_noticed(monkeypatch, capsys, odd):
    def start_ranks(processes, words, *arguments, **options):
        digests = {'parameters': 'a' * 64, 'validation': 'bc'[layouts.index((processes, 2)) == odd]}
        (Path(words[0]) / 'digests.json').write_text(json.dumps(digests))
        (Path(words[0]) / 'settings.json').write_text('{"functions": "numpy"}')
        return types.SimpleNamespace(returncode=0)

    layouts = [(1, 2), (2, 2), (4, 2)]
    monkeypatch.setattr(invariance, 'start_ranks', start_ranks)
    assert invariance.run(layouts) == (odd is None)
    verdict = capsys.readouterr().out.splitlines()[-1 if odd is not None else -2]
    assert verdict == ('the same bits' if odd is None else 'the bits differ')


@pytest.mark.parametrize('parameters, status', [('a' * 64, True), ('b' * 64, False)])
def test_other_bits_than_other_machines_are_noticed(monkeypatch, capsys, parameters, status):
    """A run whose layouts agree."""

    def start_ranks(processes, words, *arguments, **options):
        (Path(words[0]) / 'digests.json').write_text(json.dumps({'parameters': parameters}))
        (Path(words[0]) / 'settings.json').write_text('{"functions": "compiled"}')
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(invariance, 'start_ranks', start_ranks)
    monkeypatch.setattr(invariance, 'GOLDEN', invariance.golden({'parameters': 'a' * 64}))
    assert invariance.run([(1, 2), (2, 1)]) == status
    verdict = capsys.readouterr().out.splitlines()[-1]
    golden = invariance.golden({'parameters': parameters})[:16]
    assert verdict.startswith(golden) and ('as on other machines' in verdict) == status


# The program of invariance on one process, without the instruction sets that argv[1] names.
PROGRAM = """
import sys
from reproduce.job import start
start.before_mpi()
from extensions import kernels
for name in sys.argv.pop(1).split():
    kernels.functions.pop(name)
from reproduce.job import ranks
from reproduce.studies import invariance_program
ranks.run(lambda: invariance_program.main(sys.argv[1:]))
"""


def numpys_features():
    """The instruction sets that NumPy uses if the processor has them."""
    core = getattr(np, '_core', None) or np.core
    found = core._multiarray_umath.__cpu_features__
    return [name for name in core._multiarray_umath.__cpu_dispatch__ if found.get(name)]


OLDER = {  # what the libraries take on a processor of 2008
    'NPY_DISABLE_CPU_FEATURES': ' '.join(numpys_features()),
    'OPENBLAS_CORETYPE': 'Prescott',
    'OPENCV_CPU_DISABLE': 'AVX512-SKX,AVX2,FMA3,AVX,FP16',
    'JSIMD_FORCESSE2': '1',
    'GLIBC_TUNABLES': 'glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4',
}
SETS = list(kernels.functions)


@pytest.mark.skipif(not SETS, reason=kernels.description())
@pytest.mark.parametrize(
    'without, variables',
    [
        ('', {}),
        pytest.param(' '.join(SETS[:-2]), OLDER, marks=pytest.mark.slow),
        pytest.param('', {'OPENBLAS_CORETYPE': 'Haswell'}, marks=pytest.mark.slow),
    ],
    ids=['this processor', 'an older one', 'another BLAS'],
)
def test_the_golden_digest(without, variables, root_of_project, tmp_path):
    environment = {**os.environ, 'PYTHONPATH': str(root_of_project), **variables}
    options = f'{invariance.OPTIONS} --workers 8 --local-batch-size 16 --functions compiled'
    command = [sys.executable, '-c', PROGRAM, without, tmp_path, *options.split()]
    done = subprocess.run(command, check=False, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and f'compiled C, {SETS[bool(without)]}, float32' in done.stdout
    digests = json.loads((tmp_path / 'digests.json').read_text())
    assert invariance.golden(digests) == invariance.GOLDEN, digests
