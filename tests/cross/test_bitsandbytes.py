"""State dicts and files between bitsandbytes and q4jax, both ways."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.interop import bitsandbytes as bnb

CASES = [
    ("nf4", True, "uint8", "float32"),
    ("nf4", False, "bfloat16", "bfloat16"),
    ("fp4", True, "float16", "float16"),
    ("fp4", False, "float32", "bfloat16"),
]


def theirs(w, quant_type, nested, storage, bias):
    import bitsandbytes
    import torch

    out_features, in_features = w.shape
    layer = bitsandbytes.nn.Linear4bit(
        in_features,
        out_features,
        bias=bias,
        quant_type=quant_type,
        compress_statistics=nested,
        quant_storage=getattr(torch, storage),
        compute_dtype=torch.float32,
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        w,
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=nested,
        quant_storage=getattr(torch, storage),
        module=layer,
    )
    return layer.to("cpu").train()


def random(dtype, shape=(96, 128)):
    import torch

    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return w.to(getattr(torch, dtype))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("quant_type", "nested", "storage", "dtype"), CASES)
def test_their_layer_here(quant_type, nested, storage, dtype, bias, tmp_path):
    import safetensors.torch
    import torch

    layer = theirs(random(dtype), quant_type, nested, storage, bias)
    x = torch.randn((5, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer(x).numpy()
    state_dict = layer.state_dict()
    found = bnb.from_state_dict(state_dict)
    y = q4jax.matmul_4bit(jnp.asarray(x.numpy()), found["weight"], bias=found.get("bias"))
    assert np.abs(y - expected).max() <= 1e-6 * np.abs(expected).max()

    safetensors.torch.save_file(state_dict, tmp_path / "theirs")
    bnb.save_file(bnb.load_file(tmp_path / "theirs"), tmp_path / "ours", storage)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("shape", [(96, 128), (33, 62), (3, 32, 64)])
@pytest.mark.parametrize(("quant_type", "nested", "storage", "dtype"), CASES)
def test_our_weight_there(quant_type, nested, storage, dtype, shape, tmp_path):
    import bitsandbytes
    import safetensors.torch
    import torch

    w = jnp.asarray(random(dtype, shape).float().numpy(), dtype)
    weight = q4jax.Params4bit.quantize(w, 64, nested, quant_type)
    if weight.packed.size % jnp.dtype(storage).itemsize:
        storage = "uint8"
    bnb.save_file({"weight": weight}, tmp_path / "ours", storage)
    tensors = safetensors.torch.load_file(tmp_path / "ours")
    data = tensors.pop("weight")
    stats = {key.removeprefix("weight."): value for key, value in tensors.items()}
    param = bitsandbytes.nn.Params4bit.from_prequantized(data, stats, device="cpu")
    state = param.quant_state
    absmax = state.absmax
    if nested:
        absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = param.data.view(-1).view(torch.uint8).numpy()
    # Their own table on their own codes; their kernel is wrong on some shapes.
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).ravel()[: np.prod(shape)]
    decoded = state.code.numpy()[nibbles] * np.repeat(absmax.float().numpy(), 64)[: nibbles.size]
    ours = np.asarray(weight.dequantize(jnp.float32)).ravel()
    np.testing.assert_allclose(decoded, ours, rtol=2e-7, atol=1e-9)
    assert (tuple(state.shape), state.quant_type) == (shape, quant_type)


@pytest.mark.parametrize("nested", [False, True])
def test_our_layer_there_computes_the_same(nested, tmp_path):
    import torch

    w = random("float32")
    layer = theirs(w, "nf4", nested, "uint8", bias=False)
    ours = q4jax.Params4bit.quantize(jnp.asarray(w.numpy()), 64, nested, "nf4")
    written = bnb.to_state_dict({"weight": ours})
    for name, tensor in layer.state_dict().items():
        mine, their_own = written[name], tensor.numpy()
        assert (mine.dtype, mine.shape) == (their_own.dtype, their_own.shape), name
        if name == "weight":
            np.testing.assert_array_equal(mine, their_own)
    x = torch.randn((5, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer(x).numpy()
    y = q4jax.matmul_4bit(jnp.asarray(x.numpy()), ours)
    # Nested: their table is one code off for some of the scales.
    assert np.abs(y - expected).max() <= (5e-3 if nested else 1e-6) * np.abs(expected).max()


def test_the_defaults_that_differ_are_those_in_the_guide():
    import bitsandbytes
    import bitsandbytes.nn.parametrize

    def default(function, name):
        return inspect.signature(function).parameters[name].default

    assert default(q4jax.QuantState.as_dict, "packed") is True
    assert default(bitsandbytes.functional.QuantState.as_dict, "packed") is False
    assert default(q4jax.Params4bit.quantize, "quant_type") == "fp4"
    replace = bitsandbytes.nn.parametrize.replace_parameter_4bit
    assert default(replace, "quant_type") == "nf4"


def test_their_embedding_needs_a_layer_with_plain_scales():
    import bitsandbytes

    layer = bitsandbytes.nn.Embedding4bit(96, 128).to("cpu")
    packed = layer.weight.quant_state.as_dict(packed=True)
    weights = {"weight": layer.weight.data, **{f"weight.{k}": v for k, v in packed.items()}}
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    with pytest.raises(ValueError, match="weight is .*_n0_.*, the model's is .*_n256_"):
        bnb.load_state_dict(q4jax.Embedding4bit(96, 128, rngs=nnx.Rngs(0)), arrays)
    plain = q4jax.Embedding4bit(96, 128, compress_statistics=False, rngs=nnx.Rngs(0))
    loaded = bnb.load_state_dict(plain, arrays)
    codes = layer.weight.data.numpy().ravel()
    np.testing.assert_array_equal(np.ravel(loaded.weight.packed[...]), codes)


def test_a_float32_bias_and_the_dtype_of_a_result_differ():
    import bitsandbytes
    import torch

    w, x = random("float32"), random("bfloat16", (8, 128))
    bias = 8 * random("float32", (96,))
    layer = bitsandbytes.nn.Linear4bit(128, 96, quant_type="nf4", compress_statistics=False)
    layer.load_state_dict({"weight": w, "bias": bias})
    layer = layer.to("cpu")
    expected = layer(x).detach().float().numpy()
    weight = q4jax.quantize_4bit(jnp.asarray(w.numpy()), quant_type="nf4")
    inputs = jnp.asarray(x.float().numpy(), jnp.bfloat16)
    exact = jnp.asarray(bias.numpy())
    ours, rounded = (
        np.asarray(q4jax.matmul_4bit(inputs, *weight, bias=b), np.float32)
        for b in (exact, exact.astype(jnp.bfloat16))
    )
    assert np.abs(ours - expected).max() > np.abs(rounded - expected).max()

    theirs_16 = bitsandbytes.nn.Linear4bit(128, 96, compute_dtype=torch.bfloat16).to("cpu")
    ours_16 = q4jax.Linear4bit(128, 96, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert theirs_16(x.float()).dtype == torch.float32
    assert ours_16(inputs.astype(jnp.float32)).dtype == jnp.bfloat16
