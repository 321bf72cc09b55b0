"""Find, patch, tune and edit the few attention layers where diffusion models keep the text they draw."""

import os
import warnings

# These libraries print notices while they are imported, before any call could silence them.
warnings.filterwarnings("ignore", message="IProgress not found")
for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")

__version__ = "0.1.0"
