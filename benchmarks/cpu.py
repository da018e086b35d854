"""Times q4jax on this CPU against dense XLA, the naive form and, where installed, its peers.

    python benchmarks/cpu.py            # prints the table; writes benchmarks/results/cpu.json, .png
    python benchmarks/cpu.py --quick    # fewer sizes and runs
    python benchmarks/cpu.py --tune     # measures tile sizes anew; rewrites q4jax/xla/tuning.json

Every figure is a time divided by that of the dense product of the same dtype (for quantize: of a
fresh copy of the weight), taken in the same run: the candidates take turns, so that a slow moment
of the machine falls on all of them. The dense weight is timed as [out, in] and as [in, out], and
the faster one is the reference.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

import q4jax
from q4jax import codebooks
from q4jax.core import blockwise
from q4jax.core.blockwise import WeightArrays
from q4jax.xla.matmul import tiled
from q4jax.xla.quantize import quantize_rows
from q4jax.xla.tiling import has_bfloat16_dot

HERE = pathlib.Path(__file__).parent
TABLE = pathlib.Path(q4jax.__file__).parent / "xla" / "tuning.json"
BLOCKSIZE = 64
OUT_IN = (((1,), (1,)), ((), ()))
IN_OUT = (((1,), (0,)), ((), ()))


def measure(candidates, repeats):
    """name -> sorted times in ms. Candidates are (function, *arguments), timed in turns."""
    for function, *args in candidates.values():
        for _ in range(2):
            jax.block_until_ready(function(*args))
    times = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, (function, *args) in candidates.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: sorted(t) for name, t in times.items()}


def median(times):
    return float(np.median(times))


def rows_from(label, times, references):
    """Results as records, each with its ratio to the fastest reference."""
    reference = min(references, key=lambda name: median(times[name]))
    base = times[reference]
    return [
        {
            "case": label,
            "form": name,
            "median_ms": round(median(t), 3),
            "min_ms": round(t[0], 3),
            "ratio": round(median(t) / median(base), 3),
            "ratio_of_minima": round(t[0] / base[0], 3),
            "reference": reference,
        }
        for name, t in times.items()
    ]


def show(records):
    print(f"\n{records[0]['case']}   (reference: {records[0]['reference']})", flush=True)
    for r in records:
        print(
            f"  {r['form']:24s} {r['median_ms']:9.2f} ms  (min {r['min_ms']:9.2f})"
            f"  x {r['ratio']:6.2f}  (minima {r['ratio_of_minima']:6.2f})",
            flush=True,
        )
    return records


def with_gradient(forward):
    """x, *weights -> (y, gradient of half its sum of squares with respect to x)."""

    def both(x, *weights):
        y, pullback = jax.vjp(lambda x: forward(x, *weights), x)
        return y, pullback(y)

    return both


def naive_matmul(x, packed, absmax):
    """Decode the whole weight with a table lookup, then one dot."""
    codes = jnp.stack([packed >> 4, packed & 15], axis=-1)
    values = jnp.take(jnp.asarray(codebooks.CODEBOOKS["nf4"].values), codes.astype(jnp.int32))
    weight = values.reshape(*absmax.shape, -1) * absmax[..., None]
    return jax.lax.dot_general(x, weight.reshape(packed.shape[0], -1).astype(x.dtype), OUT_IN)


def naive_quantize(w):
    blocks = w.astype(jnp.float32).reshape(-1, BLOCKSIZE)
    absmax = jnp.abs(blocks).max(1)
    scaled = (blocks / absmax[:, None]).reshape(-1)
    codes = jnp.searchsorted(codebooks.CODEBOOKS["nf4"].thresholds, scaled).astype(jnp.uint8)
    return blockwise.pack(codes), absmax


def qwix_forms():
    """(quantize, matmul) of qwix with the same blocks, or None where it is not installed."""
    try:
        import qwix
    except ImportError:
        return None

    def quantize(w):
        return qwix.quantize(w, "nf4", channelwise_axes=(0,), tiled_axes={1: BLOCKSIZE})

    def matmul(x, weight):
        return qwix.dot_general(x, weight, OUT_IN)

    return quantize, matmul


def bitsandbytes_forms():
    """(quantize, product, layer) of bitsandbytes on torch, or None where they are not installed.

    `product` is what its layer computes in train mode; `layer` in eval mode, where it repacks the
    weight and computes in bfloat16 on CPUs with AVX512-BF16; on others it is the same as `product`.
    """
    try:
        import bitsandbytes
        import torch
    except ImportError:
        return None

    def to_torch(x):
        return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, x.dtype.name))

    def quantize(w):
        return bitsandbytes.functional.quantize_4bit(w, blocksize=BLOCKSIZE, quant_type="nf4")

    @torch.no_grad()
    def product(x, packed, state):
        return bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)

    def layer(w):
        linear = bitsandbytes.nn.Linear4bit(
            w.shape[1], w.shape[0], bias=False, compute_dtype=w.dtype, quant_type="nf4",
            compress_statistics=False,
        )  # fmt: skip
        linear.weight = bitsandbytes.nn.Params4bit(
            w, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        linear = linear.to("cpu").eval()
        return torch.no_grad()(lambda x: linear(x))

    return to_torch, quantize, product, layer


def matmul_cases(rows, size, ms, repeats):
    rng = np.random.default_rng(0)
    w32 = jnp.asarray(rng.standard_normal((rows, size)), jnp.float32)
    peer, other = qwix_forms(), bitsandbytes_forms()
    records = []
    for dtype in (jnp.float32, jnp.bfloat16):
        w = w32.astype(dtype)
        packed, state = q4jax.quantize_4bit(w, quant_type="nf4", blocksize=BLOCKSIZE)
        forms = {
            "dense [out, in]": (lambda x, w: jax.lax.dot_general(x, w, OUT_IN), w),
            "dense [in, out]": (lambda x, w: jax.lax.dot_general(x, w, IN_OUT), w.T.copy()),
            "q4jax": (q4jax.matmul_4bit, packed, state),
            "q4jax xla": (
                functools.partial(q4jax.matmul_4bit, implementation="xla"),
                packed,
                state,
            ),
            "naive": (naive_matmul, packed, state.absmax),
        }
        if peer:
            forms["qwix"] = peer[1], jax.jit(peer[0])(w)
        for m in ms:
            x = jnp.asarray(rng.standard_normal((m, size)), dtype)
            for label, wrap in (("forward", lambda f: f), ("forward+backward", with_gradient)):
                candidates = {
                    name: (jax.jit(wrap(function)), x, *weights)
                    for name, (function, *weights) in forms.items()
                }
                if other and label == "forward":
                    to_torch, quantize, product, layer = other
                    wt, xt = to_torch(w), to_torch(x)
                    candidates["bitsandbytes train"] = product, xt, *quantize(wt)
                    candidates["bitsandbytes eval"] = layer(wt), xt
                times = measure(candidates, repeats if m < 512 else max(5, repeats // 3))
                case = f"{label} [{rows}, {size}] M={m} {x.dtype.name}"
                dense = [name for name in forms if name.startswith("dense")]
                records += show(rows_from(case, times, dense))
    return records


def quantize_cases(size, repeats):
    rng = np.random.default_rng(1)
    peer, other = qwix_forms(), bitsandbytes_forms()
    records = []
    for dtype in (jnp.float32, jnp.bfloat16):
        w = jnp.asarray(rng.standard_normal((size, size)), dtype)
        quantize = functools.partial(q4jax.quantize_4bit, quant_type="nf4", blocksize=BLOCKSIZE)

        candidates = {
            "fresh copy": (jax.jit(lambda w: jnp.copy(w)), w),
            "q4jax": (jax.jit(quantize), w),
            "q4jax xla": (jax.jit(functools.partial(quantize, implementation="xla")), w),
            "naive": (jax.jit(naive_quantize), w),
        }
        if peer:
            candidates["qwix"] = jax.jit(peer[0]), w
        if other:
            candidates["bitsandbytes"] = other[1], other[0](w)
        times = measure(candidates, max(5, repeats // 2))
        records += show(rows_from(f"quantize {w.dtype.name}", times, ["fresh copy"]))
    return records


def tune(size, repeats):
    """Measure the tiled products over tile sizes, and rewrite the table."""
    table = json.loads(TABLE.read_text())
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((size, size)), jnp.float32)
    packed, absmax = quantize_rows(w, quant_type="nf4", blocksize=BLOCKSIZE)
    bfloat16 = "bfloat16_native" if has_bfloat16_dot() else "bfloat16_emulated"
    arrays = WeightArrays(packed, absmax, None, None)
    spec = q4jax.QuantSpec.from_shape(w.shape, "float32", "nf4", BLOCKSIZE, False)
    for op in ("linear", "linear_transpose"):
        for name, dtype in (("float32", "float32"), ("float16", "float16"), (bfloat16, "bfloat16")):
            rows_of = []
            for m in (4, 64, 512):
                x = jnp.asarray(rng.standard_normal((m, size)), dtype)
                candidates = {}
                for elements in (2**20, 2**21):
                    for upcast in (False,) if dtype == "float32" else (False, True):
                        function = jax.jit(
                            functools.partial(
                                tiled, spec=spec, transpose=op == "linear_transpose",
                                elements=elements, upcast=upcast,
                            )
                        )  # fmt: skip
                        candidates[elements, upcast] = function, x, arrays, None
                times = measure(candidates, repeats)
                elements, upcast = min(times, key=lambda key: times[key][0])
                rows_of.append([m, elements, int(upcast)])
                print(op, name, f"M={m}", f"elements={elements} upcast={upcast}", flush=True)
            table[op][name] = rows_of
    lines = []
    for op, dtypes in table.items():
        entries = ",\n".join(f'    "{name}": {json.dumps(rows)}' for name, rows in dtypes.items())
        lines.append(f'  "{op}": {{\n{entries}\n  }}')
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def environment():
    try:
        info = pathlib.Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(":")[1].strip() for line in info.splitlines() if "model name" in line)
        features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in info.split()]
    except (OSError, StopIteration):
        cpu, features = platform.processor(), []
    versions = {}
    for package in ("jax", "jaxlib", "qwix", "torch", "bitsandbytes"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "features": features,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "native": q4jax.native.status().isa,
        "devices": [str(d) for d in jax.devices()],
        "python": platform.python_version(),
        **versions,
    }


def plot(records, path, title):
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
        return
    cases = list(dict.fromkeys(r["case"] for r in records))
    forms = [
        f
        for f in dict.fromkeys(r["form"] for r in records)
        if f in ("q4jax", "q4jax xla", "naive", "qwix")
    ]
    ratio = {(r["case"], r["form"]): r["ratio"] for r in records}
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(cases) + 1.5), layout="constrained")
    height = 0.8 / len(forms)
    for i, form in enumerate(forms):
        y = np.arange(len(cases)) + i * height
        axes.barh(y, [ratio[case, form] for case in cases], height, label=form)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(np.arange(len(cases)) + 0.4 - height / 2, cases)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time / dense XLA of the same dtype\n(quantize: / fresh copy); lower is better")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results" / "cpu.json")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--rows", type=int, help="rows of the weight in products, if not --size")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="M = 1 and 16 only, 5 runs")
    parser.add_argument(
        "--tune", action="store_true", help="rewrite q4jax/xla/tuning.json, then stop"
    )
    args = parser.parse_args()
    repeats = 5 if args.quick else args.repeats
    if args.tune:
        tune(args.size, repeats)
        return
    about = environment()
    print(json.dumps(about))
    records = quantize_cases(args.size, repeats)
    ms = (1, 16) if args.quick else (1, 4, 16, 64, 512)
    records += matmul_cases(args.rows or args.size, args.size, ms, repeats)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({**about, "size": args.size, "results": records}, indent=1) + "\n"
    )
    plot(records, args.out.with_suffix(".png"), f"{about['cpu']}, jax {about['jax']}")


if __name__ == "__main__":
    main()
