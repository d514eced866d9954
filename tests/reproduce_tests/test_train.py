"""What train.py does without mpiexec, on every Python."""

import subprocess
import sys

import chainer

from reproduce.resnet50 import ResNet50
from reproduce.train import decayed_parameters


def test_dry_run_starts_in_a_fresh_interpreter(root, tmp_path):
    done = subprocess.run(
        [sys.executable, root / 'reproduce' / 'train.py', '--dry-run'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert '32,768' in done.stdout and done.stderr == ''
    assert list(tmp_path.iterdir()) == []


def test_weight_decay_is_on_everything_but_gamma_and_beta():
    model = ResNet50(10, width=4)
    decayed = {id(param) for param in decayed_parameters(model)}
    for name, param in model.namedparams():
        assert (id(param) in decayed) == (not name.endswith(('/gamma', '/beta'))), name
    assert len(decayed) == 53 + 2


def test_exemption_goes_by_type_and_not_by_name():
    model = chainer.Chain(
        gamma=chainer.links.Linear(2, 2), other=chainer.links.BatchNormalization(2)
    )
    assert {param.name for param in decayed_parameters(model)} == {'W', 'b'}
