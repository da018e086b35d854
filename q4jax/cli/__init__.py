"""The command line."""

from q4jax.cli.main import main as main
