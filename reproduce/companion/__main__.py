"""Renews the companion: the excerpts, tests and tables in the Markdown, and the page made of it.

./run_mpi.sh companion            renews the Markdown, and writes results/companion.html
./run_mpi.sh companion --check    only checks that the Markdown is up to date
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

from reproduce.job.command_line import Parser, reason

ROOT = Path(__file__).resolve().parents[2]
PAGES = ('extensions/README.md', 'reproduce/README.md', 'reproduce/results/twin/README.md')
OUT = ROOT / 'results' / 'companion.html'
PACKAGES = ('cogapp', 'latex2mathml', 'markdown_it', 'mdit_py_plugins', 'pygments')


def first_change(path: Path, new: str) -> int:
    """The number of the first line of a file that is another in the new text."""
    lines = itertools.zip_longest(path.read_text('utf-8').splitlines(), new.splitlines())
    return next(number for number, (old, line) in enumerate(lines, 1) if old != line)


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
    from reproduce.companion import page
    from reproduce.companion.markdown import TextError, renewed

    try:
        texts = {name: renewed(ROOT / name, ROOT) for name in PAGES}
        stale = [name for name in PAGES if texts[name] != (ROOT / name).read_text('utf-8')]
        places = [f'{name}:{first_change(ROOT / name, texts[name])}' for name in stale]
        if args.check and stale:
            sys.exit(f'error: not up to date: {" and ".join(places)}. Run ./run_mpi.sh companion')
        if args.check:
            return
        for name in stale:
            (ROOT / name).write_text(texts[name], 'utf-8')
            print(f'{name} renewed')
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(page.make(ROOT, PAGES, OUT), 'utf-8')
    except (TextError, OSError) as error:
        parser.refuse(reason(error))
    print(f'{OUT.relative_to(ROOT)} written')


if __name__ == '__main__':
    main(sys.argv[1:])
