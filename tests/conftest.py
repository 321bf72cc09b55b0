"""The environment of all tests: one thread per process, no bars, no hub, an empty result store.

The variables are set before torch is imported; what the caller set stays.
"""

import os
import tempfile

import pytest

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "OMP_THREAD_LIMIT": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

# For what runs outside a test function (imports, fixtures of a module); removed when the process ends.
_STORE = tempfile.TemporaryDirectory(prefix="textloc-results-")
os.environ["TEXTLOC_RESULTS"] = _STORE.name


@pytest.fixture(autouse=True)
def empty_result_store(tmp_path, monkeypatch):
    """Each test starts from an empty store: a cached answer is no check."""
    monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path / "results"))
