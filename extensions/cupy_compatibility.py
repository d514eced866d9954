"""Makes ChainerMN's kernels compile with CuPy 14; an import of its own, after Chainer's."""

from __future__ import annotations


def mend_chainermn():
    """ChainerMN does not include the header of its own to which CuPy 14 has moved ``half``."""
    from chainer.backends import cuda

    raw = cuda.raw

    def with_half(code, name, *args, **kwargs):
        return raw(code.replace('<cupy/carray.cuh>', '<cuda_fp16.h>'), name, *args, **kwargs)

    cuda.raw = with_half


mend_chainermn()
