"""The study of the wire's precision, against the same gradients summed by hand."""

import functools
import json

import numpy as np
import pytest

from reproduce.dataset import write_digits
from reproduce.listing import list_images
from reproduce.studies import precision

STUDY = precision.Study(workers=(1, 3), local_batch_size=2, steps=1)
KINDS = {'convolution': '/conv', 'batch normalization': '/bn', 'fully connected': '/fc'}


@pytest.mark.slow
def test_errors_are_those_of_the_definition(shallow, tmp_path, capsys):
    result = precision.run(STUDY, tmp_path / 'out')
    write_digits(tmp_path / 'digits')
    gradient_of = precision.Gradients(STUDY, list_images(tmp_path / 'digits' / 'train'))
    gradient_of.train()
    gradients = []
    for worker in range(3):
        gradient_of(worker)
        gradients.append({n: p.grad.copy() for n, p in gradient_of.model.namedparams()})
    assert not np.array_equal(gradients[0]['/fc/W'], gradients[1]['/fc/W'])
    flushed = nonzero = 0
    for n in STUDY.workers:
        for kind, mark in KINDS.items():
            names = [name for name in gradients[0] if mark in name]
            wide = [np.concatenate([g[k].ravel() for k in names]) for g in gradients[:n]]
            half = [array.astype(np.float16) for array in wide]
            reference = np.mean(wide, axis=0, dtype=np.float64)
            means = (
                (np.sum(half, axis=0, dtype=np.float64) / n).astype(np.float16),
                functools.reduce(np.add, half) / np.float16(n),
                functools.reduce(np.add, wide) / np.float32(n),
            )
            for name, mean in zip(precision.REDUCERS, means):
                error = np.linalg.norm(mean - reference) / np.linalg.norm(reference)
                assert result['errors'][n][kind][name] == pytest.approx(error, rel=1e-6)
        assert sum(map(len, gradients[:n])) == n * len(gradients[0])
        nonzero = sum(np.count_nonzero(a) for g in gradients[:n] for a in g.values())
        kept = sum(
            np.count_nonzero(a.astype(np.float16)) for g in gradients[:n] for a in g.values()
        )
        flushed = (nonzero - kept) / nonzero
        assert flushed > 0
        assert result['cast'][n] == {'flushed': pytest.approx(flushed), 'inf': 0, 'nan': 0}
    written = json.loads((tmp_path / 'out' / 'precision.json').read_text())
    assert written['errors']['3'] == result['errors'][3] and written['images'] == 1437
    assert (tmp_path / 'out' / 'precision.png').read_bytes().startswith(b'\x89PNG')
    out = capsys.readouterr().out
    assert f'{result["errors"][3]["convolution"]["float16, sum of a ring"]:.2e}' in out
    assert f'flushed {flushed:.2%} of the nonzero gradients to zero' in out


@pytest.mark.slow
def test_other_ways_to_a_total_batch(shallow, tmp_path, capsys):
    study = precision.Study(workers=(3,), local_batch_size=2, steps=1)
    result = precision.accumulation(study)
    write_digits(tmp_path / 'digits')
    gradient_of = precision.Gradients(study, list_images(tmp_path / 'digits' / 'train'))
    gradient_of.train()
    links = [link for link in gradient_of.model.links() if hasattr(link, 'avg_mean')]
    gradients, means, variances = [], [], []
    for worker in range(3):
        gradient_of(worker)
        gradients.append(np.concatenate([p.grad.ravel() for p in gradient_of.model.params()]))
        means.append(np.concatenate([link.avg_mean for link in links]))
        variances.append(np.concatenate([link.avg_var for link in links]))
    ours = np.mean([g.astype(np.float16) for g in gradients], axis=0, dtype=np.float64)
    ours = ours.astype(np.float16).astype(np.float64)
    plain = np.mean(gradients, axis=0, dtype=np.float64)
    (grad, mean, variance), whole = result.values()
    assert grad == pytest.approx(np.linalg.norm(plain - ours) / np.linalg.norm(ours), rel=1e-3)
    for found, values in ((mean, means), (variance, variances)):
        average = np.mean(values, axis=0)
        expected = np.linalg.norm(values[-1] - average) / np.linalg.norm(average)
        assert found == pytest.approx(expected, rel=1e-3)
    assert min(whole) > 0.1 > grad
    assert f'{grad:.1e}' in capsys.readouterr().out
