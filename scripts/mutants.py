"""Plant small faults in one module, one at a time, and list those that its tests do not notice.

Run ``make mutants MODULE=metrics``. The table ``[tool.mutants]`` of pyproject.toml names the tests of each module.
mutmut changes and runs a copy of the package and of these tests in ``_build/mutants/MODULE``. Its work is kept there.
So a run that was stopped continues, and after a change of the module or of its tests only the necessary work is done.

The text of error messages is not changed, because tests need not check the wording of a message.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

from textloc_utils.metrics import rate

ROOT = Path(__file__).resolve().parent.parent
ALIVE = ("survived", "suspicious", "no tests")
COUNTED = ("killed", "timeout", "segfault", *ALIVE)
CONFIGURATION = """
[tool.mutmut]
source_paths = ["textloc_utils"]
only_mutate = ["textloc_utils/{module}.py"]
do_not_mutate_patterns = ["raise [A-Za-z_]*Error"]
pytest_add_cli_args = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
pytest_add_cli_args_test_selection = {tests}
timeout_constant = 30.0
timeout_multiplier = 2.0
use_git_change_detection = false
"""
#: Each mutant's process is a copy of mutmut's process, which has already run the tests once. The state of the package
#: and of the tests (caches, values of modules) must come from the mutant, so both are imported again.
FORGET = """
import sys

for _name in [n for n in sys.modules if n.partition(".")[0] in ("textloc_utils", "tiny") or n.startswith("test_")]:
    del sys.modules[_name]
"""


def copied(module: str, tests: list[str]) -> Path:
    """Make a copy of the package and its tests, set up for one module. Returns its folder."""
    work = ROOT / "_build" / "mutants" / module.replace("/", "-")
    for name in ("textloc_utils", "tests"):
        # Files that were deleted are also deleted in the copy. The files of mutmut are in other folders.
        shutil.rmtree(work / name, ignore_errors=True)
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "pyproject.toml").read_text().partition("[tool.mutants]")[0]
    (work / "pyproject.toml").write_text(text + CONFIGURATION.format(module=module, tests=tests))
    conftest = work / "tests" / "conftest.py"
    conftest.write_text(conftest.read_text() + FORGET)
    return work


def main() -> int | str:
    """Run mutmut on one module, and print the score and the mutants that survived."""
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", choices=sorted(modules))
    parser.add_argument("--jobs", type=int, default=1, help="number of processes (1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--again", action="store_true", help="run only the mutants that survived the last time")
    what.add_argument(
        "--sample", type=int, help="run only this many mutants, drawn at random (the same ones every time)"
    )
    arguments = parser.parse_args()
    module = arguments.module
    work = copied(module, modules[module])
    environment = os.environ | {"TEXTLOC_DATA": str(ROOT / "data"), "TEXTLOC_FLIPS": "20"}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # it would lead to the unchanged package
    mutmut = [sys.executable, "-m", "mutmut"]

    def results() -> dict[str, str]:
        told = subprocess.run(
            [*mutmut, "results", "--all", "true"], cwd=work, env=environment, capture_output=True, text=True
        )
        return dict(line.strip().rsplit(": ", 1) for line in told.stdout.splitlines() if ": " in line)

    names = [name for name, state in results().items() if state in ALIVE] if arguments.again else []
    if arguments.sample:
        # mutmut makes the mutants and times the tests before it finds that no mutant has this name.
        made = subprocess.run([*mutmut, "run", "none"], cwd=work, env=environment, capture_output=True, text=True)
        every = sorted(results())
        if not every:
            return made.stdout[-3000:] + made.stderr[-3000:]
        names = random.Random(0).sample(every, min(arguments.sample, len(every)))
    ran = subprocess.run([*mutmut, "run", "--max-children", str(arguments.jobs), *names], cwd=work, env=environment)
    states = results()
    if arguments.sample:
        print(f"a sample of {len(names)} of {len(states)}")
        states = {name: states[name] for name in names}
    alive = [name for name, state in states.items() if state in ALIVE]
    for name in alive:
        shown = subprocess.run([*mutmut, "show", name], cwd=work, env=environment, capture_output=True, text=True)
        changed = [line for line in shown.stdout.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        print(f"\n{states[name]}: {name}", *changed, sep="\n")
    count = Counter(states.values())
    total = sum(count[state] for state in COUNTED)
    dead = total - len(alive)
    share = rate([True] * dead + [False] * len(alive))
    print(f"\n{module}: {dead} of {total} mutants killed, {share}", dict(count))
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
