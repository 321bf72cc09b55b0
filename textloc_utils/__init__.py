"""Find, patch, tune and edit the few attention layers where diffusion models keep the text they draw."""

__version__ = "0.1.0"
