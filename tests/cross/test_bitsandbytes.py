"""State dicts and files between bitsandbytes and q4jax, both ways."""

import jax.numpy as jnp
import numpy as np
import pytest

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
