"""What can be known of the GPU code on a machine without a GPU; needs the extra "gpu"."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import chainermn
import numpy as np
import pytest
from chainermn.communicators import _memory_utility
from mpi4py import MPI

import extensions
from extensions import rmsprop_warmup, rmsprop_warmup_gpu
from reproduce import images

if importlib.util.find_spec('cupy') is None or not importlib.util.find_spec('cupy._core'):
    pytest.skip('no CuPy: EXTRAS=gpu ./run_mpi.sh installs it', allow_module_level=True)

import cupy
from cupy._core import _carray, _kernel, _scalar, core
from cupy.cuda import nvrtc

# The compute capabilities that this CUDA can compile for, times ten.
CAPABILITIES = (60, 70, 80, 90) if nvrtc.getVersion()[0] < 13 else (75, 80, 90, 100, 120)
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
    nvidia = importlib.util.find_spec('nvidia').submodule_search_locations
    runtime = next(path for root in nvidia for path in Path(root).glob('*/include/cuda_fp16.h'))
    includes = ''.join(f'#include <{name}>\n' for name in core._cupy_header_list)
    source = source if raw else includes + source  # as CuPy does
    program = nvrtc.createProgram(source, 'rmsprop_warmup.cu', (), ())
    options = (
        *options,
        f'--gpu-architecture=compute_{capability}',
        '-std=c++17',
        f'-I{headers}',
        *core._get_cccl_include_options(),
        f'-I{runtime.parent}',
    )
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    ptx = nvrtc.getPTX(program)
    return ptx.decode() if isinstance(ptx, bytes) else ptx


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('capability', CAPABILITIES)
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
@pytest.mark.parametrize('capability', CAPABILITIES)
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


@pytest.mark.parametrize('capability', CAPABILITIES)
def test_the_normalization_compiles(capability):
    ptx = compile_to_ptx(source_of_normalization(), capability)
    assert f'.target sm_{capability}' in ptx and '.entry normalize' in ptx
    loads, stores = ptx.count('ld.global'), ptx.count('st.global')
    assert loads == stores >= 1 and 'ld.global.u8' in ptx.replace('.nc', '')
    assert 'fma.rn.f32' not in ptx  # the bits of NumPy: two roundings


@pytest.mark.parametrize('kind', ['pack', 'unpack'])
@pytest.mark.parametrize('capability', CAPABILITIES)
def test_chainermns_kernels_compile(capability, kind):
    """With CuPy 14, only as extensions/cupy_compatibility.py mends them."""
    kernel = getattr(_memory_utility, f'_cupy_batched_{kind}_params')()
    ptx = compile_to_ptx(kernel.code, capability, raw=True)
    assert f'.target sm_{capability}' in ptx and f'.entry cupy_batched_{kind}_params' in ptx


def test_a_kernel_that_does_not_compile_fails_here():
    with pytest.raises(pytest.fail.Exception, match='one_minus_mu3'):
        compile_to_ptx(
            generated_source('float32').replace('one_minus_mu2 *', 'one_minus_mu3 *'), 80
        )


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


def test_cuda_of_nvidias_wheels_is_found_without_the_shells_help():
    """The system's loader does not look into the folders of the wheels."""
    code = (
        'import extensions, chainermn, cupy; from chainer.backends import cuda; '
        'from cupy.cuda import cublas, nvrtc; '
        'print(cuda.available, chainermn.nccl._available, nvrtc.getVersion()[0], '
        'extensions.cupy_compatibility.load_libraries_of_wheels())'
    )
    environment = {k: v for k, v in os.environ.items() if k != 'LD_LIBRARY_PATH'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    found = done.stdout.split(maxsplit=3)
    assert found[:3] == ['True', 'True', str(nvrtc.getVersion()[0])]
    for name in ('cublas', 'nvrtc', 'nccl', 'cudart'):
        assert f'lib{name}.so' in found[3]
