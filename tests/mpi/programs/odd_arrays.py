"""Averages and broadcasts arrays that are shared or lie otherwise in memory.

odd_arrays.py OUT NAME: NAME is the communicator's. Saves what each rank gets, for each of CASES.
"""

import sys

import extensions  # isort: skip
import chainer
import chainer.functions as F
import numpy as np
from chainer.backends import cuda
from tests_common import whole_numbers

DTYPE = {'half': np.float16, 'double': np.float64}
SHAPES = {'a': (4, 3), 'b': (4, 3), 'c': (5,)}


def model_of(case, rank, device):
    model = chainer.Link()
    with model.init_scope():
        for name, shape in SHAPES.items():
            array = whole_numbers(rank, name, shape, DTYPE.get(case, np.float32))
            setattr(model, name, chainer.Parameter(array))
    model.to_device(device)
    model.cleargrads()
    return model


def layouts(array):
    """The same numbers, otherwise in memory."""
    xp = chainer.backend.get_array_module(array)
    strided = xp.zeros((2 * array.shape[0], *array.shape[1:]), array.dtype)[::2]
    strided[...] = array
    read_only = array.copy()
    if xp is np:  # all of CuPy's arrays can be written
        read_only.flags.writeable = False
    return {'fortran': xp.asfortranarray(array), 'strided': strided, 'read only': read_only}


def shared(model, rank):
    """x + a + b gives both the same array, on rank 0 alone or everywhere."""
    send = model.device.send
    x = chainer.Variable(send(np.zeros((4, 3), np.float32)))
    y = x + model.a + model.b
    y.grad = send(whole_numbers(rank, 'a', (4, 3)))
    y.backward()
    assert model.a.grad is model.b.grad
    model.c.grad = send(whole_numbers(rank, 'c', (5,)))


def gradients(case, model, rank):
    for name, param in model.namedparams():
        param.grad = param.device.send(whole_numbers(rank, name[1:], param.shape, param.dtype))
    if case == 'shared' or (case == 'shared by one' and rank == 0):
        model.cleargrads()
        shared(model, rank)
    elif case == 'view':  # one array, seen in two shapes
        model.a.grad = model.b.grad.reshape(2, 2, 3).reshape(4, 3)
    elif case == 'two names':
        model.other = model.a
        model._params.add('other')
    elif case in ('fortran', 'strided', 'read only') and rank == 1:
        model.a.grad = layouts(model.a.grad)[case]
        model.c.grad = layouts(model.c.grad)[case]
    elif case == 'broadcast':  # as the gradient of F.sum: read-only, one element
        model.cleargrads()
        (F.sum(model.a) * (rank + 1)).backward()
    elif case == 'none':
        model.cleargrads()


def average(comm, case, scale):
    comm.set_config('gradient_scale', scale)
    wire = np.float32 if case in ('half', 'double') else np.float16
    comm.set_config('allreduce_grad_dtype', wire)
    model = model_of(case, 0, extensions.device_of(comm))
    gradients(case, model, comm.rank)
    comm.multi_node_mean_grad(model)
    return {n[1:]: cuda.to_cpu(p.grad) for n, p in model.namedparams() if p.grad is not None}


def broadcast(comm, case):
    model = model_of(case, comm.rank, extensions.device_of(comm))
    if comm.rank == (0 if case == 'read only' else 1):
        for name in ('a', 'c'):
            param = getattr(model, name)
            array = layouts(param.array)[case]
            param.array = array
            assert param.array is array
    comm.bcast_data(model)
    if case != 'read only' and comm.rank == 1:
        assert param.array is array  # another user of the array sees the values, too
    return {name[1:]: cuda.to_cpu(param.array) for name, param in model.namedparams()}


CASES = ['shared', 'shared by one', 'view', 'two names', 'fortran', 'strided', 'read only', 'half']
CASES += ['double', 'broadcast', 'none']

if __name__ == '__main__':
    out, name = sys.argv[1:]
    comm = extensions.create_communicator(name)
    for case in CASES:
        for scale in (1, 2.0**-3, 2.0**10):
            result = average(comm, case, min(scale, 2.0**7) if case != 'half' else scale)
            np.savez(f'{out}/{case} {scale:g} {comm.rank}.npz', **result)
    for case in ('fortran', 'strided', 'read only'):
        np.savez(f'{out}/bcast {case} {comm.rank}.npz', **broadcast(comm, case))
