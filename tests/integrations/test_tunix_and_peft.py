"""Adapters that are saved from tunix's models: PEFT computes the same with transformers'."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.integrations import tunix
from tests.integrations.tiny_tunix import TRANSFORMERS, config_of, package_of, transformers_config

IDS = np.arange(22).reshape(2, 11) * 7 % 96


def ours(model):
    from tunix.sft import utils

    mask = jnp.ones(IDS.shape, bool)
    positions = utils.build_positions_from_mask(mask)
    attention = utils.make_causal_attn_mask(mask)
    return np.asarray(nnx.jit(lambda m: m(jnp.asarray(IDS), positions, None, attention)[0])(model))


def theirs(model):
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(IDS)).logits.numpy()


def quantize_theirs(model):
    """Round the matrices of transformers' layers to nf4, each as bitsandbytes does."""
    import torch

    def rounded(w):
        return np.array(q4jax.Params4bit.quantize(jnp.asarray(w), quant_type="nf4").dequantize())

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.ndim > 1 and not name.endswith("mlp.gate.weight"):
                matrices = weight.numpy().reshape(-1, *weight.shape[-2:])
                new = np.stack([rounded(w) for w in matrices]).reshape(weight.shape)
                weight.copy_(torch.as_tensor(new))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_are_those_of_peft(name, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    their = AutoModelForCausalLM.from_config(transformers_config(name)).eval()
    their.save_pretrained(tmp_path / "model")
    _, params = package_of(name)
    start = params.create_model_from_safe_tensors(
        str(tmp_path / "model"), config_of(name), dtype=jnp.float32
    )
    np.testing.assert_allclose(ours(start), theirs(their), atol=2e-5)

    rules = [*tunix.quantization_rules(start)[:-1], q4jax.QuantRule(compress_statistics=False)]
    model = tunix.qlora_model(start, 4, 8, config=rules)
    quantize_theirs(their)
    np.testing.assert_allclose(ours(model), theirs(their), atol=2e-5)
    assert np.abs(ours(model) - ours(start)).max() > 0.1

    random = np.random.default_rng(0)
    for _, factor in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        factor[...] = jnp.asarray(random.normal(size=factor.shape) / 10, jnp.float32)
    base = theirs(their)
    tunix.save_adapters(model, tmp_path / "adapter", base_model="a/b")
    adapted = PeftModel.from_pretrained(their, tmp_path / "adapter")
    np.testing.assert_allclose(ours(model), theirs(adapted), atol=2e-5)
    assert np.abs(ours(model) - base).max() > 0.1
