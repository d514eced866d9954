"""Every attribute of CuPy that the code names is there, in the CuPy that is installed.

tests/mpi/test_cupy_on_host.py runs this on the names of CuPy 14.
"""

import ast
import importlib
import types
from pathlib import Path

import extensions  # isort: skip
import chainer
import pytest

import reproduce

cupy = pytest.importorskip('cupy', reason='no CuPy: EXTRAS=gpu ./run_mpi.sh installs it')

CHAINER_ON_A_GPU = [
    'chainer.backend',
    'chainer.backends.cuda',
    'chainer.functions.activation.relu',
    'chainer.functions.array.reshape',
    'chainer.functions.connection.convolution_2d',
    'chainer.functions.connection.linear',
    'chainer.functions.loss.softmax_cross_entropy',
    'chainer.functions.normalization.batch_normalization',
    'chainer.functions.pooling.average_pooling_2d',
    'chainer.functions.pooling.max_pooling_nd',
    'chainer.functions.pooling.pooling_2d',
    'chainer.functions.pooling.pooling_nd',
    'chainer.link',
    'chainer.optimizer',
    'chainer.utils.conv',
    'chainermn.communicators._communication_utility',
    'chainermn.communicators._memory_utility',
    'chainermn.communicators.mpi_communicator_base',
    'chainermn.communicators.pure_nccl_communicator',
    'chainermn.nccl',
]
# What Chainer and this project call numpy or cupy, whichever the arrays are of.
CUDA = ('cupy', 'chainer.cuda', 'chainer.backends.cuda', 'chainermn.nccl')
EITHER = ('xp', 'self.xp', 'device.xp', 'param.device.xp')
# CuPy 14 has no cuDNN. Chainer asks cuda.cudnn_enabled before it uses these.
UNUSED = set() if chainer.backends.cuda.cudnn_enabled else {'cudnn', 'libcudnn'}


def modules():
    for package in (extensions, reproduce):
        folder = Path(package.__file__).parent
        for path in sorted(folder.rglob('*.py')):
            if path.stem != '__init__':
                yield '.'.join([package.__name__, *path.relative_to(folder).with_suffix('').parts])
    yield from CHAINER_ON_A_GPU


def named_attributes(source):
    """The dotted names in a source, and what each begins with: a.b.c and a.b."""
    for node in ast.walk(ast.parse(source)):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield '.'.join([node.id, *reversed(parts)])


def missing(names, namespace):
    """Those of the names that begin with a module of CUDA's, or ``xp``, and do not exist."""
    for name in sorted(set(names)):
        root = next((root for root in EITHER if name.startswith(root + '.')), None)
        first, *rest = name.split('.')
        value = namespace.get(first)
        if root is not None:
            value, rest = cupy, name[len(root) + 1 :].split('.')
        of_cuda = isinstance(value, types.ModuleType) and value.__name__.startswith(CUDA)
        if of_cuda and not UNUSED & set(rest):
            for attribute in rest:
                if not hasattr(value, attribute):
                    yield name
                    break
                value = getattr(value, attribute)


@pytest.mark.parametrize('name', modules())
def test_every_attribute_of_cupy_that_is_named_exists(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != 'torch':
            raise
        pytest.skip('needs PyTorch')
    names = named_attributes(Path(module.__file__).read_text())
    assert list(missing(names, vars(module))) == []


def test_the_search_for_attributes_finds_what_is_missing():
    source = 'cuda.cupy.cuda.runtime.nonesuch()\nxp.nothing.of_the_kind\nself.xp.sqrt(x).any\nx.y'
    found = set(missing(named_attributes(source), {'cuda': chainer.backends.cuda}))
    assert found == {'cuda.cupy.cuda.runtime.nonesuch', 'xp.nothing', 'xp.nothing.of_the_kind'}
