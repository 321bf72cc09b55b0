"""Plant one fault after another in the patching engine and run tests on it: they have to fail.

Run as a script with the tests' node ids: prints a line of JSON for each fault, its name and pytest's exit status. The
engine's source is changed in memory, in the one process that runs all: the files stay as they are.
"""

import contextlib
import inspect
import io
import json
import sys

import pytest

from textloc_utils import patching

#: Fault to a piece of the engine's source and what stands there instead.
FAULTS = {
    "none": ("", ""),
    "off by one layer": ("(model.layers[i], letter)", "(model.layers[(i + 1) % len(model.layers)], letter)"),
    "rows swapped": ("append((p.source, p.target))", "append((p.target, p.source))"),
    "one half of guidance": ("for half in halves for row in key[0]", "for half in halves[-1:] for row in key[0]"),
    "one step late": ("self.start <= step", "self.start < step"),
    "values forgotten": ("for letter in p.tensors]", "for letter in p.tensors[:1]]"),
}


def main(tests: list[str]) -> None:
    source = inspect.getsource(patching)
    for name, (old, new) in FAULTS.items():
        assert not old or source.count(old) >= 1, f"{old!r} is not in the engine any more: plant {name} elsewhere"
        # In the module's own namespace: whoever holds a function of it meets the planted ones when it calls on.
        exec(compile(source.replace(old, new) if old else source, patching.__file__, "exec"), patching.__dict__)
        with contextlib.redirect_stdout(io.StringIO()) as told:
            status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
        print(json.dumps([name, int(status), told.getvalue().strip().splitlines()[-1]]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
