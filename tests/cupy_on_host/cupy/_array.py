"""Arrays, strict as CuPy's, on top of NumPy's."""

import ctypes
import functools
import operator
import types
import warnings

import numpy as np
from host_calls import record

from cupy import cuda
from cupy._names import NotHere, complete


def unwrap(x):
    """Returns what NumPy is to get for an argument, and refuses what CuPy refuses."""
    if isinstance(x, ndarray):
        if x.device.id != cuda.runtime.getDevice():
            raise ValueError(
                f'array device must be same as the current device: array device = {x.device.id} '
                f'while current = {cuda.runtime.getDevice()}'
            )
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f'Unsupported type {type(x)}')
    if isinstance(x, (list, tuple)):
        return type(x)(map(unwrap, x))
    return x


def wrap(host):
    """Returns an array of the current GPU, which shares NumPy's memory."""
    array = ndarray.__new__(ndarray)
    array._host = np.asarray(host)
    array._device_id = cuda.runtime.getDevice()
    return array


def apply(name, function, *args, out=None, **kwargs):
    """Calls NumPy's function. What it returns belongs to the GPU; a view of an argument is none of
    the device's work."""
    hosts = [unwrap(arg) for arg in args]
    kwargs = {key: unwrap(value) for key, value in kwargs.items()}
    if out is not None:
        kwargs['out'] = unwrap(out)
    if isinstance(function, np.ufunc) and not function.signature:
        function = functools.partial(_elementwise, function)
    with np.errstate(all='ignore'):
        result = function(*hosts, **kwargs)
    if isinstance(result, bool) and any(isinstance(arg, ndarray) for arg in args):
        result = np.bool_(result)  # allclose, array_equal
    if isinstance(result, np.ndarray):
        arrays = [host for host in hosts if isinstance(host, np.ndarray)]
        is_view = out is None and any(np.may_share_memory(result, host) for host in arrays)
        if not (is_view or name.startswith('empty')):
            record('launch', name)
        return wrap(result) if out is None else out
    if isinstance(result, np.generic):
        record('launch', name)
        return wrap(result)
    if isinstance(result, (list, tuple)) and any(isinstance(r, np.ndarray) for r in result):
        return type(result)(map(wrap, result))  # split: views
    return result


def _elementwise(ufunc, *hosts, out=None, **kwargs):
    """Calls NumPy's function by CuPy's rules: the result is in C order, and the dtype of an array
    of no dimension, or of NumPy's number, counts as much as that of any other array."""
    shape = np.broadcast_shapes(*map(np.shape, hosts))
    arrays = [
        np.atleast_1d(host) if isinstance(host, (np.ndarray, np.generic)) else host
        for host in hosts
    ]
    if out is not None:
        ufunc(*arrays, out=np.atleast_1d(out), **kwargs)
        return out
    result = ufunc(*arrays, order='C', **kwargs)
    return tuple(r.reshape(shape) for r in result) if ufunc.nout > 1 else np.reshape(result, shape)


def operation(name):
    """CuPy's function or constant of a name: NumPy's, on arrays of the GPU."""
    short = name.rpartition('.')[2]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of names that this NumPy is to lose
        function = getattr(np, short, NotHere)
    if function is NotHere or isinstance(function, types.ModuleType):
        return NotHere(name)
    if isinstance(function, type):
        same = issubclass(function, (np.generic, np.dtype, np.finfo, np.iinfo))
        return function if same else NotHere(name)
    if not callable(function):
        return function
    return lambda *args, **kwargs: apply(short, function, *args, **kwargs)


class Flags:
    """CuPy's arrays have no flag for writing."""

    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata, self.forc, self.fnc = flags.owndata, flags.forc, flags.fnc

    def __getitem__(self, name):
        if name not in ('C_CONTIGUOUS', 'F_CONTIGUOUS', 'OWNDATA'):
            raise KeyError(f'{name} is not defined for cupy.ndarray.flags')
        return getattr(self, name.lower())


