"""The C library by each compiler that is here, on each processor: NumPy's bits, or a reason."""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from extensions import kernels

pytestmark = pytest.mark.slow
PROGRAMS = Path(__file__).with_name('programs')
PROGRAM = PROGRAMS / 'call_kernels.c'
LIBRARY = f'extensions/kernels/_kernels{sysconfig.get_config_var("EXT_SUFFIX")}'
SOURCE = 'extensions/kernels/kernels.c'
X86 = {'Haswell': True, 'IvyBridge': False, 'Nehalem': False}  # whether C converts float16


def of_kind(kind):
    """Names like gcc-12 on PATH, the oldest compiler first."""
    folders = map(Path, os.environ['PATH'].split(':'))
    names = {path.name for folder in folders for path in folder.glob(f'{kind}-*')}
    versions = (re.fullmatch(rf'{kind}-(\d+)', name) for name in names)
    return [f'{kind}-{n}' for n in sorted(int(version[1]) for version in versions if version)]


def or_skipped(kind):
    reason = f'no {kind}-N on PATH: apt install the oldest and the newest that there are'
    return of_kind(kind) or [pytest.param(kind, marks=pytest.mark.skip(reason=reason))]


COMPILERS = [*or_skipped('gcc'), *or_skipped('clang')]


def needed(command, packages):
    if not shutil.which(command):
        pytest.skip(f'no {command}: apt install {packages}')
    return command


@functools.cache
def values():
    """Any bits, numbers of common sizes, and the borders of their kinds: float32, 4 times n."""
    rng = np.random.RandomState(0)
    any_bits = rng.randint(0, 2**32, 40_000, dtype=np.uint32).view(np.float32)
    common = rng.standard_normal(40_000) * 10.0 ** rng.randint(-9, 4, 40_000)
    odd = [0, -0.0, 1e-45, -1e-42, 1e-38, 6e-8, 3e-8, 65504, 65519.9, 65520, 3e38, np.inf]
    return rng.permutation(np.concatenate([any_bits, common, odd * 10]).astype(np.float32))


def update(quarters, lr, alpha_sgd, alpha_rmsprop, mu1, mu2, one_minus_mu2, eps, rate):
    """[W1] [W2] [W3], each operation rounded to the arrays' dtype."""
    grad, param, m, delta = quarters
    lr, alpha_sgd, alpha_rmsprop, mu1, mu2, one_minus_mu2, eps, rate = np.array(
        [lr, alpha_sgd, alpha_rmsprop, mu1, mu2, one_minus_mu2, eps, rate], grad.dtype
    )
    g = grad + rate * param if rate else grad
    m = mu2 * m + one_minus_mu2 * (g * g)
    scale = alpha_rmsprop / (np.sqrt(m) + eps) + alpha_sgd if alpha_rmsprop else alpha_sgd
    delta = mu1 * delta - scale * g
    return param + lr * delta, m, delta


def counts(of, sent):
    for part in slice(0, -5), slice(-5, None):
        o, s = of[part], sent[part]
        yield [np.sum(o != 0), np.sum(s != 0), np.sum(np.isinf(s)), np.sum(np.isnan(s))]


def mean(rows, dtype):
    first, third, fourth, second = (row.astype(np.float64) for row in rows)
    return ((first + second + third + fourth) / 3).astype(dtype)


@functools.cache
def results_of(float16):
    """What programs/call_kernels.c writes, computed by NumPy."""
    singles = values()
    doubles, halves = singles.astype(np.float64), singles.view(np.float16)

    def packed(dtype):
        sent = (singles * np.float32(2**-10)).astype(dtype)
        return sent, np.array([*counts(singles, sent)])

    def unpacked(sent):
        wrong = ~np.isfinite(sent)
        return sent.astype(np.float32) * np.float32(2**10), np.array(
            [wrong[:-5].sum(), wrong[-5:].sum()]
        )

    with np.errstate(all='ignore'):
        results = [np.array([True])]
        for array in singles, doubles:
            for alpha_rmsprop, rate in (0.3, 0.02), (0, 0):
                quarters = array.reshape(4, -1)
                results += update(
                    quarters, 0.1, 0.7, alpha_rmsprop, 0.9, 0.99, 1 - 0.99, 1e-8, rate
                )
        results += packed(np.float32)
        results += unpacked(singles)
        results += [mean(singles.reshape(4, -1), np.float32), np.array([float16])]
        if float16:
            some = halves[: singles.size].astype(np.float64)
            results += packed(np.float16)
            results += unpacked(halves)
            results += [some, doubles + some]
            results += [mean(halves.reshape(4, -1), np.float16)]
            results += [mean(doubles.reshape(4, -1), np.float16)]
    return results


