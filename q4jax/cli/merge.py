"""`python -m q4jax merge`: write a model with its adapters in its weights."""

import argparse
import os
from typing import Any

import jax.numpy as jnp
from flax import nnx

from q4jax.cli.open_model import open_model
from q4jax.convert.config import QuantConfig
from q4jax.finetune.settings import SettingsError
from q4jax.interop.bitsandbytes.tensors import CONTAINERS
from q4jax.interop.huggingface.tokenizer import TOKENIZER_FILES
from q4jax.lora.merge import merge_lora
from q4jax.models.decoder.decoder import Llama
from q4jax.models.decoder.norm import DecoderNorm
from q4jax.models.pretrained.save import save_pretrained
from q4jax.nnx.traverse import replace_modules

DESCRIPTION = """Merge an adapter into its model, and write a Hugging Face directory.

Without --four-bit, the directory is in 16 bits: transformers, vLLM and llama.cpp's converter load
it. With it, the sums are quantized (again), as bitsandbytes does. For a run of finetune, name its
folder and leave ADAPTER out."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model", help="a Hugging Face directory, org/name on the hub, or a run of finetune")
    add("adapter", nargs="?", help="a PEFT adapter of the model")
    add("out", help="the new directory")
    add("--four-bit", action="store_true", help="write 4-bit weights")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of dense weights (default: as stored, and bfloat16 for float32)",
    )
    add("--quant-storage", choices=CONTAINERS, help="dtype that holds 4-bit codes (default: uint8)")
    parser.set_defaults(run=main)


def main(options: argparse.Namespace) -> None:
    """Run the command; the directory appears whole, or not at all."""
    if os.path.lexists(options.out):
        raise SettingsError(f"{options.out} exists already")
    if options.quant_storage is not None and not options.four_bit:
        raise SettingsError("--quant-storage needs --four-bit")
    opened = open_model(options.model, options.adapter)
    if opened.adapter is None and not opened.is_run:
        raise SettingsError(f"{options.model} is no run of finetune: name an adapter to merge")
    model = opened.load(QuantConfig() if options.four_bit else None)
    if options.four_bit:
        model, errors = merge_lora(model, requantize=True)
        print(f"largest error of quantizing again: {str(errors).splitlines()[0]}")
    else:
        model = merge_lora(model)
    model = _cast(model, options.dtype)
    has_tokenizer = any((opened.tokenizer_folder / name).is_file() for name in TOKENIZER_FILES)
    save_pretrained(
        model,
        options.out,
        quant_storage=options.quant_storage or "uint8",
        tokenizer=opened.tokenizer_folder if has_tokenizer else None,
    )
    print(f"{options.out}: {'4-bit' if options.four_bit else 'dense'}, with the adapter merged")


def _cast(model: Llama, dtype: str | None) -> Llama:
    """Return a copy with other dense weights, but for norms, which compute in float32."""

    def cast(_: str, module: Any) -> Any:
        variables = () if isinstance(module, DecoderNorm) else vars(module).values()
        for variable in variables:
            if type(variable) is nnx.Param:
                own = variable[...].dtype
                wanted = dtype or ("bfloat16" if own == jnp.float32 else own)
                variable.set_value(variable[...].astype(wanted))
        return module

    return replace_modules(model, cast)
