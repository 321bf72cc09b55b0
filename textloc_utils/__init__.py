"""Find, patch, tune and edit the few attention layers where diffusion models keep the text they draw."""

import importlib
import os
import warnings

# These libraries print notices while they are imported, before any call could silence them.
warnings.filterwarnings("ignore", message="IProgress not found")
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")

__version__ = "0.1.0"

#: The public names and the modules that define them. A module is imported when a name is first used, because importing
#: torch and diffusers takes seconds.
_EXPORTS = {
    "Fired": "patching",
    "Model": "models",
    "Pair": "prompts",
    "Patch": "patching",
    "TextlocError": "settings",
    "guard": "safety",
    "load": "models",
    "localize": "localization",
    "patched": "patching",
    "sweep": "sweeps",
    "wrap": "models",
}


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
