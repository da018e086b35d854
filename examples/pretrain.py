"""Train a small Llama in float32 on Shakespeare's works: its weights were never in 4 bits.

    python examples/pretrain.py        # prints the folder of the model

It takes minutes on two cores, once: the folder is kept in the cache of `demo.py`. Its text is that
of a model of 4 million weights which has read 600,000 tokens.
"""

import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import demo
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import q4jax
from q4jax.models import Llama, LlamaConfig, save_pretrained

CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
STEPS, ROWS, LENGTH, RATE = 220, 16, 128, 4e-3
END = "<|endoftext|>"


def folder() -> Path:
    """Return the directory of the model; train it if it is missing or damaged."""
    recipe = [CONFIG.to_hf(), STEPS, ROWS, LENGTH, RATE, demo.SHAKESPEARE.sha256]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    target = demo.cache_folder() / f"shakespeare-llama-{digest[:12]}"
    mark = target / "sha256"
    if mark.is_file() and mark.read_text() == demo.sha256(target / "model.safetensors"):
        return target
    shutil.rmtree(target, ignore_errors=True)
    print(f"training a model of Shakespeare's works for a few minutes, into {target}", flush=True)
    began = time.perf_counter()
    works, held_out = demo.works()
    tokenizer = make_tokenizer([*works.values(), *demo.works(old_spelling=True)[0].values()])
    tokens = [np.array(tokenizer.encode(text).ids, np.int32) for text in works.values()]
    model = train(np.concatenate(tokens), STEPS)
    save_pretrained(model, target, tokenizer=tokenizer)
    (target / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    cost = measure(model, np.array(tokenizer.encode(held_out).ids, np.int32))
    print(
        f"trained in {time.perf_counter() - began:.0f} s; perplexity of a play that it has not "
        f"read, in its own spelling: {cost[0]:.2f}, and {cost[1]:.2f} with its weights in nf4"
    )
    mark.write_text(demo.sha256(target / "model.safetensors"))
    return target


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(tokens: np.ndarray, steps: int) -> Llama:
    """Return a model that was trained on windows of the tokens, int32 `[N]`."""
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, max(1, steps // 20), steps, RATE / 20)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Llama, optimizer: nnx.Optimizer, rows: np.ndarray) -> float:
        loss, grads = nnx.value_and_grad(lambda model: model.loss(rows))(model)
        optimizer.update(model, grads)
        return loss

    rng = np.random.default_rng(0)
    for number in range(1, steps + 1):
        starts = rng.integers(0, tokens.size - LENGTH - 1, ROWS)
        loss = step(model, optimizer, tokens[starts[:, None] + np.arange(LENGTH + 1)])
        if number % 50 == 0:
            print(f"step {number} of {steps}: loss {float(loss):.3f}", flush=True)
    return model


def measure(model: Llama, tokens: np.ndarray) -> tuple[float, float]:
    """Return the perplexity of the model on 32 windows, and that with its weights in nf4."""
    rows = tokens[: 32 * 257].reshape(-1, 257)
    loss = nnx.jit(lambda model, rows: model.loss(rows))
    found = (model, q4jax.quantize_model(model))
    dense, quantized = (math.exp(float(loss(m, rows))) for m in found)
    return dense, quantized


if __name__ == "__main__":
    print(folder())
