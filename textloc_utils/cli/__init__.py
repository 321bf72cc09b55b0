"""``textloc``: a thin face on the package.

Mistakes end in one line on stderr and exit status 2, before any model runs; an edit that is none ends in one line and
exit status 3. There is a file per group of commands: those for one's own work (``draw``, ``search``, ``editing``,
``adapters``, ``notebooks``) and those that make the book (``study``, ``making``). What takes long to import is imported
by the command that needs it, so that ``--help`` comes at once.
"""

import os
import sys

from textloc_utils.cli import adapters, draw, editing, making, notebooks, search, study
from textloc_utils.cli.options import Parser, check_arguments
from textloc_utils.settings import TextlocError

#: In the order of the help: a user's commands, then those that make the book.
GROUPS = (draw, search, editing, adapters, notebooks, study, making)
#: A message longer than this holds a whole prompt or file; what is wrong stands at its beginning or its end.
LONGEST = 600


def parser() -> Parser:
    """The command line's grammar."""
    top = Parser(prog="textloc", description="Where diffusion models keep the text they draw.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        check_arguments(argv)
        args = parser().parse_args(argv)
        return args.run(args) or 0
    except TextlocError as error:
        return _say(str(error))
    except BrokenPipeError:
        # Python writes what is left when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that fills up, a folder that is taken away
        place = f" ({error.filename})" if error.filename else ""
        return _say(f"the system refused to read or write{place}: {error.strerror or error}")
    except KeyboardInterrupt:
        _say("stopped")
        return 130


def _say(message: str) -> int:
    """Print a message as one line; returns the exit status of a mistake."""
    line = " ".join(message.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(f"textloc: {line}", file=sys.stderr)
    return 2
