"""Loading, converting and memory of checkpoints, each beside the plainest thing that moves as much.

    python benchmarks/checkpoints.py [--layers 22] [--folder DIR] [--json FILE]

Writes a synthetic Llama of random weights (by default 1.1e9 of them: 2.2 GB in bfloat16), quantizes
it while loading, writes the 4-bit directory, loads that, and measures each in a process of its own
with the files in the page cache. Where bitsandbytes is installed, its CPU quantization is timed
beside q4jax's, in turns.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def config(layers):
    """A Llama of the sizes of TinyLlama, with this many layers."""
    from q4jax.models import LlamaConfig

    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
    )


def write_full(folder, layers):
    """A directory in bfloat16, tensor by tensor; returns its largest tensor's bytes."""
    import jax
    import ml_dtypes

    from q4jax.interop.files import encode_json
    from q4jax.interop.huggingface.directory import CONFIG, SINGLE
    from q4jax.interop.safetensors import write_file

    c = config(layers)
    kv = c.num_key_value_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    shapes["model.norm.weight"] = (c.hidden_size,)
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, out in {"q": c.hidden_size, "k": kv, "v": kv, "o": c.hidden_size}.items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = (out, c.hidden_size)
        for name in ("gate", "up"):
            shapes[f"{at}mlp.{name}_proj.weight"] = (c.intermediate_size, c.hidden_size)
        shapes[f"{at}mlp.down_proj.weight"] = (c.hidden_size, c.intermediate_size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = (c.hidden_size,)
    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)

    class Random(dict):
        def __getitem__(self, name):
            values = rng.standard_normal(shapes[name], np.float32)
            return (values * 0.02).astype(dtype)

    folder.mkdir()
    layouts = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    write_file(folder / SINGLE, Random(), layouts=layouts, metadata={"format": "pt"})
    (folder / CONFIG).write_bytes(encode_json(c.to_hf() | {"dtype": "bfloat16"}, CONFIG))
    return max(layout.size * dtype.itemsize for layout in layouts.values())


def peak():
    """The largest resident size of this program so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def model_bytes(model):
    import jax
    from flax import nnx

    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def job_quantize(full, quantized):
    """Quantizes while loading, and writes; the peak is that of loading."""
    import jax.numpy as jnp

    import q4jax
    from q4jax.models import from_pretrained, save_pretrained

    # The libraries, the device and one compiled program: what any process has.
    q4jax.Params4bit.quantize(jnp.ones((64, 64)), 64, True, "nf4")
    before, start = peak(), time.perf_counter()
    model = from_pretrained(full, quantization=q4jax.QuantConfig(), progress=False)
    seconds, grown = time.perf_counter() - start, peak() - before
    result = {"seconds": seconds, "peak": grown, "model": model_bytes(model)}
    save_pretrained(model, quantized)
    return result


def job_load(path):
    """Reads with numpy, and loads as tensors by name and as a model, in turns: first and median."""
    import jax

    from q4jax.interop import huggingface
    from q4jax.models import from_pretrained

    file = Path(path) / "model.safetensors"
    takes = {
        "numpy": lambda: np.fromfile(file, np.uint8),
        "tensors": lambda: huggingface.load_directory(path, progress=False),
        "model": lambda: from_pretrained(path, progress=False),
    }
    times = {name: [] for name in takes}
    for _ in range(7):
        for name, take in takes.items():
            start = time.perf_counter()
            loaded = take()
            jax.block_until_ready([a for a in jax.tree.leaves(loaded) if isinstance(a, jax.Array)])
            times[name].append(time.perf_counter() - start)
            del loaded
    return {name: [t[0], statistics.median(t[1:])] for name, t in times.items()}


def job_convert(size):
    """Quantization of one weight by both libraries, in turns: median seconds."""
    import jax

    from q4jax import QuantConfig
    from q4jax.interop.huggingface.load_save import quantize_tensor
    from q4jax.interop.safetensors.reader import aligned_empty

    size = int(size)
    w = aligned_empty((size, size), np.dtype(np.float32))
    w[...] = np.random.default_rng(0).standard_normal((size, size), np.float32)
    settings = QuantConfig(compress_statistics=False)
    takes = {"q4jax": lambda: jax.block_until_ready(quantize_tensor("w", w, settings))}
    try:
        import torch
        from bitsandbytes.functional import quantize_4bit
    except Exception as error:
        print(f"bitsandbytes is not measured: {error}", file=sys.stderr)
    else:
        theirs = torch.from_numpy(w)
        takes["bitsandbytes"] = lambda: quantize_4bit(theirs, quant_type="nf4")
    times = {name: [] for name in takes}
    for turn in range(12):
        for name, take in takes.items():
            start = time.perf_counter()
            take()
            if turn > 1:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def job(name, *arguments):
    """A job in a process of its own."""
    command = [sys.executable, __file__, "--job", name, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder, layers):
    """All of it."""
    full, quantized = folder / "full", folder / "quantized"
    largest = write_full(full, layers)
    size = sum(path.stat().st_size for path in full.iterdir())
    made = job("quantize", full, quantized)
    limit = made["model"] + 3 * largest
    print(f"full precision: {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
    print(
        f"quantized while loading in {made['seconds']:.1f} s: "
        f"{size / made['seconds'] / 1e9:.2f} GB/s"
    )
    print(
        f"peak host memory {made['peak'] / 1e6:.0f} MB; the model {made['model'] / 1e6:.0f} MB + "
        f"{(made['peak'] - made['model']) / largest:.2f} x the largest tensor (limit 3)"
    )
    file = quantized / "model.safetensors"
    loads = job("load", quantized)
    seconds = loads["numpy"][1]
    print(f"4-bit directory: {file.stat().st_size / 1e6:.0f} MB; numpy reads it in {seconds:.2f} s")
    for name in ("tensors", "model"):
        first, median = loads[name]
        print(
            f"loaded as {name} in {median:.2f} s ({first:.2f} s the first time): "
            f"{seconds / median:.2f} of numpy's speed (limit 0.5)"
        )
    convert = job("convert", 4096)
    line = f"quantize 4096 x 4096 float32: {convert['q4jax'] * 1e3:.0f} ms"
    if "bitsandbytes" in convert:
        ratio = convert["bitsandbytes"] / convert["q4jax"]
        line += f"; bitsandbytes {convert['bitsandbytes'] * 1e3:.0f} ms: {ratio:.1f} x (limit 5)"
    print(line)
    return {
        "full_bytes": size,
        "largest": largest,
        "quantize": made,
        "limit": limit,
        "file_bytes": file.stat().st_size,
        "load_seconds": loads,
        "convert_seconds": convert,
    }


def main():
    """Runs the jobs, or is one."""
    if sys.argv[1:2] == ["--job"]:
        name, *arguments = sys.argv[2:]
        print(json.dumps(globals()[f"job_{name}"](*arguments)))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--folder", type=Path, help="where to write; 3 GB (a temporary folder)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        figures = measure(folder, options.layers)
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