def same_bits(path, float16):
    """Compares the file with NumPy's results. A NaN's sign and payload have no meaning."""
    content, start = path.read_bytes(), 0
    for i, expected in enumerate(results_of(float16)):
        found = np.frombuffer(content, expected.dtype, expected.size, start).copy()
        start += found.nbytes
        expected = expected.reshape(-1).copy()
        for array in found, expected:
            array[np.isnan(array)] = 1
        np.testing.assert_array_equal(
            found.view(np.uint8), expected.view(np.uint8), err_msg=f'result {i}'
        )
    assert start == len(content)


def build(root, folder, *options, **variables):
    """Runs setup.py's build of the library. Returns its path, also if there is none."""
    environment = {**os.environ, 'LC_ALL': 'C', 'CC': None, **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, 'setup.py', '-q', 'build_ext', *options, f'--build-temp={folder}']
    done = subprocess.run(
        [*command, f'--build-lib={folder}'],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Path(folder, LIBRARY)


@pytest.fixture(scope='module')
def built(root_of_project, tmp_path_factory):
    """``built(compiler)`` returns the library and the program, compiled by it."""

    @functools.cache
    def compile_both(compiler):
        folder = tmp_path_factory.mktemp('built')
        library, program = build(root_of_project, folder, CC=compiler), folder / 'call_kernels'
        assert library.exists(), f'{compiler} made no library'
        subprocess.run([*compiler.split(), PROGRAM, '-ldl', '-o', program], check=True)
        return library, program

    return compile_both


def call_all(both, folder, *emulator):
    library, program = both
    source, result = folder / 'in', folder / 'out'
    values().tofile(source)
    subprocess.run([*emulator, program, library, source, result], check=True)
    return result


@pytest.mark.parametrize('compiler', COMPILERS)
def test_each_compilers_library_has_numpys_bits(built, tmp_path, compiler):
    flags = Path('/proc/cpuinfo').read_text().split()
    same_bits(call_all(built(compiler), tmp_path), 'avx2' in flags and 'f16c' in flags)


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='for x86-64')
@pytest.mark.parametrize('compiler', COMPILERS)
@pytest.mark.parametrize('model', X86)
def test_older_processors(built, tmp_path, compiler, model):
    emulator = needed('qemu-x86_64', 'qemu-user')
    same_bits(call_all(built(compiler), tmp_path, emulator, '-cpu', model), X86[model])


def cross_compiler(kind):
    compiler = needed('aarch64-linux-gnu-gcc', 'gcc-aarch64-linux-gnu libc6-dev-arm64-cross')
    if kind == 'clang':
        newest = (of_kind('clang') or [pytest.skip('no clang-N')])[-1]
        compiler = f'{newest} --target=aarch64-linux-gnu'
    return compiler


@pytest.mark.parametrize('kind', ['gcc', 'clang'])
def test_aarch64(built, tmp_path, kind):
    emulator = needed('qemu-aarch64', 'qemu-user')
    compiler = cross_compiler(kind)
    same_bits(call_all(built(compiler), tmp_path, emulator, '-L', '/usr/aarch64-linux-gnu'), False)


# ---------------------------------------------------------------- a network's functions

# Of all results of programs/call_functions.c, on any processor. It changes when the order of a sum
# does, or the program.
BITS = '94533d84629aa73e30ddafcae6c84b364a48988d5eea65db695a314b843e1d1d'


@pytest.fixture
def digests(built, tmp_path):
    """``digests(compiler, *emulator)``: of what each instruction set computes, by its name."""

    def call(compiler, *emulator):
        library, program = built(compiler)[0], tmp_path / 'call_functions'
        source = PROGRAMS / 'call_functions.c'
        subprocess.run([*compiler.split(), source, '-ldl', '-o', program], check=True)
        subprocess.run([*emulator, program, library, tmp_path / 'result'], check=True)
        return {
            path.suffix[1:]: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in tmp_path.glob('result.*')
        }

    return call


@pytest.mark.parametrize('compiler', COMPILERS)
def test_each_compilers_functions_have_the_same_bits(digests, compiler):
    found = digests(compiler)
    assert set(found) == set(kernels.functions or found) and set(found.values()) == {BITS}


