"""Renews the companion: the excerpts, tests and tables in the Markdown, and the page made of it.

./run_mpi.sh companion            renews the Markdown, and writes results/companion.html
./run_mpi.sh companion --check    only checks that the Markdown is up to date
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from reproduce.job.command_line import Parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = ('extensions/README.md', 'reproduce/README.md')
PACKAGES = ('cogapp', 'latex2mathml', 'markdown_it', 'mdit_py_plugins', 'pygments')


def main(argv):
    parser = Parser(prog='./run_mpi.sh companion', description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing')
    args = parser.parse_args(argv)
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        parser.refuse(
            f'{sys.executable} has no package {lacking[0]}: install the extra, as by pip install '
            f'-c constraints.txt -e ".[companion]" in {ROOT}'
        )
    from reproduce.companion.markdown import TextError, renewed

    stale = []
    try:
        for page in PAGES:
            text = renewed(ROOT / page, ROOT)
            if text != (ROOT / page).read_text('utf-8'):
                stale.append(page)
                if not args.check:
                    (ROOT / page).write_text(text, 'utf-8')
    except TextError as error:
        parser.refuse(error)
    if args.check and stale:
        sys.exit(f'error: {" and ".join(stale)} not up to date: run ./run_mpi.sh companion')
    for page in stale:
        print(f'{page} renewed')


if __name__ == '__main__':
    main(sys.argv[1:])
