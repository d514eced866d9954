"""run_mpi.sh in a folder with a fake Python and a fake mpiexec, which note what they are asked."""

import os
import shutil
import subprocess
import sys

FAKE_PYTHON = """#!/bin/bash
# Answers as a Python whose venv and pip only write down what they were asked.
if [[ $1 == -ISc ]]; then
    version="import sys; sys.version_info = (${{FAKE_VERSION:-3, 11}})"
    "{python}" "$1" "$version"$'\n'"$2" "${{@:3}}" | sed "s|^\\([0-9a-f]*\\) .*|\\1 {fake}|"
    exit
fi
if [[ $1 == -Ic && $2 == "import ensurepip, venv" ]]; then exit ${{FAKE_NO_VENV:-0}}; fi
if [[ $1 == -Ic && $2 == "import venv" ]]; then exit; fi
if [[ $1 == -Ic && $2 == *"mpi4py.rc.initialize = False"*reproduce.job*options.main* ]]; then
    [[ -z $FAKE_LOG ]] || echo "${{*:3}}" >"$FAKE_LOG.options"
    printf '%s\\n' $FAKE_FOUND
    exit ${{FAKE_OPTIONS_STATUS:-0}}
fi
if [[ $2 == */reproduce/job/launch.py ]]; then
    [[ -z $FAKE_LOG ]] || printf '%s\\n' "${{@:3:2}}" >"$FAKE_LOG.launch"
    exec "${{@:5}}"
fi
echo "$*" >>"$FAKE_LOG"
env >"$FAKE_LOG.env"
case "$1 $2" in
    "-m venv")
        mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python"
        touch "${{@: -1}}/pyvenv.cfg" ;;
    "-m pip" | *".whl/pip "*)
        words="pip's words"
        echo "${{FAKE_PIP_SAYS:-$words}}"
        sleep "${{FAKE_PIP_SECONDS:-0}}"; exit ${{FAKE_PIP_STATUS:-0}} ;;
esac
"""
FAKE_MPIEXEC = """#!/bin/bash
if [[ $1 == --version ]]; then echo "{version}"; exit; fi
printf '%s\\n' "$@"
[[ -z $FAKE_LOG ]] || env >"$FAKE_LOG.env"
env | grep -E '^(OMP|OPENBLAS|MKL)_NUM_THREADS=' | sort
sleep "${{FAKE_SECONDS:-0}}"
exit ${{FAKE_STATUS:-0}}
"""


class Tree:
    """What run_mpi.sh needs, in a folder with spaces, with a fake Python and a fake mpiexec."""

    def __init__(self, top, root, version='mpiexec (Open MPI) 5.0.11'):
        self.path = top / 'a folder'
        (self.path / 'reproduce').mkdir(parents=True)
        for name in ('run_mpi.sh', 'constraints.txt', 'setup.py', 'reproduce/settings.py'):
            shutil.copy(root / name, self.path / name)
        (top / 'bin').mkdir()
        self.python = self.executable(
            top / 'python', FAKE_PYTHON.format(python=sys.executable, fake=top / 'python')
        )
        self.mpiexec = self.executable(
            top / 'bin' / 'mpiexec', FAKE_MPIEXEC.format(version=version)
        )
        self.executable(top / 'bin' / 'mpicc', '#!/bin/bash\n')
        self.log = top / 'log'

    @staticmethod
    def executable(path, text):
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, *arguments, stderr=subprocess.PIPE, **variables):
        environment = {
            'PATH': '/usr/local/bin:/usr/bin:/bin',
            'HOME': os.environ.get('HOME', '/'),
            'PYTHON': str(self.python),
            'MPIEXEC': str(self.mpiexec),
            'FAKE_LOG': str(self.log),
            **variables,
        }
        environment = {name: value for name, value in environment.items() if value is not None}
        command = ['/bin/bash', str(self.path / 'run_mpi.sh'), *map(str, arguments)]
        return subprocess.Popen(
            command,
            env=environment,
            cwd='/',
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def run(self, *arguments, **variables):
        process = self.start(*arguments, **variables)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def environment(self):
        """What the fake Python or mpiexec was started with last."""
        lines = (self.path.parent / 'log.env').read_text().splitlines()
        return dict(line.split('=', 1) for line in lines if '=' in line)

    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


def only_error(done):
    errors = [
        line for line in done.stderr.splitlines() if line[:10] not in ('Setting up', ' ' * 10)
    ]
    assert done.returncode == 1 and len(errors) == 1 and errors[0].startswith('error: '), done
    return errors[0]


def job(tree, *arguments, **variables):
    done = tree.run(*arguments, **variables)
    return done, done.stdout.splitlines()
