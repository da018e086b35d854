"""QLoRA of large models on 8, 64 and more devices: bytes per device, from the compiler.

    python benchmarks/scale.py [--out FILE] [--models 7b 70b] [--devices 8 64 512]
    python benchmarks/scale.py --target v5e     # TPUs, with the extra `tpu`; none has to be here
    python benchmarks/scale.py --memory         # a step of Llama-3-8B on one device

`scale_shapes.py` has the models: Llama-2 by default, and others by name.

Nothing is allocated: the step of a fine-tuning run is lowered and compiled from shapes alone.

For simulated CPU devices, the bytes of a closed formula stand beside those of Llama-2. What the
program keeps while it runs ("temporary") is an upper bound for accelerators: the CPU compiler
widens 16-bit operands to float32, and the loss is of all logits.

For TPUs (`scale_targets.py`), the axes are Explicit and the loss is `model.loss`, as
`python -m q4jax finetune` has them. A program that does not compile is a line that says why.
libtpu takes long to fuse the decoding of a weight into a product of many rows. With `--effort O1`,
the default, it does not; what is decoded is then "temporary" and adds to the bound. O2 is what jax
asks for when it runs a program.
"""

import argparse
import contextlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
import scale_targets
import step_memory
from collectives import collectives
from flax import nnx
from jax.sharding import AxisType, Mesh
from scale_shapes import DENSE_MESHES, MODELS, mesh_sizes
from scale_targets import CPU

import q4jax
from q4jax.models import Llama, LlamaConfig, LlamaShardings

LLAMAS = ("7b", "70b")
ON_TPUS = ("llama-3-8b", "llama-3-70b", "qwen3-30b-a3b")
RANK, LENGTH, BLOCKSIZE = 16, 2048, 64
EFFORTS = ("O0", "O1", "O2", "O3")
_ERROR = re.compile(r"[\w.]*(Error|Exception): ")


def abstract(config: LlamaConfig, rules: LlamaShardings) -> tuple[Llama, nnx.Optimizer]:
    """Model and optimizer without arrays, each variable with its place on the mesh."""

    def make() -> tuple[Llama, nnx.Optimizer]:
        dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        model = Llama(config, rngs=nnx.Rngs(0), **dtypes)
        model = q4jax.quantize_model(model, quant_type="nf4", blocksize=BLOCKSIZE)
        model = q4jax.add_lora(model, RANK, 2.0 * RANK)
        model.remat = True
        return model, nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.LoRAParam)

    model, optimizer = nnx.eval_shape(make)
    return rules.place(model), rules.place(optimizer)


def train_step(
    model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array, rules: LlamaShardings
) -> jax.Array:
    """One step of fine-tuning; its loss is of all logits on Auto axes, in blocks on others."""

    def loss(model: Llama) -> jax.Array:
        if AxisType.Explicit in rules.mesh.axis_types:
            return model.loss(tokens)
        logits = model(tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    rules.place(model, nnx.LoRAParam)
    rules.place(optimizer)
    return value


def formula(config: LlamaConfig, mesh: Mesh) -> dict[str, float]:
    """Bytes per device by arithmetic: what is stored, and what is moved in a step."""
    sizes = dict(mesh.shape)
    fsdp, tensor, data = (sizes.get(name, 1) for name in ("fsdp", "tensor", "data"))
    h, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = config.num_key_value_heads * config.head_dim
    matrices = [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)]  # out, in
    weights = layers * sum(n * k for n, k in matrices)
    # A byte for two codes, a byte for each scale, 4 bytes for 256 of these (replicated).
    quantized = weights / 2 + weights / BLOCKSIZE
    nested = 4 * weights / BLOCKSIZE / 256
    dense = 2 * 2 * config.vocab_size * h  # the embedding and the head
    # The outputs of column-parallel layers' adapters are split, as the layers', and the inputs of
    # those of the two row-parallel ones.
    rows = (3, 6)
    adapters = layers * sum(
        RANK * (n + k / tensor if i in rows else n / tensor + k)
        for i, (n, k) in enumerate(matrices)
    )
    stored = (quantized + dense) / (fsdp * tensor) + nested + 12 * adapters
    # Codes and scales: for the forward pass, and once for both halves of the backward pass. The
    # head once; the compiler for CPUs moves it, and activations, in float32.
    gathered = (2 * quantized + 4 * config.vocab_size * h) / tensor if fsdp > 1 else 0.0
    reduced = 4.0 * adapters if fsdp * data > 1 else 0.0
    stream = 4 * LENGTH * h  # the residual stream of a device
    # The embedding's part of a device's group; or the rows that each device finds in its part.
    looked_up = stream * fsdp if data == 1 else 4 * config.vocab_size * h / tensor
    looked_up = looked_up if fsdp > 1 else 0.0
    # Partial results over "tensor": of o and down; of o again; of the five gradients of q, k, v,
    # gate and up; of the head's.
    summed = stream * (layers * 8 + 1) if tensor > 1 else 0.0
    return {"arguments": stored, "moved": gathered + reduced + looked_up + summed}


