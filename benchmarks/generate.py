"""Decoding in 4 bits beside the same model in dense float32: tokens/s, memory, compile time.

    pip install -e '.[examples]'
    python benchmarks/generate.py [--out FILE] [--repeats 9]

SmolLM2-135M, as `examples/generate.py` loads it, continues one prompt, and a batch of four. The two
models take turns, so that a slow moment of the machine falls on both; a figure is a ratio of
medians. A decoding step is the time from one call of the callback to the next.
"""

import argparse
import json
import pathlib
import sys
import time

import cpu
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import q4jax
from q4jax.models import Llama, LlamaConfig, generate

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
PROMPT, NEW = 32, 16


def show(rows):
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def decode_rows(models, batch, repeats):
    """Milliseconds of a decoding step, and tokens/s, of each model."""
    ids = np.random.default_rng(0).integers(0, 1000, (batch, PROMPT))
    steps = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            times = []
            generate(
                model, ids, NEW, callback=lambda _, times=times: times.append(time.perf_counter())
            )
            steps[name] += list(np.diff(times)) if turn else []  # the first turn compiles
    base = np.median(steps["dense float32"])
    return [
        {
            "case": f"decode, batch {batch}",
            "form": name,
            "median_ms": round(float(np.median(times)) * 1e3, 2),
            "min_ms": round(min(times) * 1e3, 2),
            "tokens_per_second": round(batch / float(np.median(times)), 1),
            "speed_over_dense": round(float(base / np.median(times)), 2),
        }
        for name, times in steps.items()
    ]


def memory_row(quantized):
    """Bytes of the linear layers over their bytes in float32."""
    report = q4jax.memory_report(quantized)
    stored = report.code_bytes + report.scale_bytes
    return {
        "case": "memory of the linear layers",
        "form": "nf4, double quantization",
        "bytes": stored,
        "ratio_to_float32": round(stored / (4 * report.quantized_weights), 4),
    }


def compile_rows(repeats):
    """Seconds to trace and compile a forward pass of 4 and of 32 layers."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def compiled(layers):
        config = LlamaConfig(1000, 256, 512, num_hidden_layers=layers, **sizes)

        def make():
            return q4jax.quantize_model(Llama(config, rngs=nnx.Rngs(0)))

        graphdef, state = nnx.split(nnx.eval_shape(make))
        step = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))
        start = time.perf_counter()
        step.lower(state, ids).compile()
        return time.perf_counter() - start

    seconds = {4: [], 32: []}
    for _ in range(repeats):
        for layers, found in seconds.items():
            found.append(compiled(layers))
    base = np.median(seconds[4])
    return [
        {
            "case": "compile",
            "form": f"{layers} layers",
            "median_s": round(float(np.median(found)), 3),
            "ratio_to_4_layers": round(float(np.median(found) / base), 3),
        }
        for layers, found in seconds.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results" / "generate.json")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    import runs

    about = cpu.environment()
    dense = runs.load_model(None)
    models = {"dense float32": dense, "nf4, double quantization": q4jax.quantize_model(dense)}
    rows = []
    for batch in (1, 4):
        rows += show(decode_rows(models, batch, args.repeats))
    rows += show([memory_row(models["nf4, double quantization"])])
    rows += show(compile_rows(args.repeats))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
