"""A parser whose errors are one line with a remedy. It imports neither MPI nor Chainer."""

from __future__ import annotations

import argparse
import difflib
import re
import signal
import sys


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, with the option or choice that was probably meant.

    Options cannot be abbreviated. A description keeps its line breaks.
    """

    def __init__(self, **options):
        options.setdefault('formatter_class', argparse.RawDescriptionHelpFormatter)
        super().__init__(**options, allow_abbrev=False)

    def error(self, message):
        """Ends with status 2 and argparse's message, to which :meth:`remedy` adds the remedy."""
        self.refuse(self.remedy(message))

    def refuse(self, message):
        """Ends with status 2 and a message that names its own remedy."""
        self.exit(2, f'error: {" ".join(str(message).splitlines())}\n')

    def remedy(self, message: str) -> str:
        """Returns the message with the nearest option or choice, or with a hint at ``--help``."""
        word, known = '', self._options()
        if message.startswith('unrecognized arguments: '):
            words = message.partition(': ')[2].split() or ['']  # an argument may be empty
            word = words[0].partition('=')[0]
            is_option = word.startswith('-')
            message = f'there is no option {word}' if is_option else f'{word!r} is not an option'
        elif found := re.fullmatch(r"(.*)invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            word, choices = found[2], found[3].replace("'", '')
            known = choices.split(', ')
            message = f'{found[1]}{word or "an empty word"} is not one of {choices}'
        near = difflib.get_close_matches(word, known, 1)
        return message + (f'; did you mean {near[0]}?' if near else '; --help lists the options')

    def _options(self) -> list:
        """The options of this parser and of its commands."""
        options = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    options += command._option_string_actions
        return options


def run_program(main, *words):
    """Runs ``main(*words)``, and ends with the status that it returns.

    Ctrl-C ends it with one line, and status 130.
    """
    try:
        status = main(*words)
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        status = 128 + signal.SIGINT
    sys.exit(status)


def reason(error: Exception) -> str:
    """Returns why something failed, in one line. An OSError becomes ``FILE: REASON``."""
    if isinstance(error, OSError) and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    return str(error)
