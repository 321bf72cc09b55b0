"""Find, patch, tune and edit the few attention layers where diffusion models keep the text they draw."""

import os
import warnings

# These libraries print notices while they are imported, before any call could silence them.
warnings.filterwarnings("ignore", message="IProgress not found")
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")

__version__ = "0.1.0"

#: What is there for everyone's pipelines, by the module that has it; loaded when it is asked for.
_PUBLIC = {"sweep": "sweeps", "localize": "localization"}


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
