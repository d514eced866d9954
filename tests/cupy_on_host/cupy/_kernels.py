"""CuPy's three kinds of kernels: their texts are compiled by g++, and run element by element."""

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from host_calls import record_kernel

from cupy._array import ndarray, unwrap
from cupy.cuda import runtime

_INCLUDE = Path(__file__).parents[1] / 'include'
_COMPILE = ('g++', '-O1', '-std=c++17', '-ffp-contract=off', '-w', '-shared', '-fPIC')
_C_TYPES = {
    'bool': 'bool',
    'float16': 'float16',
    'float32': 'float',
    'float64': 'double',
    **{f'int{8 * size}': f'int{8 * size}_t' for size in (1, 2, 4, 8)},
    **{f'uint{8 * size}': f'uint{8 * size}_t' for size in (1, 2, 4, 8)},
}


@functools.cache
def _compiled(source):
    """Returns the function ``run`` of a C++ source. Processes share what was compiled."""
    folder = Path(os.environ.get('HOST_KERNELS') or f'{tempfile.gettempdir()}/cupy-{os.getuid()}')
    folder.mkdir(mode=0o700, exist_ok=True)
    source = '#include <device.h>\n' + source
    headers = ''.join(path.read_text() for path in sorted(_INCLUDE.rglob('*.*h')))
    key = hashlib.sha256(repr((_COMPILE, headers, source)).encode()).hexdigest()[:24]
    library = folder / f'{key}.so'
    if not library.exists():
        own = folder / f'{key}.{os.getpid()}'
        command = [*_COMPILE, '-I', str(_INCLUDE), '-x', 'c++', '-', '-o', str(own)]
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f'g++ cannot compile this kernel:\n{done.stderr}\n{source}')
        own.replace(library)
    return ctypes.CDLL(str(library)).run


def _addresses(arrays):
    return (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])


class _Parameter:
    """One of a kernel: ``raw T name`` or ``float32 name``."""

    def __init__(self, text):
        *kinds, self.type, self.name = text.split()
        self.raw = 'raw' in kinds

    def dtype(self, types):
        return np.dtype(self.type) if self.type in _C_TYPES else types[self.type]

    def check(self, arg, types):
        """Notes the type that a letter stands for, or that an array is of another."""
        if isinstance(arg, np.ndarray):
            raise TypeError(f'Unsupported type {type(arg)}')
        if isinstance(arg, ndarray):
            wanted = self.type if self.type in _C_TYPES else types.setdefault(self.type, arg.dtype)
            if arg.dtype != wanted:
                raise TypeError(f'Type is mismatched. {self.name} {arg.dtype} {wanted}')

    def declared(self, k, arg, types):
        """The C++ before the loop, and that of each turn."""
        c_type = _C_TYPES[self.dtype(types).name]
        if self.raw:
            return f'CArray<{c_type}> {self.name}{{({c_type} *)_a[{k}], _sizes[{k}]}};', ''
        if not isinstance(arg, ndarray):
            return f'const {c_type} {self.name} = *({c_type} *)_a[{k}];', ''
        return '', f'{c_type} &{self.name} = (({c_type} *)_a[{k}])[i];'

    def host(self, arg, shape, types):
        """The argument as the loop reads it: of the dtype and, unless raw, of the shape."""
        if isinstance(arg, ndarray):
            host = unwrap(arg)
            return np.ascontiguousarray(host if self.raw else np.broadcast_to(host, shape))
        return np.array(arg).astype(self.dtype(types))


def _parameters(text):
    return [_Parameter(part) for part in text.split(',') if part.strip()]


def _typedefs(types):
    return ''.join(f'typedef {_C_TYPES[dtype.name]} {t};\n' for t, dtype in sorted(types.items()))


def _shape(parameters, args, size=None):
    shapes = [
        arg.shape for p, arg in zip(parameters, args) if isinstance(arg, ndarray) and not p.raw
    ]
    if not shapes and size is None:
        raise ValueError('Loop size is undecided.')
    return np.broadcast_shapes(*shapes) if shapes else (size,)


def _without_self(arguments):
    return {name: value for name, value in arguments.items() if name != 'self'}


