"""Run a Python module as a program that ends with the process that started it, and takes its own children along.

``python -m textloc_utils.ends_with_parent papermill ...``, with a pipe as its standard input: however the process at
the other end ended, the system closes the pipe. A notebook's kernel is in a session of its own, so that no signal to a
group of processes reaches it.
"""

import contextlib
import os
import runpy
import sys
import threading

import psutil


def watch() -> None:
    """Wait for the end of standard input; then end all children, and this process."""
    os.read(0, 1)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
