"""Marks of the tests of the C++ kernels."""

import pytest

from q4jax.native import status

in_use = pytest.mark.skipif(status().isa is None, reason=status().reason)
