"""Which implementation --functions auto stands for, and what it does to the process."""

import platform
import shutil
import subprocess
import sys
import types

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer.backends import cuda
from chainer.functions.activation import relu

from extensions import kernels
from reproduce.job import functions

CPU = chainer.get_device('@numpy')
GPU = types.SimpleNamespace(xp=object(), name='@cupy:0')


@pytest.fixture
def processor(monkeypatch):
    """``processor(machine, sets)``: for which the library has these instruction sets."""

    def be(machine, sets):
        monkeypatch.setattr(platform, 'machine', lambda: machine)
        monkeypatch.setattr(kernels, 'functions', {name: {} for name in sets})

    return be


@pytest.mark.parametrize(
    'machine, sets, device, expected',
    [
        ('x86_64', ['avx512', 'avx2', 'plain'], CPU, 'compiled'),
        ('x86_64', ['avx2', 'plain'], CPU, 'compiled'),
        ('x86_64', ['plain'], CPU, 'numpy'),  # without FMA, C is slow
        ('aarch64', ['neon', 'plain'], CPU, 'compiled'),
        ('ppc64le', ['plain'], CPU, 'compiled'),
        ('x86_64', [], CPU, 'numpy'),
        ('x86_64', ['avx2', 'plain'], GPU, 'chainer'),
    ],
)
def test_what_auto_stands_for(processor, machine, sets, device, expected):
    processor(machine, sets)
    assert functions.resolve('auto', device) == expected
    for name in ('compiled', 'numpy', 'chainer', 'torch'):
        assert functions.resolve(name, device) == name


@pytest.mark.parametrize('name', ['compiled', 'numpy'])
def test_gpus_have_no_functions_of_cpus(processor, name):
    processor('x86_64', ['avx2', 'plain'])
    with pytest.raises(functions.InputError, match=f'{name}: they run on CPUs, not on @cupy:0; '):
        functions.use(name, GPU)


def test_cudnn_may_use_fast_algorithms_but_does_not_time_them(monkeypatch):
    workspaces = []
    monkeypatch.setattr(cuda, 'cupy', GPU.xp)
    monkeypatch.setattr(cuda, 'set_max_workspace_size', workspaces.append)
    for enabled in (False, True):
        monkeypatch.setattr(cuda, 'cudnn_enabled', enabled)
        functions.use('chainer', GPU)
        functions.use('chainer', CPU)
    assert workspaces == [512 << 20] and not chainer.config.autotune


def test_one_implementation_at_a_time():
    x = np.ones((1, 2, 3, 3), np.float32).transpose(0, 1, 3, 2)
    own = relu.ReLU.forward
    try:
        functions.use('numpy', CPU)
        replaced = relu.ReLU.forward
        assert replaced is not own and (F.relu(x).array == 1).all()
        functions.use('numpy', CPU)
        assert relu.ReLU.forward is replaced or relu.ReLU.forward.__wrapped__ is own
    finally:
        functions.use('chainer', CPU)
    assert relu.ReLU.forward is own


FLUSHED = """
import ctypes, sys
import extensions
import chainer, numpy as np
from reproduce.job import functions
tiny = np.full(64, 2.0**-130, np.float32)
ctypes.CDLL(sys.argv[1])
print((tiny * 1).any())
functions.use('chainer', chainer.get_device('@numpy'))
print((tiny * 1).all())
"""


@pytest.mark.skipif(
    platform.machine() != 'x86_64' or not shutil.which('gcc'), reason='needs gcc on x86-64'
)
def test_subnormal_numbers_are_kept_whatever_was_loaded(root_of_project, tmp_path):
    library = tmp_path / 'fast.so'
    subprocess.run(['gcc', '-Ofast', '-shared', '-x', 'c', '/dev/null', '-o', library], check=True)
    command = [sys.executable, '-c', FLUSHED, library]
    said = subprocess.check_output(command, cwd=root_of_project, text=True).split()
    if said[0] == 'True':
        pytest.skip("this gcc's libraries leave them alone")
    assert said == ['False', 'True']


ITERATIONS = """
import resource, sys
import extensions
import chainer, chainer.functions as F, numpy as np
from reproduce.job import functions
from reproduce.resnet50 import ResNet50
if sys.argv[1] != 'none':
    functions.use(sys.argv[1], chainer.get_device('@numpy'))
model = ResNet50(10, 16, seed=0)
x, t = np.ones((16, 3, 32, 32), np.float32), np.arange(16, dtype=np.int32) % 10
for i in range(8):
    if i == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model.cleargrads()
    F.softmax_cross_entropy(model(x), t).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='for glibc')
@pytest.mark.parametrize('name', ['numpy', 'compiled'] if kernels.functions else ['numpy'])
def test_iterations_get_no_new_pages(name, root_of_project):
    """Without mallopt, an iteration has more than a thousand page faults."""

    def faults(name):
        command = [sys.executable, '-c', ITERATIONS, name]
        return float(subprocess.check_output(command, cwd=root_of_project, text=True))

    assert faults(name) < 200
    assert faults('none') > 1000