def test_no_function_reads_or_writes_beyond_an_array(root, tmp_path):
    """GCC's sanitizers find nothing, in any instruction set."""
    sanitizers = '-fsanitize=address,undefined'
    kernel_files = [root / 'extensions' / 'kernels' / name for name in ('kernels.c', 'functions.c')]
    library, program = tmp_path / 'library.so', tmp_path / 'call_functions'
    options = [sanitizers, '-g', '-O1', '-ffp-contract=off', '-fno-math-errno', '-fPIC', '-shared']
    linked = subprocess.run(
        ['gcc', *options, *kernel_files, '-lm', '-o', library],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if 'cannot find' in linked.stderr:
        pytest.skip('gcc has no sanitizers: apt install libgcc-N-dev')
    assert linked.returncode == 0, linked.stderr
    source = PROGRAMS / 'call_functions.c'
    subprocess.run(['gcc', sanitizers, source, '-ldl', '-o', program], check=True)
    done = subprocess.run(
        [program, library, tmp_path / 'result'],
        env={**os.environ, 'ASAN_OPTIONS': 'detect_leaks=0', 'UBSAN_OPTIONS': 'halt_on_error=1'},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if 'Shadow memory range interleaves' in done.stderr:
        pytest.skip("an old GCC's sanitizer fails where vm.mmap_rnd_bits is 32")
    assert done.returncode == 0 and not done.stderr, done.stderr
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob('result.*')}
    assert digests == {BITS}


@pytest.mark.skipif(platform.machine() != 'x86_64', reason='for x86-64')
@pytest.mark.parametrize('model', X86)
def test_functions_on_older_processors(digests, model):
    """Haswell has AVX2; the others have no fused multiply-add."""
    found = digests('gcc', needed('qemu-x86_64', 'qemu-user'), '-cpu', model)
    sets = ['avx2', 'plain'] if model == 'Haswell' else ['plain']
    assert found == dict.fromkeys(sets, BITS)


@pytest.mark.parametrize('kind', ['gcc', 'clang'])
def test_functions_on_aarch64(digests, kind):
    emulator = needed('qemu-aarch64', 'qemu-user')
    found = digests(cross_compiler(kind), emulator, '-L', '/usr/aarch64-linux-gnu')
    assert found == dict.fromkeys(['neon', 'plain'], BITS)


# ---------------------------------------------------------------- options and failures

FAST = '-ffast-math -funsafe-math-optimizations -mfpmath=387 -march=native -ffp-contract=fast'


@pytest.fixture(scope='module')
def plain(root_of_project, tmp_path_factory):
    needed('gcc', 'gcc')
    return build(root_of_project, tmp_path_factory.mktemp('plain'), CC='gcc').read_bytes()


@pytest.mark.parametrize(
    'variables',
    [
        {'CFLAGS': FAST, 'CPPFLAGS': FAST, 'LDFLAGS': FAST},
        {'LDSHARED': f'gcc -shared {FAST}'},
        {'CC': 'gcc -ffast-math -funsafe-math-optimizations -ffp-contract=fast'},
        {'CC': 'gcc -Ofast'},
    ],
)
def test_no_other_option_reaches_the_compiler(root, tmp_path, plain, variables):
    assert build(root, tmp_path, **{'CC': 'gcc', **variables}).read_bytes() == plain


def test_options_of_pythons_own_build_do_not_reach_the_compiler(root, tmp_path, plain):
    (tmp_path / 'fast.py').write_text(
        f'from importlib import import_module\n'
        f'own = import_module({sysconfig._get_sysconfigdata_name()!r}).build_time_vars\n'
        f'added = dict.fromkeys(["CFLAGS", "OPT", "LDFLAGS", "LDSHARED", "CCSHARED"], " {FAST}")\n'
        f'build_time_vars = {{**own, **{{name: own[name] + added[name] for name in added}}}}\n'
    )
    variables = {'PYTHONPATH': str(tmp_path), '_PYTHON_SYSCONFIGDATA_NAME': 'fast'}
    program = 'import sysconfig; print(sysconfig.get_config_var("CFLAGS"))'
    seen = subprocess.check_output([sys.executable, '-c', program], env={**os.environ, **variables})
    assert FAST in seen.decode()
    assert build(root, tmp_path, CC='gcc', **variables).read_bytes() == plain


@pytest.fixture
def copy(root, tmp_path):
    """The project's packages without a library, in a folder of their own."""
    for name in 'extensions', 'reproduce':
        ignored = shutil.ignore_patterns('__pycache__', 'results', '*.so', '*.log')
        shutil.copytree(root / name, tmp_path / 'copy' / name, ignore=ignored)
    shutil.copy(root / 'setup.py', tmp_path / 'copy')
    return tmp_path / 'copy'


def install(copy, tmp_path, **variables):
    """Builds as an editable installation does."""
    build(copy, tmp_path, '--inplace', **variables)


def header(copy):
    """What the header of a training says of the update."""
    program = (
        'import extensions, chainer; from reproduce.job import report; '
        'from reproduce.settings import smoke; '
        'print(report.arithmetic_of(smoke(), chainer.get_device("@numpy"))[0])'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.count('\n') == 1, done
    return done.stdout.strip()


def test_a_damaged_library_is_not_loaded_nor_one_of_other_sources(copy, tmp_path):
    needed('gcc', 'gcc')
    library = copy / LIBRARY
    assert header(copy) == f'NumPy (there is no {library}: install again)'
    install(copy, tmp_path, CC='gcc')
    assert header(copy).startswith('compiled C')
    content = library.read_bytes()
    for damaged in content[: len(content) // 2], content[:-1]:
        library.write_bytes(damaged)
        assert header(copy) == f'NumPy ({library} is damaged or of other sources: install again)'
    library.write_bytes(content)
    (copy / SOURCE).write_text(f'{(copy / SOURCE).read_text()}/* changed */')
    assert header(copy) == f'NumPy ({library} is damaged or of other sources: install again)'
    (copy / SOURCE).unlink()
    assert f"No such file or directory: '{copy}" in header(copy)


@pytest.mark.parametrize(
    'variables, reason',
    [
        ({'CC': 'false'}, 'false: exit status 1'),
        ({'CC': 'true'}, 'true: wrote no library'),
        ({'CC': '/no/such/cc'}, '/no/such/cc: No such file or directory'),
        ({'PATH': '/nonexistent'}, 'cc: No such file or directory'),
        ({'CC': 'gcc -funknown'}, "gcc: error: unrecognized command-line option '-funknown'"),
        ({'CC': 'gcc -include none.h'}, 'gcc: <command-line>: fatal error: none.h: .*'),
        ({'CC': './wrapper'}, f'./wrapper: {SOURCE}:.* float arithmetic is not NumPy\'s"'),
    ],
)
def test_why_nothing_was_compiled(copy, tmp_path, variables, reason):
    """In the header in one line, in the log in full. A library of before is gone."""
    needed('gcc', 'gcc')
    wrapper = copy / 'wrapper'
    wrapper.write_text('#!/bin/sh\nexec gcc "$@" -ffast-math\n')
    wrapper.chmod(0o755)
    (copy / LIBRARY).touch()
    install(copy, tmp_path, **variables)
    log = (copy / LIBRARY).with_suffix('.log')
    assert re.fullmatch(rf'NumPy \({reason}; see {log}\)', header(copy))
    assert ' -ffp-contract=off ' in log.read_text()


@pytest.mark.parametrize(
    'compiler, old, new, reason',
    [
        ('sh object', '', '', 'only ET_DYN'),
        ('aarch64-linux-gnu-gcc', '', '', 'cannot open shared object file'),
        (
            'gcc',
            '#define BLOCK',
            'int no(void); int f(void) { return no(); }\n#define BLOCK',
            'undefined symbol: no',
        ),
        (
            'gcc',
            'void mean_float32_float32',
            'void other',
            'undefined symbol: mean_float32_float32',
        ),
    ],
)
def test_a_library_that_cannot_be_used(copy, tmp_path, compiler, old, new, reason):
    needed(compiler.split()[0], 'gcc gcc-aarch64-linux-gnu')
    (copy / 'object').write_text(f'for last; do :; done; exec gcc -c {SOURCE} -o "$last"\n')
    source = (copy / SOURCE).read_text()
    (copy / SOURCE).write_text(source.replace(old, new))
    install(copy, tmp_path, CC=compiler)
    assert (copy / LIBRARY).exists()
    assert re.fullmatch(rf'NumPy \({copy / LIBRARY}.*{reason}.*\)', header(copy))


@pytest.mark.mpi
def test_the_header_tells_of_every_rank(copy, root, mpiexec, job_environment, tmp_path):
    """Rank 1 runs where there is no library. Its options differ, which ends the job next."""
    command = [mpiexec]
    for top, epochs in (root, 1), (copy, 2):
        command += ['-n', '1', 'env', f'PYTHONPATH={top}', sys.executable]
        command += [top / 'reproduce/train.py', '--preset', 'smoke', '--epochs', f'{epochs}']
        command += ['--functions', 'chainer', '--out', tmp_path / 'out', ':']
    done = subprocess.run(
        command[:-1],
        env=job_environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done
    other = f'NumPy (there is no {copy / LIBRARY}: install again)'
    both = f'{header(root)} on 1 of 2 ranks; {other} on 1 of 2 ranks'
    assert f'update        RMSpropWarmup, {both}\n' in done.stdout
