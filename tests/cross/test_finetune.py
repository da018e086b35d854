"""Fifty steps of QLoRA give the losses of PEFT on bitsandbytes' layers."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax import finetune
from q4jax.finetune.base import adapt
from q4jax.finetune.placement import Placement
from q4jax.interop import peft as adapters
from q4jax.models import from_pretrained

# Rows are whole blocks, since bitsandbytes 0.50.2 decodes others wrongly on a CPU with AVX-512.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
STEPS, ROWS, LENGTH = 50, 4, 24
SETTINGS = finetune.Settings(
    model=None, steps=STEPS, batch=ROWS, length=LENGTH, rank=4, alpha=8, learning_rate=0.01
)
# Steps of about one size: larger ones let rounding grow from step to step, on either side.
KINDS = {
    "lora": {},
    "rslora": {"rslora": True, "learning_rate": 0.005},
    "dora": {"dora": True},
    "lora+": {"loraplus": 4.0, "learning_rate": 0.003},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Return a Llama that transformers has quantized with bitsandbytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=four_bit, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder / "small")
    return folder / "small"


def batches():
    """Sentences of a language with a pattern, of which some tokens are not learned."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = np.cumsum(rng.integers(1, 3, (ROWS, LENGTH + 1)), axis=1) % SIZES["vocab_size"]
        weights = (rng.random((ROWS, LENGTH)) < 0.8).astype(np.float32)
        yield tokens.astype(np.int32), weights


def our_losses(model, settings):
    optimizer, place = finetune.make_optimizer(model, settings), Placement(None)
    losses = []
    for tokens, weights in batches():
        arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
        batch = place.batch({name: array[None] for name, array in arrays.items()}, rows=1)
        losses.append(float(finetune.train_step(model, optimizer, batch, placement=place).loss))
    return np.array(losses)


def their_losses(directory, adapter, settings):
    import torch
    from peft import PeftModel
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device_map="cpu")
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
    rates = {"lr": settings.learning_rate, "weight_decay": 0.0}
    if settings.loraplus == 1.0:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **rates)
    else:
        ratio = {"loraplus_lr_ratio": settings.loraplus}
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **rates, **ratio)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    losses = []
    for tokens, weights in batches():
        ids, counted = torch.tensor(tokens.astype(np.int64)), torch.tensor(weights)
        logits = model(ids[:, :-1]).logits
        each = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
        )
        loss = (each * counted.reshape(-1)).sum() / counted.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_peft(directory, tmp_path, kind):
    settings = dataclasses.replace(SETTINGS, **KINDS[kind])
    model = adapt(from_pretrained(directory), settings)
    adapters.save_adapters(model, tmp_path / "adapter", base_model=str(directory))
    before = q4jax.fingerprint(model)
    ours = our_losses(model, settings)
    theirs = their_losses(directory, tmp_path / "adapter", settings)
    assert theirs[0] - theirs[-1] > 0.4  # it learns
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)
    assert q4jax.fingerprint(model) == before
    # And back: the trained adapter is the same model here after it was written.
    adapters.save_adapters(model, tmp_path / "trained", base_model=str(directory))
    again = adapters.load_adapters(from_pretrained(directory), tmp_path / "trained")
    ids = next(iter(batches()))[0]
    compute = nnx.jit(lambda model, ids: model(ids))
    model.eval()
    np.testing.assert_array_equal(compute(again, ids), compute(model, ids))
