"""Whole models and adapters between transformers, PEFT and q4jax, both ways."""

import itertools
import random

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.interop import peft as adapters
from q4jax.models import from_pretrained, save_pretrained

IDS = np.arange(34).reshape(2, 17) * 7 % 320
# Of the largest logit. bfloat16: both sides round after each of some twenty steps.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.5e-2}


def llama(tied, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def bnb_config(dtype, **settings):
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, dtype), **settings
    )


def load(path, dtype, config=None):
    import torch
    from transformers import AutoModelForCausalLM

    settings = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), device_map="cpu", **settings
    )
    return model.train()  # in eval mode, bitsandbytes' CPU code computes in bfloat16


def their_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def our_logits(model):
    logits = nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray(IDS))
    return np.asarray(logits.astype(jnp.float32))


def assert_close(ours, theirs, dtype):
    assert np.abs(ours - theirs).max() <= TOLERANCE[dtype] * np.abs(theirs).max()
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    assert same == 1 if dtype == "float32" else same >= 0.95, same


@pytest.mark.parametrize(
    ("tied", "dtype", "settings"),
    [
        (False, "float32", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        (True, "float32", {"bnb_4bit_quant_type": "fp4"}),
        (False, "bfloat16", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}),
        (True, "bfloat16", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
    ],
)
def test_their_model_here(tmp_path, tied, dtype, settings):
    llama(tied, dtype).save_pretrained(tmp_path / "full")
    model = load(tmp_path / "full", dtype, bnb_config(dtype, **settings))
    model.save_pretrained(tmp_path / "quantized")
    ours = from_pretrained(tmp_path / "quantized")
    assert ours.embed_tokens.dtype == dtype
    assert_close(our_logits(ours), their_logits(model), dtype)


@pytest.mark.parametrize(
    ("tied", "dtype", "storage", "shard_bytes"),
    [(False, "float32", "uint8", 10**9), (True, "bfloat16", "bfloat16", 100_000)],
)
def test_our_model_there(tmp_path, tied, dtype, storage, shard_bytes):
    llama(tied, dtype).save_pretrained(tmp_path / "full")
    settings = q4jax.QuantConfig(quant_type="nf4", compress_statistics=False)
    ours = from_pretrained(tmp_path / "full", quantization=settings)
    save_pretrained(ours, tmp_path / "ours", shard_bytes, quant_storage=storage)
    model = load(tmp_path / "ours", dtype)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.lm_head).__name__ == "Linear"
    assert_close(our_logits(ours), their_logits(model), dtype)


def their_adapters(model, **settings):
    import peft
    import torch

    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        **settings,
    )
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_both_ways(tmp_path, rslora):
    import peft

    llama(False, "float32").save_pretrained(tmp_path / "full")
    settings = {"bnb_4bit_quant_type": "nf4"}
    model = load(tmp_path / "full", "float32", bnb_config("float32", **settings))
    model.save_pretrained(tmp_path / "base")
    base = from_pretrained(tmp_path / "base")

    adapted = their_adapters(model, use_rslora=rslora)
    adapted.save_pretrained(tmp_path / "theirs")
    expected = their_logits(adapted)
    ours = adapters.load_adapters(base, tmp_path / "theirs")
    assert np.abs(expected - our_logits(base)).max() > 0.1  # the adapters do something
    assert_close(our_logits(ours), expected, "float32")

    adapters.save_adapters(ours, tmp_path / "ours", base_model=str(tmp_path / "base"))
    fresh = load(tmp_path / "base", "float32")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").train()
    assert_close(our_logits(ours), their_logits(again), "float32")


def test_skip_lists_keep_what_transformers_keeps():
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = ["model", "layers", "1", "11", "mlp", "up_proj", "gate", "gate_proj", "lm_head"]
    rng = random.Random(5)
    paths = {".".join(rng.choices(names, k=rng.randint(1, 4))) for _ in range(200)}
    entries = {
        ".".join(rng.choices([*names, ".*", r"\d+"], k=rng.randint(1, 3))) for _ in range(200)
    }
    entries |= {"layers.1.", "proj", "del", "model.layers.1|lm_head", "model.layers.1.mlp.*"}
    kept = 0
    for entry, path in itertools.product(entries, paths):
        ours = q4jax.QuantConfig(skip=(entry,)).skips(path) is not None
        theirs = not should_convert_module(path, [entry])
        # Here an entry may stand within a path, too.
        assert ours == (theirs or f".{entry}." in f".{path}."), (entry, path)
        kept += theirs
    assert kept > 1000
