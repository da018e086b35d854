"""PEFT's files of the adapters of a Linen model."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from q4jax.convert.kernel_axes import KernelAxes
from q4jax.interop.peft.load import load_adapters
from q4jax.interop.peft.save import save_adapters
from q4jax.linen.adapter import ADAPTERS, LoRAFactors
from q4jax.linen.lora import adaptable_weights
from q4jax.linen.quantized_param import QuantizedBox
from q4jax.linen.variables import COLLECTION
from q4jax.lora.weight import LoRAWeight
from q4jax.nnx.quantized_variable import QuantizedVariable
from q4jax.nnx.variables import to_variables

Path = tuple[str, ...]
Names = Callable[[str], str]


def save_linen_adapters(
    variables: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    names: Names = lambda path: path,
    **settings: Any,
) -> None:
    """Save the adapters of a Linen model, and nothing else, as PEFT reads them.

    Args:
      variables: what `q4jax.linen.add_lora` returned, trained or not.
      path: the directory; created if missing. Adapters in it are not replaced.
      names: a function from the dotted path of a Linen module, such as "layers_0.attn.query", to
        its name in the files without the prefix, "layers.0.self_attn.q_proj".
      **settings: other arguments of `save_adapters`: base_model, revision, prefix, stack.

    Raises:
      FileExistsError: the directory holds adapters, or another thread or process is writing it.
      ValueError: there are no adapters, or no 4-bit weight; two modules have one name.

    Examples:
      >>> import tempfile, jax, jax.numpy as jnp, q4jax
      >>> from flax import linen as nn
      >>> from q4jax.interop import peft
      >>> model, x = nn.Sequential([nn.Dense(32)]), jnp.ones((1, 64))
      >>> small = q4jax.linen.quantize_model(model, model.init(jax.random.key(0), x), x)
      >>> path = tempfile.mkdtemp()
      >>> variables = q4jax.linen.add_lora(small, rank=4, alpha=8)
      >>> peft.save_linen_adapters(variables, path, names=lambda path: "q_proj")
      >>> list(peft.read_adapters(path)[1])
      ['model.q_proj']
    """
    save_adapters(_tree(variables, names, variables.get(ADAPTERS, {})), path, **settings)


def load_linen_adapters(
    variables: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    names: Names = lambda path: path,
    prefix: str = "model.",
) -> dict[str, Any]:
    """Return variables of a Linen model with the adapters of a PEFT directory.

    Args:
      variables: variables with 4-bit weights; adapters among them are replaced.
      path: the directory.
      names: as for `save_linen_adapters`.
      prefix: start of the names in the files that the model's names lack.

    Returns:
      The variables, with the adapters in the collection "lora".

    Raises:
      ValueError: for the reasons of `load_adapters`; there is no 4-bit weight.
      FileNotFoundError: a file is missing.
      NotImplementedError: the layers of a stack differ in rank or alpha; a variant of LoRA that is
        not read, such as DoRA.
    """
    tree = load_adapters(_tree(variables, names, {}), path, prefix=prefix)
    lora: dict[Path, Any] = {}
    for at in adaptable_weights(variables):
        found = getattr(_descend(tree, names(".".join(at[:-1]))), at[-1])
        if not isinstance(found, LoRAWeight):
            continue
        if found.parts is not None:
            raise NotImplementedError(
                f"{'/'.join(at)}: the adapters of its layers differ in rank or alpha: {found.parts}"
            )
        factors = found.lora_a[...], found.lora_b[...]
        lora[at] = LoRAFactors(*factors, found.alpha, found.rslora)
    return {**variables, ADAPTERS: unflatten_dict(lora)}


def _tree(variables: Mapping[str, Any], names: Names, lora: Mapping[str, Any]) -> nnx.Module:
    """Return the 4-bit weights, with their adapters, as an NNX module with PEFT's names."""
    root, adapters = nnx.Module(), flatten_dict(lora)
    quant = flatten_dict(variables.get(COLLECTION, {}))
    for path, weight in adaptable_weights(variables).items():
        weight = meta.unbox(weight)
        name = names(".".join(path[:-1]))
        module = _descend(root, name)
        if vars(module).get(path[-1]) is not None:
            raise ValueError(f"two modules have the name {name!r}")
        box = quant[path]
        axes = box.kernel_axes if isinstance(box, QuantizedBox) else _axes(weight)
        base: Any = QuantizedVariable(to_variables(weight), axes, weight.quant_state.dtype, None)
        factors = adapters.get(path)
        if factors is not None:
            settings = {"rslora": factors.rslora, "param_dtype": factors.lora_a.dtype}
            rngs = nnx.Rngs(0)
            base = LoRAWeight(base, axes, factors.rank, factors.alpha, rngs=rngs, **settings)
            base.lora_a[...], base.lora_b[...] = factors.lora_a, factors.lora_b
        setattr(module, path[-1], base)
    return root


def _axes(weight: Any) -> KernelAxes:
    """The axes `[in, out]` of the kernel of a layer of `q4jax.linen`."""
    out, inputs = weight.quant_state.spec.shape
    return KernelAxes((inputs, out), (0,))


def _descend(module: Any, name: str) -> Any:
    """Return the module at a dotted name, which is made where it is missing."""
    for part in filter(None, name.split(".")):
        if part not in vars(module):
            setattr(module, part, nnx.Module())
        module = getattr(module, part)
    return module
