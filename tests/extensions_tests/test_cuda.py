"""What can be known of the GPU code on a machine without a GPU; needs the extra "gpu"."""

import ast
import importlib
import importlib.util
import re
import types
from pathlib import Path

import chainer
import chainermn
import numpy as np
import pytest
from mpi4py import MPI

import extensions
import reproduce
from extensions import rmsprop_warmup, rmsprop_warmup_gpu
from reproduce import images

if importlib.util.find_spec('cupy') is None:
    pytest.skip('no CuPy: EXTRAS=gpu ./run_mpi.sh installs it', allow_module_level=True)

import cupy
from cupy._core import _carray, _kernel, _scalar, core
from cupy.cuda import nvrtc

NDARRAY, INDEXER, SCALAR = 1, 2, 3  # CuPy's kinds of kernel arguments


def generated_source(dtype):
    """What CuPy makes of the rule's kernel when it is called with contiguous arrays of a dtype."""
    kernel = cupy.ElementwiseKernel(*rmsprop_warmup.KERNEL)
    array = (NDARRAY, cupy.ndarray, np.dtype(dtype).type, 1, True, True)
    scalar = (SCALAR, _scalar.CScalar, np.dtype(dtype).type, 0, True, True)
    indexer = (INDEXER, _carray.Indexer, None, 1, True, True)
    arrays = {'grad', 'param', 'm', 'delta'}
    kinds = [array if p.name in arrays else scalar for p in kernel.params[:-1]] + [indexer]
    return _kernel._get_elementwise_kernel_code(
        tuple(_kernel._ArgInfo(*kind) for kind in kinds),
        _kernel._TypeMap((('T', np.dtype(dtype).type),)),
        kernel.params,
        kernel.operation,
        kernel.name,
        kernel.preamble,
    )


def source_of_normalization():
    """The same for the kernel that normalizes images."""
    kernel = cupy.ElementwiseKernel(*images.NORMALIZE)
    pixels = (NDARRAY, cupy.ndarray, np.uint8, 4, True, True)
    result = (NDARRAY, cupy.ndarray, np.float32, 1, True, True)
    scalars = [(SCALAR, _scalar.CScalar, p.dtype, 0, True, True) for p in kernel.params[1:-2]]
    indexer = (INDEXER, _carray.Indexer, None, 1, True, True)
    return _kernel._get_elementwise_kernel_code(
        tuple(_kernel._ArgInfo(*kind) for kind in [pixels, *scalars, result, indexer]),
        _kernel._TypeMap(()),
        kernel.params,
        kernel.operation,
        kernel.name,
        kernel.preamble,
    )


def compile_to_ptx(source, capability, *options, raw=False):
    headers = Path(cupy.__file__).parent / '_core' / 'include'
    runtime = Path(importlib.util.find_spec('nvidia.cuda_runtime').submodule_search_locations[0])
    includes = ''.join(f'#include <{name}>\n' for name in core._cupy_header_list)
    source = source if raw else includes + source  # as CuPy does
    program = nvrtc.createProgram(source, 'rmsprop_warmup.cu', (), ())
    options = (
        *options,
        f'--gpu-architecture=compute_{capability}',
        '-std=c++17',
        f'-I{headers}',
        *core._get_cccl_include_options(),
        f'-I{runtime / "include"}',
    )
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    ptx = nvrtc.getPTX(program)
    return ptx.decode() if isinstance(ptx, bytes) else ptx


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('capability', [60, 70, 80, 90])
def test_the_kernel_compiles(capability, dtype):
    ptx = compile_to_ptx(generated_source(dtype), capability, *rmsprop_warmup_gpu.OPTIONS)
    assert f'.target sm_{capability}' in ptx and '.entry rmsprop_warmup' in ptx
    if dtype == 'float32':
        # One pass over memory: four loads for three stores, in each copy that the compiler makes
        # of the loop. And nothing in double precision, in which many GPUs are slow.
        loads, stores = ptx.count('ld.global'), ptx.count('st.global')
        assert loads >= 4 and 3 * loads == 4 * stores
        assert '.f64' not in ptx[ptx.index('.entry') :]
        assert not re.search(r'fma\.|(add|mul)\.(ftz\.)?f', ptx)  # each operation is rounded


