"""Write the entries that a `config.json` may leave out, as transformers fills them.

pip install "transformers>=5"
python -m tests.models.vectors.make_defaults
"""

import dataclasses
import json
from pathlib import Path

from q4jax.models.decoder import families
from q4jax.models.decoder.describe import IRRELEVANT
from tests.support.random_weights import entries_read

FILE = Path(families.__file__).with_name("defaults.json")
# They follow from other entries, whose defaults would contradict the given ones.
DERIVED = {"layer_types", "no_rope_layers", "moe_layers", "per_layer_config", "rope_parameters"}


def defaults_of(kind):
    """Return the defaults of the entries that decide what a model computes."""
    import transformers

    made = transformers.AutoConfig.for_model(kind)
    config = made.to_dict()
    # What the class leaves open follows from other entries.
    derived = {field.name for field in dataclasses.fields(made) if field.default is None}
    read = entries_read(kind) - IRRELEVANT - derived
    found = {name: config[name] for name in sorted(config.keys() & read - DERIVED)}
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
        scaled = {k: v for k, v in rope.items() if v is not None}
        if rope.get("rope_type", "default") != "default" or "partial_rotary_factor" in rope:
            found["rope_parameters"] = scaled
    elif rope:
        found["rope_parameters"] = rope
    return {name: value for name, value in found.items() if value is not None}


if __name__ == "__main__":
    table = {kind: defaults_of(kind) for kind in sorted(families.FAMILIES)}
    FILE.write_text(json.dumps(table, indent=1) + "\n")
