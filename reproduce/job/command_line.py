"""A command line whose errors are one line, with the remedy. It imports neither MPI nor Chainer."""

from __future__ import annotations

import argparse
import difflib
import re


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, and what was probably meant."""

    def __init__(self, **options):
        options.setdefault('formatter_class', argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f'error: {self.remedy(message)}\n')

    def remedy(self, message: str) -> str:
        """The message, with the nearest option or choice, or where the options are listed."""
        known = list(self._option_string_actions)
        if message.startswith('unrecognized arguments: '):
            word = message.partition(': ')[2].split()[0].partition('=')[0]
            message = f'there is no option {word}' if word[0] == '-' else f'{word!r} is no option'
        elif found := re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message):
            word, known = found[1], found[2].replace("'", '').split(', ')
            message = message.partition('invalid choice')[0] + f'{word!r} is none of {found[2]}'
            message = message.replace("'", '')
        else:
            word = ''
        near = difflib.get_close_matches(word, known, 1) if word else []
        return message + (f'; did you mean {near[0]}?' if near else '; --help lists the options')
