"""Named adapters: one program for all, nothing lost on a switch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax


@pytest.fixture
def base():
    rngs = nnx.Rngs(0)
    return q4jax.quantize_model(
        nnx.Dict(up=nnx.Linear(64, 128, rngs=rngs), down=nnx.Linear(128, 64, rngs=rngs))
    )


X = jax.random.normal(jax.random.key(1), (4, 64))


def trained(model, seed):
    for i, layer in enumerate((model.up, model.down)):
        key = jax.random.key(10 * seed + i)
        layer.lora_b[...] = jax.random.normal(key, layer.lora_b.shape, layer.lora_b.dtype)
    return model


def plain(model):
    return model.down(model.up(X))


def test_switching_compiles_nothing_again(base):
    traces = 0

    @nnx.jit
    def run(model):
        nonlocal traces
        traces += 1
        return plain(model)

    model = q4jax.add_lora(base, rank=8, alpha=16)
    others = [
        trained(q4jax.add_lora(base, rank=8, alpha=16), 1),
        trained(q4jax.add_lora(base, rank=4, alpha=4), 2),
        trained(q4jax.add_lora(base, rank=2, alpha=3, rslora=True, param_dtype=jnp.bfloat16), 3),
    ]
    bank = q4jax.AdapterBank(model)
    for i, other in enumerate(others):
        bank.add(str(i), other)
    bank.add("new")
    assert list(bank) == ["default", "0", "1", "2", "new"] and len(bank) == 5
    for name in ("0", "1", "2", "0"):
        bank.switch(name)
        assert bank.active == name
        expected = np.asarray(plain(others[int(name)]))
        np.testing.assert_allclose(run(model), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    for name in ("default", "new"):
        bank.switch(name)
        np.testing.assert_array_equal(run(model), run(q4jax.add_lora(base, rank=8, alpha=16)))
    assert traces == 1


def test_what_was_trained_is_kept(base):
    model = q4jax.add_lora(base, rank=8, alpha=16)
    bank = q4jax.AdapterBank(model, "prose")
    bank.add("verse", rngs=nnx.Rngs(5))
    assert not np.array_equal(model.up.lora_a[...], bank._kept["verse"]["up"][0])
    before = plain(trained(model, 1))
    bank.switch("verse")
    after = plain(trained(model, 2))
    bank.switch("prose")
    np.testing.assert_array_equal(plain(model), before)
    bank.switch("verse")
    np.testing.assert_array_equal(plain(model), after)
    bank.remove("prose")
    assert list(bank) == ["verse"]


def test_refusals(base):
    model = q4jax.add_lora(base, rank=4, alpha=16)
    bank = q4jax.AdapterBank(model, "a")
    with pytest.raises(ValueError, match=r"no adapter is named 'b', but \['a'\]"):
        bank.switch("b")
    with pytest.raises(ValueError, match=r"named 'a' already: \['a'\]"):
        bank.add("a")
    with pytest.raises(ValueError, match="'a' is active"):
        bank.remove("a")
    with pytest.raises(ValueError, match="no adapter is named 'b'"):
        bank.remove("b")
    with pytest.raises(ValueError, match=r"down: an adapter .* and rank 8 does not fit .* rank 4"):
        bank.add("b", q4jax.add_lora(base, rank=8, alpha=16))
    with pytest.raises(ValueError, match=r"only one of the two .* an adapter at \['down'\]"):
        bank.add("b", q4jax.add_lora(base, rank=4, alpha=16, targets=("up",)))
    with pytest.raises(ValueError, match="the model has no adapter"):
        bank.add("b", base)
    with pytest.raises(ValueError, match="the model has no adapter"):
        q4jax.AdapterBank(base)
    assert list(bank) == ["a"]
