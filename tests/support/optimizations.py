"""XLA's optimizations, which take half of the time of tests that run a program once."""

import contextlib

import jax


@contextlib.contextmanager
def optimizations(few):
    """Compile with few of them, for tests of results, or with all, for those that read programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", few)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