@pytest.mark.parametrize('dtype, kind', [('float32', 'f32'), ('float64', 'f64')])
@pytest.mark.parametrize('capability', [60, 70, 80, 90])
def test_the_kernel_of_all_parameters_compiles(capability, dtype, kind):
    source = rmsprop_warmup_gpu.source(dtype)
    ptx = compile_to_ptx(source, capability, *rmsprop_warmup_gpu.OPTIONS, raw=True)
    assert f'.target sm_{capability}' in ptx and '.entry rmsprop_warmup_all' in ptx
    loads = len(re.findall(rf'ld\.global(\.nc)?\.{kind}', ptx))
    stores = len(re.findall(rf'st\.global\.{kind}', ptx))
    assert loads >= 4 and stores == ptx.count('st.global')
    if dtype == 'float32':
        assert 3 * loads == 4 * stores and '.f64' not in ptx[ptx.index('.entry') :]
    assert not re.search(r'fma\.|(add|mul)\.(ftz\.)?f', ptx)  # each operation is rounded


@pytest.mark.parametrize('capability', [60, 70, 80, 90])
def test_the_normalization_compiles(capability):
    ptx = compile_to_ptx(source_of_normalization(), capability)
    assert f'.target sm_{capability}' in ptx and '.entry normalize' in ptx
    loads, stores = ptx.count('ld.global'), ptx.count('st.global')
    assert loads == stores >= 1 and 'ld.global.u8' in ptx.replace('.nc', '')
    assert 'fma.rn.f32' not in ptx  # the bits of NumPy: two roundings


def test_a_kernel_that_does_not_compile_fails_here():
    with pytest.raises(pytest.fail.Exception, match='one_minus_mu3'):
        compile_to_ptx(
            generated_source('float32').replace('one_minus_mu2 *', 'one_minus_mu3 *'), 70
        )


# --- Every attribute of CuPy that the code names is there -----------------------------------------

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
        if isinstance(value, types.ModuleType) and value.__name__.startswith(CUDA):
            for attribute in rest:
                if not hasattr(value, attribute):
                    yield name
                    break
                value = getattr(value, attribute)


@pytest.mark.parametrize('name', modules())
def test_every_attribute_of_cupy_that_is_named_exists(name):
    module = importlib.import_module(name)
    names = named_attributes(Path(module.__file__).read_text())
    assert list(missing(names, vars(module))) == []


def test_the_search_for_attributes_finds_what_is_missing():
    source = 'cuda.cupy.cuda.runtime.nonesuch()\nxp.nothing.of_the_kind\nself.xp.sqrt(x).any\nx.y'
    found = set(missing(named_attributes(source), {'cuda': chainer.backends.cuda}))
    assert found == {'cuda.cupy.cuda.runtime.nonesuch', 'xp.nothing', 'xp.nothing.of_the_kind'}


def test_the_communicator_of_gpus_is_made_and_split():
    """With NCCL's library, but nothing allocated."""
    assert chainermn.nccl._available
    comm = extensions.HalfPrecisionNcclCommunicator(MPI.COMM_SELF, 'float16', gradient_scale=4)
    part = comm.split(0, 0)
    for one in (comm, part):
        assert type(one) is extensions.HalfPrecisionNcclCommunicator
        assert one.get_config('gradient_scale') == 4
        assert one.get_config('allreduce_grad_dtype') == np.float16
        assert one.get_config('batched_copy') is True
    part.set_config('stop_on_nonfinite', False)
    assert comm.get_config('stop_on_nonfinite') and not part.get_config('stop_on_nonfinite')
