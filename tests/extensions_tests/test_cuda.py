"""What can be known of the GPU code on a machine without a GPU; needs the extra "gpu".

Trainings on the CuPy of host memory tell which kernels they launch: this project's, Chainer's and
ChainerMN's. Here, the real CuPy makes their sources, and NVRTC compiles them to machine code, as
in a training on a GPU.
"""

import functools
import importlib.util
import json
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
from extensions import rmsprop_warmup_gpu

if importlib.util.find_spec('cupy') is None or not importlib.util.find_spec('cupy._core'):
    pytest.skip('no CuPy: EXTRAS=gpu ./run_mpi.sh installs it', allow_module_level=True)

import cupy
from cupy._core import _carray, _kernel, _reduction, _scalar, core
from cupy.cuda import nvrtc

# The compute capabilities that this CUDA can compile for, times ten.
CAPABILITIES = (60, 70, 80, 90) if nvrtc.getVersion()[0] < 13 else (75, 80, 90, 100, 120)
NDARRAY, INDEXER, SCALAR = 1, 2, 3  # CuPy's kinds of kernel arguments
BLOCK = 512  # CuPy's threads of a block in a reduction

# tests/mpi/test_cupy_on_host.py keeps it up to date. host_calls.py, beside it, tells what is in it.
RECORDING = Path(__file__).parents[1] / 'cupy_on_host' / 'kernels_of_trainings.jsonl'
KERNELS = [json.loads(line) for line in RECORDING.read_text().splitlines()]


def name_of(kernel):
    return kernel['made with']['name']


def recorded(name):
    return next(kernel for kernel in KERNELS if name_of(kernel) == name)


def raw(code, name, options=()):
    return {'class': 'RawKernel', 'made with': {'code': code, 'name': name, 'options': options}}


def changed(kernel, **texts):
    """The kernel with ``texts[key] = old, new`` put into its texts."""
    made_with = dict(kernel['made with'])
    for key, (old, new) in texts.items():
        assert old in made_with[key]
        made_with[key] = made_with[key].replace(old, new)
    return {**kernel, 'made with': made_with}


def source_of(kernel):
    """What CuPy makes of a kernel when it is launched with its arguments."""
    if kernel['class'] == 'RawKernel':
        return kernel['made with']['code']
    made = getattr(cupy, kernel['class'])(**kernel['made with'])
    params = made.in_params + made.out_params
    pairs = list(zip(params, kernel['arguments']))
    types = {p.ctype: np.dtype(arg[0]).type for p, arg in pairs if arg and p.dtype is None}
    infos = [info(np.dtype(p.dtype or types[p.ctype]).type, arg) for p, arg in pairs]
    infos.append(indexer(next((arg[1] for p, arg in pairs if arg and not p.raw), 1)))
    if kernel['class'] == 'ElementwiseKernel':
        type_map = _kernel._TypeMap(tuple(sorted(types.items())))
        texts = made.operation, made.name, made.preamble
        return _kernel._get_elementwise_kernel_code(tuple(infos), type_map, made.params, *texts)
    infos += [indexer(pairs[-1][1][1]), info(np.int32)]
    type_map = _kernel._TypeMap((*sorted(types.items()), ('IndexT', np.int32)))
    return _reduction._ReductionKernel_get_cached_function_code(
        *(made.nin, made.nout, made._params, tuple(infos), type_map, made.name, BLOCK),
        *(made.reduce_type, made.identity, made.map_expr, made.reduce_expr, made.post_map_expr),
        *(made.preamble, ()),
    )


def info(dtype, array=None):
    if array is None:
        return _kernel._ArgInfo(SCALAR, _scalar.CScalar, dtype, 0, True, True)
    _, n_axes, contiguous = array
    return _kernel._ArgInfo(NDARRAY, cupy.ndarray, dtype, n_axes, contiguous, True)


def indexer(n_axes):
    return _kernel._ArgInfo(INDEXER, _carray.Indexer, None, n_axes, True, True)


def compiled(kernel, capability):
    """The kernel's PTX, after NVRTC has made machine code of it."""
    includes = ''.join(f'#include <{name}>\n' for name in core._cupy_header_list)
    before = '' if kernel['class'] == 'RawKernel' else includes  # as CuPy does
    options = tuple(kernel['made with'].get('options', ()))
    ptx = ptx_of(before + source_of(kernel), options, capability)
    assert f'.entry {name_of(kernel)}(' in ptx
    return ptx


