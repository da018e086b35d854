"""The command line, `python -m q4jax`.

`main` parses arguments and runs a command; `formats` reads and writes the checkpoints.
"""

from q4jax.cli.main import main

__all__ = ["main"]