def describe(name: str, devices: int) -> dict[str, Any]:
    """What a row says of a program before it is compiled."""
    sizes = mesh_sizes(name, devices)
    mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    tokens = sizes.get("data", 1) * sizes["fsdp"] * LENGTH
    return {"model": name, "mesh": mesh, "devices": devices, "tokens": tokens}


def measure(name: str, devices: int, target: str = CPU, effort: str = "O1") -> dict[str, Any]:
    """One row: the program for one model and mesh."""
    if target != CPU:
        jax.config.update("jax_optimization_level", effort)
    config, mesh = MODELS[name], scale_targets.mesh_on(target, mesh_sizes(name, devices))
    rules, row = LlamaShardings(mesh, blocksize=BLOCKSIZE), describe(name, devices)
    explicit = AxisType.Explicit in mesh.axis_types
    began = time.perf_counter()
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        model, optimizer = abstract(config, rules)
        shape = row["tokens"] // LENGTH, LENGTH + (not explicit)  # the last one is a label alone
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rules.batch)
        step = nnx.jit(train_step, donate_argnums=(0, 1), static_argnames="rules")
        compiled = step.lower(model, optimizer, tokens, rules=rules).compile()
    memory = compiled.memory_analysis()
    moved: dict[str, int] = {}
    for collective in collectives(compiled.as_text()):
        key = f"{collective.kind} {collective.dtype}"
        moved[key] = moved.get(key, 0) + collective.nbytes
    return row | {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "moved": sum(moved.values()),
        "moved_by_kind": moved,
        "formula": formula(config, mesh) if name in LLAMAS and target == CPU else None,
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def show(row: dict[str, Any]) -> None:
    """The row for people."""
    if "error" in row:
        print(f"{row['model']} on {row['mesh']}: not compiled: {row['error']}", flush=True)
        return
    found = ", ".join(
        f"{key} {row[key] / 1e9:.2f} GB" for key in ("arguments", "temporary", "moved")
    )
    expected = row["formula"] or {}
    formula = ", ".join(f"{key} {value / 1e9:.2f}" for key, value in expected.items())
    print(
        f"{row['model']} on {row['mesh']}: {found}"
        + (f" (formula: {formula})" if formula else "")
        + f", compiled in {row['compile_seconds']} s",
        flush=True,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, as docs/scaling.md has them."""
    lines = [
        "| model, mesh | arguments | by formula | temporary | moved | by formula |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        expected = row["formula"] or {}
        values = (
            row["arguments"],
            expected.get("arguments"),
            row["temporary"],
            row["moved"],
            expected.get("moved"),
        )
        cells = " | ".join("-" if value is None else f"{value / 1e9:.2f}" for value in values)
        lines.append(f"| {row['model'].upper()}, `{row['mesh']}` | {cells} |")
    return "\n".join(lines) + "\n"


def command_of(name: str, devices: int, target: str, effort: str) -> list[str]:
    """What prints a row as JSON."""
    command = [sys.executable, __file__, "--one", name, "--devices", str(devices)]
    return [*command, "--target", target, "--effort", effort]


def in_process(
    name: str, devices: int, target: str, effort: str, minutes: float | None
) -> dict[str, Any]:
    """`measure` in a process of its own, which has no more than these minutes for it."""
    limit = None if minutes is None else 60 * minutes
    command = command_of(name, devices, target, effort)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return describe(name, devices) | {"error": f"took more than {minutes:g} minutes"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if _ERROR.match(line)]
        return describe(name, devices) | {"error": (lines or [f"exit code {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """A process for each number of devices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--target", choices=scale_targets.TARGETS, default=CPU)
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--devices", nargs="+", type=int, choices=DENSE_MESHES)
    parser.add_argument("--effort", choices=EFFORTS, default="O1", help="of libtpu, by jax's name")
    parser.add_argument("--minutes", type=float, help="for a program; one that takes more is left")
    parser.add_argument(
        "--memory", action="store_true", help="print the memory of a step on one device instead"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.devices[0], args.target, args.effort)))
        return
    if args.memory:
        return step_memory.show()
    reason = scale_targets.why_unreached(args.target)
    counts = scale_targets.device_counts(args.target)
    devices = args.devices or counts
    if reason is None and set(devices) - set(counts):
        reason = f"--target {args.target} has {', '.join(map(str, counts))} devices"
    if reason is not None:
        sys.exit(f"scale.py: {reason}")
    models = args.models or (LLAMAS if args.target == CPU else ON_TPUS)
    versions = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
    }
    settings: dict[str, Any] = {"rank": RANK, "length": LENGTH, "blocksize": BLOCKSIZE}
    if args.target != CPU:
        versions["libtpu"] = importlib.metadata.version("libtpu")
        settings |= {"target": args.target, "effort": args.effort}
    rows: list[dict[str, Any]] = []
    for count in devices:
        for name in models:
            rows.append(in_process(name, count, args.target, args.effort, args.minutes))
            show(rows[-1])
            if args.out:  # after each: a program may take minutes
                report = {"versions": versions, "settings": settings, "rows": rows}
                args.out.write_text(json.dumps(report, indent=1) + "\n")
    if any("error" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
