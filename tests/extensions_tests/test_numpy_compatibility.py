import subprocess
import sys

import pytest

PROGRAM = """
import sys
import warnings
import numpy as np
warnings.simplefilter('ignore')
names = [name for name in dir(np) if hasattr(np, name)]
before = {name: getattr(np, name) for name in names}
from extensions import numpy_compatibility
changed = [name for name in names if getattr(np, name) is not before[name]]
assert not changed, changed
removed = 'bool int float complex object str float_ complex_ Inf NaN product cumproduct alltrue'
removed += ' sometrue sctypes'
missing = [name for name in removed.split() if not hasattr(np, name)]
assert not missing, missing
assert numpy_compatibility.restore_removed_names() == [], 'the second call added something'
import chainer, chainermn
assert not {'numpy.distutils', 'pkg_resources'} & sys.modules.keys(), 'its check was imported'
assert np.sctypes['float'][1] is np.float32
x = chainer.Variable(np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3))
assert chainer.functions.resize_images(x, (4, 6)).shape == (1, 1, 4, 6)
"""


def test_restores_what_chainer_needs_and_changes_nothing_else(root):
    subprocess.run([sys.executable, '-c', PROGRAM], cwd=root, check=True)


def test_import_says_nothing(root):
    done = subprocess.run(
        [sys.executable, '-c', 'import extensions'],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ''


@pytest.mark.parametrize('first', ['chainer', 'chainermn'])
def test_a_notebook_goes_on_after_an_import_that_failed(root, first):
    """Without extensions, current NumPy makes Chainer's import fail somewhere in its middle."""
    cells = f"""
import sys
sys.modules['chainer.distributions.bernoulli'] = None
try:
    import {first}
except ImportError:
    print('failed')
del sys.modules['chainer.distributions.bernoulli']
import extensions, chainer, chainermn
link = chainer.links.Linear(1, 1, initialW=2)
extensions.RMSpropWarmup(1).setup(link).update(lambda: chainer.functions.sum(link.W * 3))
print(link.W.array, chainermn.CommunicatorBase.__name__)
"""
    done = subprocess.run(
        [sys.executable, '-c', cells], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout == 'failed\n[[-1.]] CommunicatorBase\n', done.stderr
