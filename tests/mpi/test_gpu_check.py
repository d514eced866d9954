"""The acceptance of a machine with a GPU, on the CuPy of host memory and without a GPU."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from reproduce.studies.gpu_check import __main__ as gpu_check
from reproduce.studies.gpu_check import checks


@pytest.fixture
def check(cupy_on_host, root, tmp_path):
    """``check(*words)`` runs the command, and returns its process and its gpu_check.json."""

    def run(*words, **variables):
        done = subprocess.run(
            [sys.executable, '-m', 'reproduce.studies.gpu_check', '--out', tmp_path, *words],
            check=False,
            cwd=root,
            env={**gpu_check.os.environ, **cupy_on_host, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        path = tmp_path / 'gpu_check.json'
        return done, json.loads(path.read_text()) if path.exists() else None

    return run


@pytest.mark.slow
def test_what_is_right_passes(check, tmp_path):
    done, found = check('--steps', 'kernels;network;workers;nccl;resume')
    assert done.returncode == 0, done.stdout + (tmp_path / 'log.txt').read_text()
    assert [step['state'] for step in found['steps'].values()] == ['ok'] * 5
    table = (tmp_path / 'table.txt').read_text()
    assert table in done.stdout and '5 of 5 steps passed' in table
    figures = found['figures']
    assert figures['network']['network']['found']['gradient'] < 1e-3
    assert figures['workers']['workers']['found']['loss'] < 1e-6
    assert figures['resume']['same'] == figures['resume']['arrays'] > 300


@pytest.mark.slow
def test_what_is_wrong_fails(check, tmp_path):
    done, found = check('--steps', 'kernels', HOST_NCCL_VERSION='1304')
    assert done.returncode == 1
    step = found['steps']['kernels']
    assert step['state'] == 'FAIL' and 'pure_nccl needs 2.0 or later' in step['words']
    results = {name: result['ok'] for name, result in found['figures']['kernels'].items()}
    assert [name for name, ok in results.items() if not ok] == ['half_precision']
    assert len(results) == 5
    assert '0 of 1 steps passed' in done.stdout and 'not: kernels' in done.stdout


def test_without_a_gpu_it_says_so_and_what_would_have_run(check, tmp_path):
    done, _ = check('--out', tmp_path / 'made' / 'out', CUDA_VISIBLE_DEVICES='')
    assert done.returncode == 1 and not (tmp_path / 'made').exists()
    first, *steps = done.stdout.splitlines()
    assert first.startswith('error: this machine sees no GPU (CUDA_VISIBLE_DEVICES= hides all)')
    assert [line.split('  ')[1] for line in steps] == [step.name for step in gpu_check.STEPS]


def test_a_folder_that_cannot_be_made_is_named(check, tmp_path):
    (tmp_path / 'file').touch()
    done, _ = check('--out', tmp_path / 'file' / 'out')
    assert done.returncode == 2
    assert done.stdout == f'error: --out {tmp_path}/file/out: Not a directory\n'


def test_nan_is_below_no_limit():
    checks.require_below(1e-3, {'a': 9e-4})
    for error in (1e-3, np.nan, np.inf):
        with pytest.raises(checks.Failed, match='b: '):
            checks.require_below(1e-3, {'a': 0.0, 'b': error})


ABOUT = {'cudnn of torch': None, 'versions': {'cudnn': 'none'}}


@pytest.fixture
def session(tmp_path):
    return gpu_check.Session(tmp_path, tmp_path, 100, ABOUT)


def step_of(limit, session=None, **options):
    step = gpu_check.Step('a', limit, '', **{'run': None, **options})
    if session:
        session.begin(step)
    return step


def test_a_step_is_stopped_at_its_limit(session, tmp_path):
    words = ['sh', '-c', f'echo said; trap "" TERM; sleep 60 & echo $! >{tmp_path}/pid; wait']
    with pytest.raises(gpu_check.Failed, match='was stopped after [01] s'):
        session.command(step_of(0.5, session), words)
    assert 'said' in (tmp_path / 'log.txt').read_text()


def test_a_command_is_killed_as_soon_as_it_is_to_be(session, tmp_path):
    words = ['sh', '-c', f'sleep 0.3; touch {tmp_path}/now; sleep 60']
    session.command(step_of(30, session), words, until=(tmp_path / 'now').exists)
    with pytest.raises(gpu_check.Failed, match='instead of being killed'):
        session.command(step_of(30, session), ['true'], until=lambda: False)
    with pytest.raises(gpu_check.Failed, match='was stopped after'):
        session.command(step_of(0.5, session), ['sleep', '60'], until=lambda: False)


def test_the_limit_is_that_of_all_commands_of_a_step(session):
    step = step_of(2, session)
    session.command(step, ['sleep', '1.5'])
    with pytest.raises(gpu_check.Failed, match='was stopped after [01] s'):
        session.command(step, ['sleep', '1.5'])


def test_an_error_in_a_step_does_not_end_the_check(session, tmp_path):
    def run(step, session):
        raise KeyError('no such number')

    state, _, words = gpu_check._attempt(step_of(30, run=run), session)
    assert (state, words) == ('FAIL', "KeyError: 'no such number'")
    session.save({'a': {'state': state}})
    assert json.loads((tmp_path / 'gpu_check.json').read_text())['steps']['a']['state'] == 'FAIL'


def test_tests_that_all_skip_do_not_pass(session, monkeypatch):
    for summary, passes in (('3 passed, 1 skipped in 2 s', True), ('4 skipped in 1 s', False)):
        monkeypatch.setattr(session, 'command', lambda *args, said=summary: f'...\n{said}\n')
        if passes:
            assert gpu_check.tests(step_of(30), session) == summary
        else:
            with pytest.raises(gpu_check.Failed, match='no test ran: 4 skipped'):
                gpu_check.tests(step_of(30), session)


def test_the_line_that_tells_why_is_in_the_table(session):
    script = 'echo FAIL; echo "error: no image"; echo "prterun: a page"; exit 3'
    with pytest.raises(gpu_check.Failed, match='^error: no image$'):
        session.command(step_of(30, session), ['sh', '-c', script])
    with pytest.raises(gpu_check.Failed, match='exit status 3'):
        session.command(step_of(30, session), ['sh', '-c', 'exit 3'])


def test_steps_that_cannot_run(tmp_path):
    session = gpu_check.Session(tmp_path, tmp_path, 5, ABOUT)
    assert gpu_check._attempt(step_of(30), session)[::2] == ('late', 'no time left')
    needy = dataclasses.replace(step_of(30), needs='no_such_package')
    state, _, words = gpu_check._attempt(needy, session)
    assert (state, words) == ('skip', 'there is no package no_such_package')
    for needs in ('torch', 'cudnn'):
        assert gpu_check._attempt(step_of(30, needs=needs), session)[0] == 'skip'


def test_wrong_options(capsys):
    for words, message in (
        (['--steps', 'kernel'], "--steps has no 'kernel'; the steps are kernels; network"),
        (['--seconds', '0'], '--seconds must be above 0, not 0'),
    ):
        with pytest.raises(SystemExit):
            gpu_check.parse(words)
        assert message in capsys.readouterr().err