def _as_compiled(parameters, args, shape):
    """Of each argument, dtype, number of axes, and whether it is contiguous; None of a number."""
    loops = [isinstance(arg, ndarray) and not p.raw for p, arg in zip(parameters, args)]
    hosts = [
        np.broadcast_to(arg._host, shape) if looped else getattr(arg, '_host', None)
        for looped, arg in zip(loops, args)
    ]
    n_axes = _count_axes([host for looped, host in zip(loops, hosts) if looped], shape)
    return [
        (host.dtype.name, n_axes if looped else host.ndim, bool(host.flags.c_contiguous))
        if isinstance(host, np.ndarray)
        else None
        for looped, host in zip(loops, hosts)
    ]


def _count_axes(hosts, shape):
    """The axes of a loop, after CuPy has merged those that one stride serves in each array."""
    if all(host.flags.c_contiguous for host in hosts):
        return min(1, len(shape))
    if len(shape) == 2:
        return 2
    axes = []
    for axis in [axis for axis, length in enumerate(shape) if length > 1]:
        if axes and all(h.strides[axis] * shape[axis] == h.strides[axes[-1]] for h in hosts):
            axes.pop()
        axes.append(axis)
    return len(axes)


class ElementwiseKernel:
    def __init__(
        self,
        in_params,
        out_params,
        operation,
        name='kernel',
        reduce_dims=True,
        preamble='',
        *,
        options=(),
    ):
        self.made_with = _without_self(locals())
        self.inputs, self.outputs = _parameters(in_params), _parameters(out_params)
        self.operation, self.name, self.preamble = operation, name, preamble

    def __call__(self, *args, size=None, stream=None, block_size=128):
        parameters = self.inputs + self.outputs
        if len(args) not in (len(self.inputs), len(parameters)):
            raise TypeError(f'Wrong number of arguments for {self.name!r}: {len(args)}')
        types = {}
        for parameter, arg in zip(parameters, args):
            parameter.check(arg, types)
        shape = _shape(parameters, args, size)
        outputs = list(args[len(self.inputs) :]) or [
            ndarray(shape, parameter.dtype(types)) for parameter in self.outputs
        ]
        for parameter, output in zip(self.outputs, outputs):
            if not isinstance(output, ndarray):
                raise TypeError('Output arguments type must be cupy.ndarray')
            if output.shape != shape and not parameter.raw:
                raise ValueError('Out shape is mismatched')
        if 0 in shape:
            return self._result(outputs)
        args = [*args[: len(self.inputs)], *outputs]
        hosts = [p.host(arg, shape, types) for p, arg in zip(parameters, args)]
        before, inside = zip(*(p.declared(k, args[k], types) for k, p in enumerate(parameters)))
        run = _compiled(
            f'{_typedefs(types)}{self.preamble}\n'
            'extern "C" void run(void **_a, const long long *_sizes, long long _n)\n'
            f'{{ Indexer _ind{{_n}}; {" ".join(before)}\n'
            f'for (ptrdiff_t i = 0; i < _n; ++i) {{ {" ".join(inside)}\n'
            f'{self.operation};\n}} }}'
        )
        record_kernel(self, self.made_with, _as_compiled(parameters, args, shape))
        sizes = (ctypes.c_longlong * len(hosts))(*[host.size for host in hosts])
        run(_addresses(hosts), sizes, ctypes.c_longlong(int(np.prod(shape))))
        for output, host in zip(outputs, hosts[len(self.inputs) :]):
            if not np.may_share_memory(output._host, host):
                output._host[...] = host
        return self._result(outputs)

    def _result(self, outputs):
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class ReductionKernel:
    """Of all elements to one."""

    def __init__(
        self,
        in_params,
        out_params,
        map_expr,
        reduce_expr,
        post_map_expr,
        identity,
        name='reduce_kernel',
        reduce_type=None,
        reduce_dims=True,
        preamble='',
    ):
        self.made_with = _without_self(locals())
        self.inputs, (self.output,) = _parameters(in_params), _parameters(out_params)
        self.expressions = map_expr, reduce_expr, post_map_expr, identity
        self.name, self.reduce_type, self.preamble = name, reduce_type, preamble

    def __call__(self, *args, out=None, axis=None, keepdims=False, stream=None):
        if out is not None or axis is not None or keepdims:
            raise NotImplementedError('a reduction of some axes')
        types = {}
        for parameter, arg in zip(self.inputs, args):
            parameter.check(arg, types)
        shape = _shape(self.inputs, args)
        result = ndarray((), self.output.dtype(types))
        hosts = [p.host(arg, shape, types) for p, arg in zip(self.inputs, args)]
        before, inside = zip(*(p.declared(k, args[k], types) for k, p in enumerate(self.inputs)))
        mapped, reduced, post, identity = self.expressions
        c_type = _C_TYPES[result.dtype.name]
        kind = self.reduce_type or c_type
        run = _compiled(
            f'{_typedefs(types)}{self.preamble}\n'
            f'static {kind} _reduced({kind} a, {kind} b) {{ return {reduced}; }}\n'
            'extern "C" void run(void **_a, const long long *_sizes, long long _n)\n'
            f'{{ {kind} _total = {identity}; {" ".join(before)}\n'
            f'{c_type} &{self.output.name} = *({c_type} *)_a[{len(hosts)}];\n'
            f'for (ptrdiff_t _j = 0; _j < _n; ++_j) {{ const ptrdiff_t i = _j; {" ".join(inside)}\n'
            f'_total = _reduced(_total, {mapped}); }}\n'
            f'{{ {kind} a = _total; {post}; }} }}'
        )
        arguments = _as_compiled(self.inputs, args, shape)
        arguments += _as_compiled([self.output], [result], ())
        record_kernel(self, self.made_with, arguments)
        sizes = (ctypes.c_longlong * len(hosts))(*[host.size for host in hosts])
        run(_addresses([*hosts, result._host]), sizes, ctypes.c_longlong(int(np.prod(shape))))
        return result


