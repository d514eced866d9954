"""Eight GPUs, of which CUDA_VISIBLE_DEVICES may hide some."""

import functools
import os
import sys
import threading

from cupy import _names

_current = threading.local()  # each thread has a current GPU
_first_process = []


class CUDARuntimeError(RuntimeError):
    pass


@functools.cache  # CUDA reads the variable at the first call
def _visible():
    numbers = []
    for number in os.environ.get('CUDA_VISIBLE_DEVICES', '0,1,2,3,4,5,6,7').split(','):
        if not (number.isdigit() and int(number) < 8):
            break
        numbers.append(int(number))
    return numbers


def getDeviceCount():
    if not _visible():
        raise CUDARuntimeError('cudaErrorNoDevice: no CUDA-capable device is detected')
    return len(_visible())


def getDevice():
    getDeviceCount()
    if not _first_process:
        _first_process.append(os.getpid())
    if _first_process != [os.getpid()]:
        raise CUDARuntimeError('cudaErrorInitializationError: CUDA does not work after a fork')
    return getattr(_current, 'device', 0)


def setDevice(device):
    getDevice()
    _check(device)
    _current.device = device


def _check(device):
    if not 0 <= device < getDeviceCount():
        raise CUDARuntimeError('cudaErrorInvalidDevice: invalid device ordinal')


def deviceGetPCIBusId(device):
    _check(device)
    return f'0000:{0x3B + _visible()[device]:02X}:00.0'


def getDeviceProperties(device):
    _check(device)
    return {'name': b'host memory', 'totalGlobalMem': 1 << 36, 'major': 0, 'minor': 0}


def memGetInfo():
    return 1 << 36, 1 << 36


def runtimeGetVersion():
    return 13000


driverGetVersion = runtimeGetVersion

_names.complete(sys.modules['cupy.cuda.runtime'], 'cupy.cuda.runtime')
