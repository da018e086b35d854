"""The layers of a model of the Llama family that use the sliding window."""

from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder import config_values as values
from q4jax.models.decoder.architectures import Architecture
from q4jax.models.decoder.entries import FULL, MAX_LAYERS, SLIDING


def read_windows(
    architecture: Architecture, config: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields `sliding_window` and `layer_types` of a `LlamaConfig`."""
    layers = values.size("num_hidden_layers", found["num_hidden_layers"])
    if layers > MAX_LAYERS:  # checked before a list of this length is built
        raise ValueError(f"num_hidden_layers must be at most {MAX_LAYERS}, got {layers}")
    rule = architecture.windows
    window = config.get("sliding_window", architecture.defaults.get("sliding_window"))
    if not rule.allowed:
        values.require("sliding_window", window, (None,))
    if rule.switched and not values.flag(
        "use_sliding_window", found.get("use_sliding_window", False)
    ):
        window = None
    if window is not None:
        window = values.size("sliding_window", window)
    types = [FULL if window is None else SLIDING] * layers
    if rule.selects is None:
        values.require("layer_types", found.get("layer_types", types), (types,))
    else:
        if window is not None:
            first = found["max_window_layers"]
            if type(first) is not int:
                raise ValueError(f"max_window_layers must be an integer, got {first!r}")
            types = [SLIDING if rule.selects(layer, first) else FULL for layer in range(layers)]
        types = found.get("layer_types", types)
        if not isinstance(types, list) or not all(isinstance(name, str) for name in types):
            raise ValueError(f"layer_types must be a list of texts, got {types!r}")
    if all(name == FULL for name in types):
        return {"sliding_window": None}
    if all(name == SLIDING for name in types):
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": tuple(types)}
