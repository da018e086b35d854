"""Directories of every architecture that q4jax writes, read by transformers."""

import inspect
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.models import from_pretrained, save_pretrained
from tests.support.random_weights import CASES, write_directory

# Softmax of products without a scale, and recurrences, let rounding grow.
LIMITS = {
    "gemma4_text": 1e-4,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 3e-5),
}


def load(folder, **settings):
    import torch
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    # Falcon's eager code adds its bias twice.
    how = "sdpa" if config["model_type"] == "falcon" else "eager"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=how, device_map="cpu", **settings
    )
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()  # in eval mode, bitsandbytes' CPU code computes in bfloat16
    return model


def their_logits(model, vectors):
    """Return the logits of the real tokens, `[N, vocab_size]`."""
    import torch

    mask = torch.tensor(vectors["attention_mask"], dtype=torch.long)
    ids = torch.tensor(vectors["input_ids"], dtype=torch.long)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        positions = {}  # such models count the tokens of the mask
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, **positions).logits.numpy()
    return logits[vectors["attention_mask"] == 1]


@pytest.mark.parametrize("case", CASES)
def test_our_directory_there(case, tmp_path):
    vectors = write_directory(case, tmp_path / "theirs")
    save_pretrained(from_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    expected = vectors["logits"][vectors["attention_mask"] == 1]
    found = their_logits(load(tmp_path / "ours"), vectors)
    assert np.abs(found - expected).max() <= LIMITS.get(case, 1e-5) * np.abs(expected).max()


@pytest.mark.usefixtures("correct_matmul")
# Of a 4-bit Llama 4, transformers reads no directory with dense experts, not even its own.
@pytest.mark.parametrize("case", ["gpt_oss", "granitemoe", "mixtral", "qwen3_moe"])
def test_our_quantized_mixture_there(case, tmp_path):
    """4-bit layers beside experts that are written dense."""
    vectors = write_directory(case, tmp_path / "full")
    rules = q4jax.QuantConfig(compress_statistics=False, dtype=jnp.float32)
    ours = from_pretrained(tmp_path / "full", quantization=rules)
    save_pretrained(ours, tmp_path / "ours", dense_experts=True)
    expected = their_logits(load(tmp_path / "ours"), vectors)
    ids, mask = (jnp.asarray(vectors[name]) for name in ("input_ids", "attention_mask"))
    found = nnx.jit(lambda m, ids, mask: m(ids, attention_mask=mask))(ours, ids, mask)
    found = np.asarray(found)[vectors["attention_mask"] == 1]
    assert np.abs(found - expected).max() <= LIMITS.get(case, 1e-5) * np.abs(expected).max()


def dequantize_by_definition(packed, quant_state):
    """The weight by bitsandbytes' own tables."""
    import torch
    from bitsandbytes import functional

    codes = torch.stack([packed.ravel() >> 4, packed.ravel() & 15], 1).ravel().long()
    absmax = quant_state.absmax
    if quant_state.nested:
        absmax = functional.dequantize_blockwise(absmax, quant_state.state2) + quant_state.offset
    scales = absmax.repeat_interleave(quant_state.blocksize)[: codes.numel()]
    return (quant_state.code[codes] * scales).reshape(quant_state.shape)


def matmul_by_definition(x, packed, bias=None, quant_state=None):
    """`bitsandbytes.matmul_4bit` on that weight."""
    import torch

    weight = dequantize_by_definition(packed, quant_state)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


@pytest.fixture
def correct_matmul(monkeypatch):
    """On a CPU with AVX-512, bitsandbytes 0.50.2 decodes rows that are not whole blocks wrongly."""
    import bitsandbytes
    import torch

    w = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    decoded = bitsandbytes.functional.dequantize_4bit(packed, state)
    if not torch.equal(decoded, dequantize_by_definition(packed, state)):
        monkeypatch.setattr(bitsandbytes, "matmul_4bit", matmul_by_definition)


@pytest.mark.usefixtures("correct_matmul")
@pytest.mark.parametrize("case", CASES)
def test_their_quantized_directory_here(case, tmp_path):
    """transformers keeps experts dense and quantizes every torch linear layer."""
    import torch
    from transformers import BitsAndBytesConfig

    vectors = write_directory(case, tmp_path / "full")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = load(tmp_path / "full", quantization_config=settings)
    model.save_pretrained(tmp_path / "quantized")
    ours = from_pretrained(tmp_path / "quantized")
    ids, mask = (jnp.asarray(vectors[name]) for name in ("input_ids", "attention_mask"))
    found = nnx.jit(lambda m, ids, mask: m(ids, attention_mask=mask))(ours, ids, mask)
    expected = their_logits(model, vectors)
    found = np.asarray(found)[vectors["attention_mask"] == 1]
    assert np.abs(found - expected).max() <= LIMITS.get(case, 1e-5) * np.abs(expected).max()
