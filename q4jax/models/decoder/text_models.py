"""The text models in the directories of vision-language models."""

from collections.abc import Iterable, Mapping
from typing import Any

# Text models that differ from another family by their inputs only, which are text here.
_SAME = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# Starts of the names of a text model's tensors -> those of the model alone.
_PREFIXES = {
    "model.language_model.lm_head.": "lm_head.",
    "model.language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "language_model.": "model.",
}
# Parts of the names of what is not the text model.
_OTHERS = ("vision", "visual", "multi_modal_projector", "mm_projector", "audio", "image_newline")


def text_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of the text model of a `config.json`; of a text model, its own."""
    found = dict(config)
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        # The whole model decides what its head is.
        outside = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
        given = {name: config[name] for name in outside if config.get(name) is not None}
        found = {"model_type": "llama", **inner, **given}
    kind = found.get("model_type")
    if isinstance(kind, str):
        found["model_type"] = _SAME.get(kind, kind)
    return found


def text_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return the tensors of the text model, by their names in the model alone, and the others."""
    text, others = {}, []
    for name in names:
        if any(part in name.partition("layers.")[0] for part in _OTHERS):
            others.append(name)
            continue
        start = next((start for start in _PREFIXES if name.startswith(start)), "")
        text[_PREFIXES.get(start, "") + name[len(start) :]] = name
    return text, others
