"""Merge the adapters of a fine-tuned model, and write a Hugging Face directory.

python examples/export.py finetune-out merged              # dense: transformers and vLLM load it
python examples/export.py finetune-out merged --four-bit   # quantized again, for bitsandbytes
"""

import argparse
from pathlib import Path

import q4jax
from q4jax import finetune
from q4jax.models import save_pretrained


def main(argv: list[str] | None = None) -> None:
    """Restore a run of `finetune.py`, merge its adapters, and write the model and its tokenizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder that finetune.py wrote")
    parser.add_argument("target", type=Path, help="the new directory")
    parser.add_argument("--four-bit", action="store_true", help="quantize the sums again")
    args = parser.parse_args(argv)

    if args.target.exists():
        raise SystemExit(f"{args.target} exists already")
    try:
        model = finetune.restore(args.run)
    except finetune.SettingsError as error:
        raise SystemExit(f"export.py: {error}") from None
    if args.four_bit:
        model, errors = q4jax.merge_lora(model, requantize=True)
        print(f"largest error of quantizing again: {str(errors).splitlines()[0]}")
    else:
        model = q4jax.merge_lora(model)
    save_pretrained(model, args.target, tokenizer=args.run / "adapter")
    print(f"{args.target}: load it with q4jax.models.from_pretrained or transformers")


if __name__ == "__main__":
    main()
