"""Models of tunix (google-tunix) in 4 bits: its trainers train their adapters, PEFT reads them.

tunix is not imported. Its layer classes are known by their names and modules.

Examples:
  >>> from q4jax.integrations import tunix
  >>> tunix.peft_names("layers.0.attn.kv_einsum")
  ('layers.0.self_attn.k_proj', 'layers.0.self_attn.v_proj')
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.convert.registry import register_layer
from q4jax.convert.rules import Config, QuantRule
from q4jax.interop.peft.save import save_adapters as save_peft
from q4jax.lora.inject import add_lora
from q4jax.nnx.convert import quantize_model as quantize_nnx
from q4jax.nnx.traverse import check_module, iter_modules

M = TypeVar("M", bound=nnx.Module)

# bonsai wrote its first models after tunix's, with layers of the same names.
_PACKAGES = ("tunix.models.", "bonsai.models.")
_EXPERTS = ("gate_proj", "up_proj", "down_proj")
# Outputs, embeddings, the towers of images, and the routers of experts keep their precision, as
# transformers and bitsandbytes keep them.
_KEPT = (r"lm_head", r"embedder(\..*)?", r"vision_encoder\..*", r".*\.router", r"score")
# The modules of transformers that one of tunix's layers is, in the order of its outputs.
_MODULES = {
    "q_einsum": ("q_proj",),
    "k_einsum": ("k_proj",),
    "kv_einsum": ("k_proj", "v_proj"),
    "qkv_einsum": ("q_proj", "k_proj", "v_proj"),
    "attn_vec_einsum": ("o_proj",),
}


def _experts(layer: Any) -> dict[str, KernelAxes]:
    """The weights `[experts, in, out]` of a mixture of experts."""
    shapes = {name: tuple(getattr(layer, name).shape) for name in _EXPERTS}
    return {name: KernelAxes(shape, (1,), (0,)) for name, shape in shapes.items()}


_LAYERS: dict[str, Callable[[Any], Any]] = {
    "Einsum": lambda layer: {"w": layer.einsum_str},
    "Embedder": lambda layer: "an embedding",
    "MoELayer": _experts,
    "MoERagged": lambda layer: "its experts are multiplied by groups of rows",
}


def register_layers(model: nnx.Module) -> None:
    """Register the layer classes of a model of tunix, so that `q4jax.quantize_model` knows them.

    Args:
      model: a model of `tunix.models`: Llama 3, Qwen 2 or 3, Gemma, Gemma 2 or 3; or of
        `bonsai.models`.

    Raises:
      TypeError: `model` is not an nnx module.
      ValueError: it is of neither package.
    """
    check_module(model)
    found = {type(module) for _, module in iter_modules(model)}
    ours = {cls for cls in found if f"{cls.__module__}.".startswith(_PACKAGES)}
    if not ours:
        raise ValueError(
            "model must be one of tunix.models or bonsai.models, got a "
            f"{type(model).__module__}.{type(model).__name__}"
        )
    for cls in ours:
        if cls.__name__ in _LAYERS:
            register_layer(cls, _LAYERS[cls.__name__])


def quantization_rules(model: nnx.Module) -> list[QuantRule]:
    """Return the rules for a model of tunix: nf4 for the projections of attention and MLP.

    Embeddings, the output, routers and towers of images keep their precision.

    Args:
      model: as for `register_layers`, which this calls.
    """
    register_layers(model)
    paths = [path for path, _ in iter_modules(model)]
    kept = [QuantRule(pattern, skip=True) for pattern in _KEPT]
    return [*(rule for rule in kept if any(map(rule.matches, paths))), QuantRule()]


def qlora_model(model: M, rank: int, alpha: float, *, config: Config = None, **settings: Any) -> M:
    """Return a model of tunix with 4-bit weights and LoRA adapters, for `PeftTrainer`.

    The trainers of tunix find `nnx.LoRAParam`s and train these alone. The arrays of the 4-bit
    weights are of another type of Variable, which no optimizer over `nnx.Param` touches.

    Args:
      model: as for `register_layers`; it is not changed. The new model shares the arrays that
        are not quantized.
      rank: inner width of the adapters.
      alpha: the adapters' output is scaled by `alpha / rank`.
      config: as for `q4jax.quantize_model`; None: `quantization_rules(model)`.
      **settings: other arguments of `q4jax.add_lora`, such as `targets`. Dropout is not one for
        the projections of attention, whose weights are adapted as weights.

    Raises:
      TypeError, ValueError: for the reasons of `register_layers`, `q4jax.quantize_model` and
        `q4jax.add_lora`.
    """
    rules = quantization_rules(model)
    return add_lora(
        quantize_nnx(model, rules if config is None else config), rank, alpha, **settings
    )


def peft_names(path: str) -> tuple[str, ...]:
    """Return the names that transformers has for a module of tunix, by its dotted path.

    A layer that is several modules there has several names, in the order of its outputs.
    """
    head, _, leaf = path.replace(".attn.", ".self_attn.").rpartition(".")
    return tuple(f"{head}.{name}".strip(".") for name in _MODULES.get(leaf, (leaf,)))


def save_adapters(model: nnx.Module, path: str | os.PathLike[str], **settings: Any) -> None:
    """Save the adapters of a model of tunix as PEFT reads them for the model of transformers.

    The keys and values of Gemma, one layer in tunix, become two modules with the same `lora_A`.

    Args:
      model: a model of tunix with adapters, from `qlora_model` or `q4jax.add_lora`.
      path: the directory.
      **settings: other arguments of `q4jax.interop.peft.save_adapters`: `base_model`, `revision`;
        and `prefix`, which is "model.language_model." for a Gemma 3 that sees images.

    Raises:
      FileExistsError, ValueError, NotImplementedError: as that function does.
    """
    mixtures = {p for p, m in iter_modules(model) if type(m).__name__ == "MoELayer"}

    def names(path: str) -> tuple[str, ...]:
        parent, _, leaf = path.rpartition(".")
        if parent in mixtures:
            return (f"{parent}.gate" if leaf == "router" else f"{parent}.experts.{leaf}",)
        return peft_names(path)

    save_peft(model, path, names=names, **settings)
