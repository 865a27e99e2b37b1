"""Errors that a user can mend, and how they are worded."""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user can mend: the command line prints it on one line and exits with 2."""


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' with the closest of `words`, or '' where none is close."""
    close = difflib.get_close_matches(word, list(words), n=2, cutoff=0.5)
    if not close:
        return ""
    return " Did you mean " + " or ".join(f'"{w}"' for w in close) + "?"


def unknown(kind: str, word: str, words: Iterable[str]) -> UserError:
    """Return the error for a `word` that is none of `words`, with the nearest ones."""
    known = list(words)
    return UserError(f'unknown {kind} "{word}": one of {", ".join(known)}.{nearest(word, known)}')


def tell(error: UserError) -> None:
    """Print an error as the command line does, on one line."""
    print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)


def exit_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command line: a UserError is one line on stderr and exit code 2, Ctrl-C a line and
    130.
    """

    @functools.wraps(main)
    def command() -> None:
        try:
            try:
                main()
            finally:
                sys.stdout.flush()  # after `--help`, too: later nobody would catch that it fails
        except UserError as error:
            tell(error)
            sys.exit(2)
        except KeyboardInterrupt as interrupt:
            how = f"; go on with: {interrupt.args[0]}" if interrupt.args else ""
            print(f"interrupted{how}", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output, such as `head`, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)

    return command
