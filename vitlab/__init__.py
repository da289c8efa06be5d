"""vitlab: a reproducible study of the ways to make a Vision Transformer cheaper."""

__version__ = "0.1.0"
