"""How `nn.tabulate` shows 4-bit weights, which importing this module registers."""

import yaml  # type: ignore[import-untyped]

from q4jax.ops.params import Params4bit

# By the time `tabulate` writes YAML, the arrays are strings such as "uint8[64,128]".
yaml.SafeDumper.add_representer(
    Params4bit, lambda dumper, w: dumper.represent_str(f"{w.packed} {w.quant_state.spec.tag()}")
)
