"""Run a Python module as a program that ends, with all its children, when the process that started it ends.

Start it as ``python -m textloc_utils.ends_with_parent papermill ...``, with a pipe as its standard input. When the
process at the other end of the pipe ends, for any reason, the system closes the pipe. This is needed because a
notebook's kernel runs in a separate session, so signals to a group of processes do not reach it.
"""

import contextlib
import os
import runpy
import sys
import threading

import psutil


def watch() -> None:
    """Wait for the end of standard input. Then end all children and this process."""
    os.read(0, 1)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
