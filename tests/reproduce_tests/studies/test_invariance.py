"""The digests notice one bit."""

import json
import types
from pathlib import Path

import chainer
import numpy as np
import pytest

from extensions import RMSpropWarmup
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
        return types.SimpleNamespace(returncode=0)

    layouts = [(1, 2), (2, 2), (4, 2)]
    monkeypatch.setattr(invariance, 'start_ranks', start_ranks)
    assert invariance.run(layouts) == (odd is None)
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict == ('the same bits' if odd is None else 'the bits differ')
