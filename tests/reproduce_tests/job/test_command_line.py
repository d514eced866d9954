"""How the studies' programs end."""

import os
import signal
import subprocess
import sys

import pytest

from reproduce.job import command_line


@pytest.mark.parametrize('status', [None, 0, 1])
def test_a_program_ends_with_its_status(status):
    with pytest.raises(SystemExit) as ended:
        command_line.run_program(lambda *words: words and status, 'a', 'b')
    assert ended.value.code == status


@pytest.mark.mpi
def test_ctrl_c_in_a_study_is_one_line(root, job_environment):
    """As a terminal sends it: to the study, and to the job that it has started."""
    study = subprocess.Popen(
        [sys.executable, '-m', 'reproduce.studies.speed', 'iteration', '--repeat', '1000'],
        cwd=root,
        env={**job_environment, 'PYTHONUNBUFFERED': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert study.stdout.readline() == '1 worker\n'
    assert 'round 0 of' in study.stdout.readline()
    os.killpg(study.pid, signal.SIGINT)
    output, _ = study.communicate(timeout=60)
    assert study.returncode == 130
    assert output.splitlines()[-1] == 'stopped' and 'Traceback' not in output, output
