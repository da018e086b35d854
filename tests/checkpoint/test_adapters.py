"""Adapters saved apart from their base, by both APIs of Orbax, and never put on another base."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from orbax.checkpoint.experimental import v1

import q4jax
from q4jax import checkpoint, checkpoint_v1


def base(seed=0, **settings):
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(nnx.Linear(256, 512, rngs=rngs), nnx.Linear(512, 64, rngs=rngs))
    return q4jax.quantize_model(model, **settings)


def adapted(model, rank=4, value=1.0):
    model = q4jax.add_lora(model, rank, 8.0)
    for layer in model.layers:
        layer.lora_b[...] = jnp.full(layer.lora_b.shape, value)
    return model


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_base_once_and_the_adapters_apart(tmp_path):
    model = adapted(base())
    checkpoint.save(tmp_path / "base", base())
    checkpoint.save(tmp_path / "adapters", checkpoint.adapter_state(model))
    assert size(tmp_path / "adapters") < size(tmp_path / "base") / 2

    fresh = checkpoint.restore(tmp_path / "base", nnx.eval_shape(base))
    fresh = q4jax.add_lora(fresh, 4, 8.0)
    tree = checkpoint.restore(tmp_path / "adapters", checkpoint.adapter_state(fresh))
    found = checkpoint.with_adapters(fresh, tree)
    same(nnx.state(found), nnx.state(model))
    assert not fresh.layers[0].lora_b[...].any()
    same(found(jnp.ones((1, 256))), model(jnp.ones((1, 256))))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: adapted(base(seed=1)), "the adapters belong to base [0-9a-f]{64}, the model has"),
        (lambda: q4jax.add_lora(base(), 4, 16.0), r"belong to settings .* \[4, 8.0, false\].* the"),
    ],
)
def test_adapters_of_another_base_are_refused(tmp_path, other, message):
    checkpoint.save(tmp_path / "c", checkpoint.adapter_state(adapted(base())))
    model = other()
    tree = checkpoint.restore(tmp_path / "c", checkpoint.adapter_state(model))
    with pytest.raises(ValueError, match=message):
        checkpoint.with_adapters(model, tree)
    target = checkpoint.adapter_state(adapted(base(), rank=2))
    with pytest.raises(ValueError, match=r"target does not match .*lora_a is .*\[256, 2\]"):
        checkpoint.restore(tmp_path / "c", target)
    with pytest.raises(ValueError, match="the model has no adapter"):
        checkpoint.adapter_state(base())


def test_the_best_steps_are_kept(tmp_path):
    model, losses = adapted(base()), [3.0, 1.0, 2.0, 4.0]
    digest = q4jax.fingerprint(model)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        best_fn=lambda metrics: metrics["loss"],
        best_mode="min",
        enable_async_checkpointing=True,
    )
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step, loss in enumerate(losses):
            for layer in model.layers:
                layer.lora_b[...] = jnp.full(layer.lora_b.shape, loss)
            state = checkpoint.adapter_state(model, base=digest)
            manager.save(step, args=checkpoint.save_args(state), metrics={"loss": loss})
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [1, 2]
        assert manager.best_step() == 1
        state = checkpoint.adapter_state(model)
        best = checkpoint.with_adapters(model, checkpoint.restore_step(manager, 1, state))
    assert float(best.layers[1].lora_b[0, 0]) == 1.0


# The v1 API


def tree(step=1):
    weight = q4jax.Params4bit.quantize(jnp.full((64, 128), float(step)), quant_type="nf4")
    return {"w": weight, "n": np.arange(3) + 2**40, "key": jax.random.key(step), "step": step}


def test_v1_and_v0_read_each_other_s_and_their_own(tmp_path):
    v1.save_checkpointables(tmp_path / "v1", checkpoint_v1.checkpointables(tree()))
    checkpoint.save(tmp_path / "v0", tree())
    for path in (tmp_path / "v1", tmp_path / "v0"):
        for target in (None, tree(2)):
            found = checkpoint_v1.restore(path, target)
            assert found["key"] == tree()["key"]
            del found["key"]
            expected = tree()
            del expected["key"]
            same(found, expected)
            assert isinstance(found["n"], np.ndarray)
    fp4 = tree() | {"w": q4jax.Params4bit.quantize(jnp.ones((64, 128)))}
    with pytest.raises(ValueError, match=r"fp4_b64_.* in target, .* nf4_b64_.* in the checkpoint"):
        checkpoint_v1.restore(tmp_path / "v1", fp4)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        checkpoint_v1.restore(tmp_path / "nowhere")
    v1.save_checkpointables(tmp_path / "other", {"state": {"a": jnp.ones(2)}})
    with pytest.raises(ValueError, match="is not a checkpoint of q4jax"):
        checkpoint_v1.restore(tmp_path / "other")


def test_v1_keeps_the_last_steps_and_saves_in_the_background(tmp_path):
    keep = v1.training.preservation_policies.LatestN(2)
    with v1.training.Checkpointer(tmp_path, preservation_policy=keep) as checkpointer:
        for step in range(4):
            saving = checkpointer.save_checkpointables_async(
                step, checkpoint_v1.checkpointables(tree(step))
            )
            assert saving.result()
        found = checkpoint_v1.restore_step(checkpointer)
        assert found["step"] == 3
        same(found["w"], tree(3)["w"])
        assert checkpoint_v1.restore_step(checkpointer, 2, tree())["step"] == 2
        with pytest.raises(FileNotFoundError, match="no step 0 in"):
            checkpoint_v1.restore_step(checkpointer, 0)


def test_v1_finds_other_arrays_under_the_same_header(tmp_path):
    parts = checkpoint_v1.checkpointables(tree())
    codes = np.array(parts["arrays"]["w.packed"])
    codes[3, 5] ^= 16
    parts["arrays"]["w.packed"] = jnp.asarray(codes)
    v1.save_checkpointables(tmp_path / "c", parts)
    with pytest.raises(ValueError, match=r"c is corrupted: w.packed, uint8\[64, 64\]"):
        checkpoint_v1.restore(tmp_path / "c")
    assert checkpoint_v1.restore(tmp_path / "c", verify=False)["step"] == 1
