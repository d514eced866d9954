"""Rank 1 does otherwise than rank 0: one_rank_errs.py NAME.

NAME is the communicator's. Prints what each rank raises in each case. After each, a mean is right.
"""

import sys

import extensions  # isort: skip
import chainer
import numpy as np
from chainer.backends import cuda
from mpi4py import MPI
from tests_common import model_of

name = sys.argv[1]
comm = extensions.create_communicator(name)
second = comm.rank == 1
device = extensions.device_of(comm)
xp = device.xp


def new_model():
    model = model_of({'/a': np.zeros((4, 3)), '/b': np.zeros(5)})
    model.to_device(device)
    model.a.grad = xp.full((4, 3), comm.rank, np.float32)
    model.b.grad = xp.full(5, 2 * comm.rank, np.float32)
    return model


def missing(model):
    if second:
        model.b.cleargrad()
    comm.multi_node_mean_grad(model)


def lacking(model):
    if second:
        model = model_of({'/a': np.zeros((4, 3))})
        model.to_device(device)
    comm.multi_node_mean_grad(model, zero_fill=True)


def shape(model):
    if second:
        model.b.array = xp.zeros((1, 5), np.float32)
        model.b.grad = xp.zeros((1, 5), np.float32)
    comm.multi_node_mean_grad(model)


def never_set(model):
    if second:
        with model.init_scope():
            model.b = chainer.Parameter(shape=(5,))
            model.b.to_device(device)
    comm.multi_node_mean_grad(model)


def cannot_be_read(model):
    if second:
        model.b._grad_valid = False  # as after it got its size, without cleargrads
    comm.multi_node_mean_grad(model)


def broadcast_without_size(model):
    if second:
        with model.init_scope():
            model.b = chainer.Parameter()
    comm.bcast_data(model)


def broadcast_of_another_shape(model):
    if second:
        model.a.array = xp.zeros((3, 4), np.float32)
    comm.bcast_data(model)


def broadcast_of_another_dtype(model):
    if second:
        model.a.array = xp.zeros((4, 3), np.float64)
    comm.bcast_data(model)


def broadcast_into_read_only(model):
    if second:
        model.a.array.flags.writeable = False
    comm.bcast_data(model)


def one_broadcasts(model):
    (comm.bcast_data if second else comm.multi_node_mean_grad)(model)


def options(model):
    comm.set_config('stop_on_nonfinite', not second)
    try:
        comm.multi_node_mean_grad(model)
    finally:
        comm.set_config('stop_on_nonfinite', True)


def bad_option(model):
    extensions.create_communicator(name, gradient_scale=3 if second else 1)


def other_dtype(model):
    extensions.create_communicator(name, 'float32' if second else 'float16')


def other_communicator(model):
    extensions.create_communicator('naive' if second else name, 'float32')


def workers_that_differ(model):
    comm.add_grad(model)
    if second:
        model.b.cleargrad()
    comm.add_grad(model)
    comm.mean_grad(model)


def no_worker(model):
    if not second:
        comm.add_grad(model)
    comm.mean_grad(model)


def no_worker_anywhere(model):
    comm.mean_grad(model)


def broken_gpu(model):
    def use_none(number):
        raise OSError('all CUDA-capable devices are busy')

    use, cuda.get_device_from_id = cuda.get_device_from_id, use_none
    try:
        if not second:
            cuda.get_device_from_id = use
        extensions.create_communicator(name)
    finally:
        cuda.get_device_from_id = use


CASES = [
    missing,
    lacking,
    shape,
    never_set,
    cannot_be_read,
    broadcast_without_size,
    broadcast_of_another_shape,
]
CASES += [broadcast_of_another_dtype, one_broadcasts, options]
CASES += [bad_option, other_dtype, other_communicator]
ONLY = {
    'mpi': [broadcast_into_read_only, workers_that_differ, no_worker, no_worker_anywhere],
    'pure_nccl': [broken_gpu],
}
for case in CASES + ONLY[name]:
    try:
        case(new_model())
    except Exception as error:  # noqa: BLE001
        print(f'rank {comm.rank}: {case.__name__}: {type(error).__name__}: {error}', flush=True)
    model = new_model()
    comm.multi_node_mean_grad(model)
    assert (model.a.grad == 0.5).all() and (model.b.grad == 1).all(), case
MPI.COMM_WORLD.Barrier()
