"""Leaves out modules that cannot be imported here when pytest looks for examples in docstrings."""

import importlib.util

collect_ignore = []
if not importlib.util.find_spec("jax_triton"):
    collect_ignore += [
        f"q4jax/triton/{name}.py"
        for name in ("launch", "matmul", "matmul_transpose", "weight_tile")
    ]
