"""The program as users start it: mpiexec, options, files, and every kind of bad input."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from extensions import kernels

pytestmark = pytest.mark.mpi
SMOKE = ('--preset', 'smoke')


@pytest.fixture
def train(mpirun, root):
    def run(n, *options, **keywords):
        return mpirun(n, root / 'reproduce' / 'train.py', *options, **keywords)

    return run


def summary_of(out):
    return json.loads((out / 'summary.json').read_text())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_smoke_run_reaches_95_percent(train, tmp_path):
    out = tmp_path / 'out'
    done = train(2, '--preset', 'smoke', '--out', out, timeout=380)
    assert done.returncode == 0, done.stdout
    summary = summary_of(out)
    assert 0.95 <= summary['top1'] <= 1
    assert summary['validation_images'] == 360
    assert (summary['workers'], summary['processes'], summary['total_batch_size']) == (2, 2, 64)
    assert summary['iterations'] == -(-summary['epochs'] * 1437 // 64)
    log = json.loads((out / 'log').read_text())
    assert [entry['epoch'] for entry in log] == list(range(1, summary['epochs'] + 1))
    assert log[-1]['validation/main/accuracy'] == summary['top1']
    assert log[0]['alpha_sgd'] < 0.1 and log[-1]['alpha_sgd'] == 1
    assert Image.open(out / 'curves.png').size == (1350, 900)
    assert json.loads((out / 'settings.json').read_text())['preset'] == 'smoke'
    assert {'conv1/W', 'fc/b', 'bn1/avg_mean'} < set(np.load(out / 'model.npz').files)
    last_line = done.stdout.strip().splitlines()[-1]
    mebibytes = summary['peak_memory_bytes'] / 2**20
    assert 100 < mebibytes < 1000
    assert last_line == (
        f'top-1 {summary["top1"]:.2%}; at most {mebibytes:,.0f} MiB per process; results in {out}'
    )
    assert (
        done.stdout.count('alpha_rmsprop') == done.stdout.count('total batch') == 1
    )  # rank 0 alone
    chosen = r'^communicator  HalfPrecisionMpiCommunicator; auto: rank 0 on \S+ .*GPU'
    assert re.search(chosen, done.stdout, re.MULTILINE)
    assert 'all-reduce    float16, exact sum\n' in done.stdout
    assert summary['timing']['iterations'] == summary['iterations'] - 3
    assert summary['timing']['iteration'] * summary['iterations'] < summary['seconds']
    assert log[-1]['cast/inf'] == log[-1]['cast/nan'] == 0 < log[-1]['cast/flushed'] < 0.01
    assert f'{log[-1]["cast/flushed"]:.2%}' in done.stdout
    assert re.search(r'iteration \d+ of \d+, epoch .* images/s, .* left', done.stdout)


@pytest.mark.slow
def test_same_bits_on_1_2_4_and_8_processes(root, tmp_path):
    """The whole program, with loader processes, augmentation and an epoch's border."""
    done = subprocess.run(
        [sys.executable, '-m', 'reproduce.studies.invariance'],
        cwd=root,
        env={**os.environ, 'PYTHONPATH': str(root)},
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    head, *rows, verdict, elsewhere = done.stdout.splitlines()
    assert head.split()[-2:] == ['losses', 'validation'] and verdict == 'the same bits'
    assert [tuple(row.split()[:3]) for row in rows] == [
        (str(n), 'x', str(8 // n)) for n in (1, 2, 4, 8)
    ]
    digests = {tuple(row.split()[3:]) for row in rows}
    assert len(digests) == 1 and len(set(*digests)) == 5
    assert 'as on other machines' in elsewhere or 'functions numpy' in elsewhere


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_1024_workers_need_one_buffer_more_than_2(mpirun, root, tmp_path):
    program = root / 'tests' / 'mpi' / 'programs' / 'shallow.py'
    peaks = {}
    for workers, size in ((2, 4), (1024, 1)):  # images of so few pixels take no memory
        out = tmp_path / str(workers)
        options = f'--workers {workers} --local-batch-size {size} --epochs 1 --width 32'.split()
        done = mpirun(2, program, out, *SMOKE, *options, timeout=280)
        assert done.returncode == 0, done.stdout
        peaks[workers] = summary_of(out)['peak_memory_bytes']
    assert re.search(r'iteration \d of 2 \+ [\d,]+ of 1,024 images, .* left', done.stdout)
    parameters = re.search(r'([\d,]+) parameters', done.stdout).group(1)
    buffer = 8 * int(parameters.replace(',', ''))
    assert peaks[1024] - peaks[2] < 2 * buffer  # one, and what the allocator keeps: half of one


def test_all_ranks_start_from_rank_zeros_values(train, mpirun, root, tmp_path):
    models = []
    options = (
        '--preset smoke --workers 2 --local-batch-size 256 --epochs 1 --width 4 --shallow'.split()
    )
    program = root / 'tests' / 'mpi' / 'programs' / 'train_with_own_start.py'
    for run in (train, lambda n, *rest: mpirun(n, program, *rest)):
        out = tmp_path / str(len(models))
        done = run(2, *options, '--out', out)
        assert done.returncode == 0, done.stdout
        models.append(np.load(out / 'model.npz'))
    for name in models[0].files:
        np.testing.assert_array_equal(models[0][name], models[1][name], err_msg=name)


def test_image_folder_and_explicit_options(train, image_folders, tmp_path):
    out = tmp_path / 'out'
    done = train(
        2,
        *'--preset cifar10 --workers 2 --local-batch-size 3 --epochs 2 --width 4 --seed 7'.split(),
        *(
            '--train-root',
            image_folders / 'train',
            '--val-root',
            image_folders / 'val',
            '--out',
            out,
        ),
        *'--communicator naive --allreduce-grad-dtype float32 --alpha-form continuous'.split(),
    )
    assert done.returncode == 0, done.stdout
    assert summary_of(out)['validation_images'] == 10
    assert summary_of(out)['iterations'] == 6
    times = summary_of(out)['timing']
    assert times['iterations'] == 3  # without the first
    assert 0 < times['pack'] < 1e-3 < times['forward_backward'] < times['iteration']  # naive's pack
    last = json.loads((out / 'log').read_text())[-1]
    assert {f'time/{name}' for name in times if name != 'iterations'} <= set(last)
    milliseconds = f'{1000 * times["iteration"]:,.1f} ms, slowest ranks: data '
    assert f'\niteration {milliseconds}' in done.stdout
    settings = json.loads((out / 'settings.json').read_text())
    assert (settings['seed'], settings['stem'], settings['alpha_form']) == (
        7,
        'cifar',
        'continuous',
    )
    assert 'communicator  NaiveCommunicator; asked for\n' in done.stdout
    assert 'all-reduce    float32, ' in done.stdout


def test_dry_run_shows_the_papers_numbers(train, tmp_path):
    done = train(1, '--workers', 1024, '--dry-run', '--out', tmp_path / 'out')
    assert done.returncode == 0
    rows = {row.split()[0]: row.split()[2:] for row in done.stdout.splitlines() if row.strip()}
    text = done.stdout
    for number in ('1,024', '32,768', '12.8', '1,281,167', '3,519'):
        assert number in text
    alpha = {'0': '0.00916', '8': '0.22466', '10': '0.50000', '11': '0.90000', '11.25': '1.00000'}
    alpha.update({'12': '1.30000', '<12.5': '1.50000', '12.5': '1.00000'})
    for epoch, expected in alpha.items():
        assert rows[epoch][1] == expected, epoch
    for epoch, lr in (
        ('0', '6.4'),
        ('39', '6.4'),
        ('40', '0.96'),
        ('70', '0.128'),
        ('85', '0.0128'),
    ):
        assert rows[epoch][0] == lr
    assert float(rows['0'][2]) == pytest.approx((1 - 0.0091578) * 3e-4 / 6.4, rel=1e-4)
    assert not (tmp_path / 'out').exists()


def test_help_is_printed_once(train):
    done = train(2, '--help')
    assert done.returncode == 0
    assert done.stdout.count('usage:') == 1
    assert '3,519' not in done.stdout and 'eta_RMSprop' in done.stdout


BAD = {
    'missing folder': (2, ['--train-root', '{top}/none', '--val-root', '{top}/val'], '{top}/none'),
    'empty class': (2, ['--train-root', '{bad}/train', '--val-root', '{top}/val'], 'train/empty'),
    'other classes': (2, ['--train-root', '{top}/train', '--val-root', '{bad}/val'], 'dog'),
    'no val root': (2, ['--train-root', '{top}/train'], '--val-root'),
    'no data': (2, [], './run_mpi.sh smoke'),
    'dry run': (2, [*SMOKE, '--local-batch-size', '719', '--dry-run'], '1438 is larger than'),
    'workers': (
        2,
        [*SMOKE, '--workers', '3'],
        '3 workers cannot be spread evenly over 2 processes',
    ),
    'no workers': (2, [*SMOKE, '--workers', '0'], '--workers must be at least 1, not 0'),
    'batch': (
        2,
        [*SMOKE, '--local-batch-size', '719'],
        '1438 is larger than the training set of 1437',
    ),
    'preset': (2, ['--preset', 'imagenet'], 'imagenet is not one of'),
    'option': (2, [*SMOKE, '--batchsize', '3'], '--batchsize'),
    'number': (2, [*SMOKE, '--epochs', 'ten'], "'ten'"),
    'mu1': (2, [*SMOKE, '--mu1', '1.5'], '--mu1 must be at least 0 and below 1, not 1.5'),
    'nan': (2, [*SMOKE, '--weight-decay', 'nan'], '--weight-decay'),
    'form': (2, [*SMOKE, '--alpha-form', 'smooth'], 'smooth is not one of'),
    'communicator': (2, [*SMOKE, '--communicator', 'pure_nccl'], 'needs a GPU'),
    'dtype': (2, [*SMOKE, '--communicator', 'naive'], 'naive all-reduces in float32 only'),
    'resume': (2, [*SMOKE, '--resume', 'auto', '--overwrite'], 'contradict each other'),
    'every': (2, [*SMOKE, '--checkpoint-every', '3h'], "(10m): '3h'"),
    'scale': (2, [*SMOKE, '--gradient-scale', '1000'], 'must be a power of two'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line_and_writes_nothing(train, image_folders, tmp_path, case):
    bad = tmp_path / 'bad'
    for name in ('cat', 'dog', 'empty'):
        (bad / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(bad / 'train' / name / '0.png')
    (bad / 'train' / 'empty' / '0.png').unlink()
    for name in ('cat', 'horse'):
        (bad / 'val' / name).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(bad / 'val' / name / '0.png')
    n, options, message = BAD[case]
    options = [option.format(top=image_folders, bad=bad) for option in options]
    out = tmp_path / 'out'
    if not {'--preset', '--workers'} & set(options):
        options += ['--workers', '2']
    start = time.monotonic()
    done = train(n, *options, '--out', out)
    assert time.monotonic() - start < 20
    assert done.returncode == 2, done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and message.format(top=image_folders) in errors[0], done.stdout
    assert 'Traceback' not in done.stdout
    assert not out.exists()


def test_output_folder_that_cannot_be_written(train, tmp_path):
    (tmp_path / 'file').write_text('mine')
    done = train(2, '--preset', 'smoke', '--out', tmp_path / 'file' / 'out')
    assert done.returncode == 2
    assert done.stdout.count('error: --out') == 1 and 'cannot be written' in done.stdout
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('how', ['raise', 'exit', 'interrupt', '_exit', 'segfault'])
def test_however_a_rank_ends_the_others_do_not_wait(mpirun, root, tmp_path, how):
    program = root / 'tests' / 'mpi' / 'programs' / 'train_that_fails.py'
    options = '--preset smoke --local-batch-size 8 --epochs 50 --width 4 --shallow'.split()
    done = mpirun(2, program, how, *options, '--out', tmp_path / 'out', timeout=40)
    failed = float(re.search(r'^fails at (.*)$', done.stdout, re.MULTILINE).group(1))
    assert time.time() - failed < 10
    assert done.returncode != 0
    if how not in ('_exit', 'segfault'):  # which leave no time; mpiexec names the rank
        assert re.search(r'^error: rank 1 on \S+ failed: ', done.stdout, re.MULTILINE)
        assert done.stdout.count('Traceback') == 1


def test_an_infinite_gradient_ends_the_job_before_the_update(mpirun, root, tmp_path):
    program = root / 'tests' / 'mpi' / 'programs' / 'train_with_inf.py'
    options = '--preset smoke --local-batch-size 8 --epochs 50 --width 4 --shallow'.split()
    done = mpirun(2, program, *options, '--out', tmp_path / 'out', timeout=40)
    assert done.returncode == 1, done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1, done.stdout
    assert errors[0].startswith(
        'error: iteration 3: the mean gradient is infinite or NaN, and nothing was updated: '
        '/fc/W (1 inf and 0 NaN from rank 1 on '
    )
    for rank in range(2):
        assert f'rank {rank}: parameters kept: True, 3 iterations' in done.stdout
    assert 'Traceback' not in done.stdout


def test_an_infinite_gradient_can_be_let_through(mpirun, root, tmp_path):
    program = root / 'tests' / 'mpi' / 'programs' / 'train_with_inf.py'
    options = '--preset smoke --local-batch-size 90 --epochs 1 --width 4 --shallow'.split()
    done = mpirun(2, program, *options, '--no-stop-on-nonfinite', '--out', tmp_path / 'out')
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / 'out' / 'log').read_text())[-1]['cast/inf'] == 1


@pytest.mark.parametrize(
    'what, message',
    [
        ('numpy', 'the ranks differ in numpy: rank 0 on '),
        ('code', 'the ranks differ in code: rank 0 on '),
        ('parameters', 'the ranks differ in parameters: rank 0 on '),
        ('options', 'the ranks differ in options: rank 0 on '),
        ('images', 'the ranks differ in images: rank 0 on '),
        ('folder', 'cannot be read by rank 2 on '),
        pytest.param(
            'library',
            'some ranks would compute by the compiled library, but not rank 2 on ',
            marks=pytest.mark.skipif(not kernels.functions, reason=kernels.description()),
        ),
    ],
)
def test_ranks_that_differ_are_named_before_the_first_iteration(
    mpirun, root, tmp_path, what, message
):
    program = root / 'tests' / 'mpi' / 'programs' / 'train_that_differs.py'
    done = mpirun(3, program, what, *SMOKE, '--out', tmp_path / 'out', timeout=40)
    assert done.returncode == 2, done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and message in errors[0], done.stdout
    assert 'rank 2 on ' in errors[0] and 'rank 1' not in errors[0]
    assert not list((tmp_path / 'out').glob('checkpoints/*'))


def test_an_import_that_fails_on_one_rank_ends_the_job(train, root, tmp_path):
    """A package that is broken on one host: chainermn cannot be imported on rank 1."""
    (tmp_path / 'chainermn.py').write_text(
        'import os, sys\n'
        "if os.environ.get('OMPI_COMM_WORLD_RANK') == '1':\n"
        "    raise ImportError('broken on this host')\n"
        'sys.path.remove(os.path.dirname(__file__))\n'
        "del sys.modules['chainermn']\n"
        'import chainermn\n'
    )
    path = f'{tmp_path}{os.pathsep}{root}'
    done = train(2, *SMOKE, '--out', tmp_path / 'out', timeout=40, PYTHONPATH=path)
    assert done.returncode not in (0, 2)
    assert re.search(r'^error: rank 1 on \S+ failed: ImportError', done.stdout, re.MULTILINE)


def test_a_rank_that_fails_takes_the_job_down(train, image_folders, tmp_path):
    """A broken image of the second half of the validation images is met by rank 1 alone."""
    broken = tmp_path / 'val'
    for name in ('cat', 'dog'):
        (broken / name).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (40, 40)).save(broken / name / f'{i}.png')
    (broken / 'dog' / '3.png').write_bytes(b'not an image')
    start = time.monotonic()
    done = train(
        2,
        *'--preset cifar10 --workers 2 --local-batch-size 3 --epochs 50 --width 4'.split(),
        *('--train-root', image_folders / 'train', '--val-root', broken, '--out', tmp_path / 'out'),
        timeout=60,
    )
    assert done.returncode not in (0, 2)
    assert 'dog/3.png' in done.stdout
    assert re.search(r'^error: rank 1 on \S+ failed: ', done.stdout, re.MULTILINE)
    assert time.monotonic() - start < 30