class ndarray:
    __array_priority__ = 100

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order='C'):
        self._device_id = cuda.runtime.getDevice()
        if memptr is None:
            self._host = np.empty(shape, dtype, order)
            return
        dtype = np.dtype(dtype)
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_ubyte * n_bytes).from_address(memptr.ptr)
        self._host = np.frombuffer(memory, dtype).reshape(shape)
        self._memory = memptr  # kept alive

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.nbytes)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: Flags(self._host.flags))
    device = property(lambda self: cuda.Device(self._device_id))
    data = property(
        lambda self: cuda.MemoryPointer(self._host.ctypes.data if self.size else 0, self._host)
    )
    T = property(lambda self: self.transpose())

    # --- To the host, which waits

    def get(self, stream=None, order='C', out=None, blocking=True):
        record('wait get')
        if out is None:
            return np.array(self._host, order=order)
        if not isinstance(out, np.ndarray) or out.dtype != self.dtype:
            raise TypeError(f'{self.dtype.name} array cannot be obtained to {out!r}')
        if out.shape != self.shape or not out.flags.forc:
            raise ValueError(f'shape mismatch or not contiguous: {out.shape}, {self.shape}')
        out[...] = self._host
        return out

    def item(self, *args):
        return self.get().item(*args)

    def tolist(self):
        return self.get().tolist()

    def __bool__(self):
        return bool(self.get())

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __index__(self):
        return operator.index(self.get())

    def __repr__(self):
        return repr(self.get())

    def __format__(self, spec):
        return format(self.get(), spec)

    def __array__(self, *args, **kwargs):
        raise TypeError(
            'Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct '
            'a NumPy array explicitly.'
        )

    # --- From the host, and between GPUs

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype:
            raise TypeError(f'{arr!r} cannot be set to a {self.dtype.name} array')
        if arr.shape != self.shape or not self.flags.forc:
            raise ValueError(f'shape mismatch or not contiguous: {arr.shape}, {self.shape}')
        record('copy from the host')
        self._host[...] = arr

    def copy(self, order='C'):
        record('launch copy')
        return wrap(self._host.copy(order))

    def __deepcopy__(self, memo):
        with self.device:
            return self.copy()

    def reduced_view(self, dtype=None):
        return self

    def __dlpack__(self, **options):
        return (self._host if self._host.flags.writeable else self._host.copy()).__dlpack__()

    def __dlpack_device__(self):
        return self._host.__dlpack_device__()

    # --- Elements

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        if self.ndim == 0:
            raise TypeError('iteration over a 0-d array')
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        return apply('getitem', lambda host: host[_key(index)], self)

    def __setitem__(self, index, value):
        if not isinstance(value, ndarray) and np.ndim(value):
            raise ValueError('non-scalar numpy.ndarray cannot be used for fill')
        record('launch setitem')
        unwrap(self)[_key(index)] = unwrap(value) if isinstance(value, ndarray) else value

    # --- Arithmetic

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if method != '__call__':
            return NotImplemented
        return apply(ufunc.__name__, ufunc, *inputs, out=out and out[0], **kwargs)

    def __array_function__(self, function, types, args, kwargs):
        return NotImplemented


def _key(index):
    """The index for NumPy. With an ellipsis, an element is a view of no dimension."""
    key = index if isinstance(index, tuple) else (index,)
    host = []
    for part in key:
        if isinstance(part, ndarray):
            if part.dtype == bool:
                record('wait boolean index')
            part = unwrap(part)
        elif isinstance(part, (list, np.ndarray)):
            record('copy from the host')
        host.append(part)
    return tuple(host) if any(part is Ellipsis for part in host) else (*host, Ellipsis)


def _add_operators():
    def defers(other):
        return (
            not hasattr(other, '__array_ufunc__') and getattr(other, '__array_priority__', 0) > 100
        )

    def binary(ufunc):
        def forward(self, other):
            if defers(other):
                return NotImplemented
            return apply(ufunc.__name__, ufunc, self, other)

        def reflected(self, other):
            return apply(ufunc.__name__, ufunc, other, self)

        def in_place(self, other):
            return apply(ufunc.__name__, ufunc, self, other, out=self)

        return forward, reflected, in_place

    arithmetic = (
        'add sub:subtract mul:multiply truediv:true_divide floordiv:floor_divide mod:remainder '
        'pow:power and:bitwise_and or:bitwise_or xor:bitwise_xor lshift:left_shift '
        'rshift:right_shift matmul'
    )
    comparisons = 'lt:less le:less_equal gt:greater ge:greater_equal eq:equal ne:not_equal'
    for pair in f'{arithmetic} {comparisons}'.split():
        name, _, long_name = pair.partition(':')
        forward, reflected, in_place = binary(getattr(np, long_name or name))
        setattr(ndarray, f'__{name}__', forward)
        if pair in arithmetic.split():
            setattr(ndarray, f'__r{name}__', reflected)
            setattr(ndarray, f'__i{name}__', in_place)
    for name, ufunc in (('neg', np.negative), ('abs', np.absolute), ('invert', np.invert)):
        setattr(ndarray, f'__{name}__', functools.partialmethod(_unary, ufunc))
    ndarray.__hash__ = None


def _unary(self, ufunc):
    return apply(ufunc.__name__, ufunc, self)


def _method(name):
    short = name.rpartition('.')[2]
    function = getattr(np.ndarray, short, None)
    if not callable(function):
        return NotHere(name)
    return lambda self, *args, **kwargs: apply(short, function, self, *args, **kwargs)


_add_operators()
complete(ndarray, 'cupy.ndarray', _method)
