"""What the examples in docstrings find: ``pipe``, a small random Stable Diffusion XL of diffusers."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def example_pipeline(request, doctest_namespace):
    """Built for the examples alone."""
    if isinstance(request.node, pytest.DoctestItem):
        sys.path.append(str(Path(__file__).parent / "tests"))
        import tiny

        doctest_namespace["pipe"] = tiny.sdxl()