@functools.cache
def ptx_of(source, options, capability):
    headers = Path(cupy.__file__).parent / '_core' / 'include'
    nvidia = importlib.util.find_spec('nvidia').submodule_search_locations
    runtime = next(path for root in nvidia for path in Path(root).glob('*/include/cuda_fp16.h'))
    program = nvrtc.createProgram(source, 'kernel.cu', (), ())
    options = (
        *options,
        f'--gpu-architecture=sm_{capability}',
        '-std=c++17',
        f'-I{headers}',
        *core._get_cccl_include_options(),
        f'-I{runtime.parent}',
    )
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert nvrtc.getCUBIN(program)
    ptx = nvrtc.getPTX(program)
    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
    assert f'.target sm_{capability}' in ptx
    return ptx


@pytest.mark.parametrize('kernel', KERNELS, ids=name_of)
@pytest.mark.parametrize('capability', CAPABILITIES)
def test_each_kernel_of_a_training_compiles(capability, kernel):
    compiled(kernel, capability)


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('capability', CAPABILITIES)
def test_the_update_of_a_parameter_is_one_pass(capability, dtype):
    kernel = recorded('rmsprop_warmup')
    arguments = [arg and [dtype, *arg[1:]] for arg in kernel['arguments']]
    ptx = compiled({**kernel, 'arguments': arguments}, capability)
    if dtype == 'float32':
        # One pass over memory: four loads for three stores, in each copy that the compiler makes
        # of the loop. And nothing in double precision, in which many GPUs are slow.
        loads, stores = ptx.count('ld.global'), ptx.count('st.global')
        assert loads >= 4 and 3 * loads == 4 * stores
        assert '.f64' not in ptx[ptx.index('.entry') :]
        assert not re.search(r'fma\.|(add|mul)\.(ftz\.)?f', ptx)  # each operation is rounded


@pytest.mark.parametrize('dtype, kind', [('float32', 'f32'), ('float64', 'f64')])
@pytest.mark.parametrize('capability', CAPABILITIES)
def test_the_update_of_all_parameters_is_one_pass(capability, dtype, kind):
    source, options = rmsprop_warmup_gpu.source(dtype), rmsprop_warmup_gpu.OPTIONS
    ptx = compiled(raw(source, 'rmsprop_warmup_all', options), capability)
    loads = len(re.findall(rf'ld\.global(\.nc)?\.{kind}', ptx))
    stores = len(re.findall(rf'st\.global\.{kind}', ptx))
    assert loads >= 4 and stores == ptx.count('st.global')
    if dtype == 'float32':
        assert 3 * loads == 4 * stores and '.f64' not in ptx[ptx.index('.entry') :]
    assert not re.search(r'fma\.|(add|mul)\.(ftz\.)?f', ptx)  # each operation is rounded


@pytest.mark.parametrize('capability', CAPABILITIES)
def test_the_normalization_has_the_bits_of_numpy(capability):
    ptx = compiled(recorded('normalize'), capability)
    loads, stores = ptx.count('ld.global'), ptx.count('st.global')
    assert loads == stores >= 1 and 'ld.global.u8' in ptx.replace('.nc', '')
    assert 'fma.rn.f32' not in ptx  # two roundings


@pytest.mark.parametrize('kind', ['pack', 'unpack'])
@pytest.mark.parametrize('capability', CAPABILITIES)
def test_chainermns_kernels_compile(capability, kind):
    """The recorded ones are as extensions/cupy_compatibility.py mends them for CuPy 14."""
    kernel = getattr(_memory_utility, f'_cupy_batched_{kind}_params')()
    compiled(raw(kernel.code, kernel.name), capability)


@pytest.mark.parametrize(
    'name, texts',
    [
        ('rmsprop_warmup', {'operation': ('one_minus_mu2 *', 'one_minus_mu3 *')}),
        ('bn_fwd', {'in_params': ('U inv_std', 'U inv_st')}),
        ('crossent_fwd', {'map_expr': ('ignore_label', 'ignored_label')}),
        ('rmsprop_warmup_all', {'code': ('blockIdx', 'blockIndex')}),
    ],
)
def test_a_kernel_that_does_not_compile_fails_here(name, texts):
    with pytest.raises(pytest.fail.Exception, match='is undefined'):
        compiled(changed(recorded(name), **texts), 80)


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
