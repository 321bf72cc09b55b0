"""``textloc``: the command line of the package.

A mistake gives one line on stderr and exit status 2, before any model runs. A failed edit gives one line and exit
status 3. There is one file per group of commands. Some are for a user's own work (``draw``, ``search``, ``editing``,
``adapters``, ``notebooks``), and others make the book (``study``, ``making``). Slow imports are done by the command
that needs them, so ``--help`` is fast.
"""

import os
import sys

from textloc_utils.cli import adapters, draw, editing, making, notebooks, search, study
from textloc_utils.cli.options import Parser, check_arguments
from textloc_utils.settings import TextlocError

#: In the order of the help: first a user's commands, then those that make the book.
GROUPS = (draw, search, editing, adapters, notebooks, study, making)
#: A longer message contains a whole prompt or file. Its beginning or its end says what is wrong.
LONGEST = 600


def parser() -> Parser:
    """The parser of the command line."""
    top = Parser(prog="textloc", description="Find where diffusion models keep the text they draw.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        check_arguments(argv)
        args = parser().parse_args(argv)
        return args.run(args) or 0
    except TextlocError as error:
        return _say(str(error))
    except BrokenPipeError:
        # Python writes the rest of the output when it ends, and would report the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # for example, the disk is full, or a folder was removed
        place = f" ({error.filename})" if error.filename else ""
        return _say(f"the system could not read or write{place}: {error.strerror or error}")
    except KeyboardInterrupt:
        _say("stopped")
        return 130


def _say(message: str) -> int:
    """Print a message as one line and return the exit status of a mistake."""
    line = " ".join(message.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(f"textloc: {line}", file=sys.stderr)
    return 2