class RawKernel:
    def __init__(self, code, name, options=(), backend='nvrtc'):
        self.made_with = _without_self(locals())
        self.name = name
        signature = re.search(rf'\b{name}\s*\(([^)]*)\)', code)[1]
        self.types = [re.sub(r'\w+\s*$', '', parameter) for parameter in signature.split(',')]
        passed = ', '.join(f'*({kind} *)a[{k}]' for k, kind in enumerate(self.types))
        fits = ''.join(
            f'if (sizeof({kind}) > sizes[{k}]) return {k + 1};\n'
            for k, kind in enumerate(self.types)
        )
        loops = ''.join(
            f'for ({index}.{axis} = 0; {index}.{axis} < {size}.{axis}; ++{index}.{axis})\n'
            for index, size in (('blockIdx', 'gridDim'), ('threadIdx', 'blockDim'))
            for axis in 'zyx'
        )
        self._run = _compiled(
            f'{code}\nextern "C" int run(void **a, const unsigned *sizes, const unsigned *n)\n'
            f'{{ {fits}gridDim = {{n[0], n[1], n[2]}}; blockDim = {{n[3], n[4], n[5]}};\n'
            f'{loops}{name}({passed}); return 0; }}'
        )

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None):
        counts = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
        if len(args) != len(self.types):
            raise TypeError(f'{self.name} takes {len(self.types)} arguments, not {len(args)}')
        if 0 in counts or np.prod(counts[3:]) > 1024:
            raise runtime.CUDARuntimeError('CUDA_ERROR_INVALID_VALUE: invalid argument')
        hosts = [self._argument(arg) for arg in args]
        sizes = (ctypes.c_uint * len(hosts))(*[host.itemsize for host in hosts])
        record_kernel(self, self.made_with)
        wrong = self._run(_addresses(hosts), sizes, (ctypes.c_uint * 6)(*map(int, counts)))
        if wrong:
            raise TypeError(f'{self.name}: argument {wrong} is smaller than the parameter')

    def _argument(self, arg):
        """What CUDA copies for a parameter: a pointer, or the bytes of a number."""
        if isinstance(arg, ndarray):
            return np.array(unwrap(arg).ctypes.data, np.uint64)
        if hasattr(arg, 'ptr'):
            return np.array(arg.ptr, np.uint64)
        if isinstance(arg, (int, float, np.generic)) or (
            isinstance(arg, np.ndarray) and arg.size == 1
        ):
            return np.asarray(arg)
        raise TypeError(f'Unsupported type {type(arg)}')
