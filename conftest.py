"""What the examples in docstrings find: ``pipe``, a small random Stable Diffusion XL of diffusers."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def example_pipeline(request, doctest_namespace, monkeypatch, tmp_path):
    """A small pipeline and an empty store, for the examples in docstrings alone."""
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.setenv("TEXTLOC_RESULTS", str(tmp_path))
        sys.path.append(str(Path(__file__).parent / "tests"))
        import tiny

        doctest_namespace["pipe"] = tiny.sdxl()
