"""tunix's trainers on its own models in 4 bits: the numbers, and what is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import q4jax
from q4jax.integrations import tunix
from q4jax.nnx.variables import Frozen4bit
from tests.integrations.tiny_tunix import class_of, config_of

RANK, ALPHA, RATE = 4, 8, 0.5
IDS = np.random.default_rng(0).integers(0, 96, (3, 2, 12)).astype(np.int32)
MASK = np.ones((2, 12), bool)
MASK[1, 9:] = False


def make_model(name):
    """A model with random weights; tunix's own start is zero in the MLP."""
    model = class_of(name)(config_of(name), rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    for _, weight in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        weight[...] = jnp.asarray(random.normal(size=weight.shape) / 10, jnp.float32)
    return model


def frozen_bytes(model):
    """Every array that is no adapter, as bytes."""
    rest = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    return {path: np.asarray(v[...]).tobytes() for path, v in rest if v.shape is not None}


def adapters_of(model):
    """(lora_a, lora_b) by the path of the weight that they adapt."""
    state = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    found = {}
    for (*path, name), value in state:
        found.setdefault(tuple(path), {})[name] = value[...]
    return found


# The update `[in, out]` of a weight in the weight's own shape.
SHAPES = {
    "q_einsum": lambda d, s: d.reshape(64, 4, 16).transpose(1, 0, 2),
    "kv_einsum": lambda d, s: d.reshape(64, 2, 2, 16).transpose(1, 2, 0, 3),
}


def by_hand(dense):
    """The logits of the dense model with updated weights, as a function of the adapters."""
    graph, params, rest = nnx.split(dense, nnx.Param, ...)
    params = dict(nnx.to_flat_state(params))

    def logits(adapters, *args):
        new = dict(params)
        for path, factors in adapters.items():
            leaf = path[-1] if path[-1] == "w" else "kernel"
            at = path if leaf == "w" else (*path, leaf)
            name = at[-2]
            delta = factors["lora_a"] @ factors["lora_b"] * (ALPHA / RANK)
            shape = new[at].shape
            delta = SHAPES.get(name, lambda d, s: d.reshape(s))(delta, shape)
            new[at] = new[at].replace(new[at][...] + delta)
        model = nnx.merge(graph, nnx.from_flat_state(new), rest)
        return model(*args)[0]

    return logits


def inputs(ids, mask):
    from tunix.sft import utils

    return {
        "input_tokens": ids,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma2"])
def test_peft_trainer_takes_the_steps_of_the_dequantized_model(name):
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    model = tunix.qlora_model(make_model(name), RANK, ALPHA)
    adapters = adapters_of(model)
    # The adapters are zero, so what is merged is the dequantized weights.
    logits = by_hand(q4jax.merge_lora(model))
    before = frozen_bytes(model)
    assert sum(isinstance(v, Frozen4bit) for _, v in nnx.to_flat_state(nnx.state(model))) > 30

    def loss(adapters, batch):
        found = logits(
            adapters, batch["input_tokens"], batch["positions"], None, batch["attention_mask"]
        )
        each = optax.softmax_cross_entropy_with_integer_labels(
            found[:, :-1], batch["input_tokens"][:, 1:]
        )
        return (each * MASK[:, 1:]).sum() / MASK[:, 1:].sum()

    expected, step = [], jax.jit(jax.value_and_grad(loss))
    for ids in IDS:
        value, grads = step(adapters, inputs(ids, MASK))
        adapters = jax.tree.map(lambda w, g: w - RATE * g, adapters, grads)
        expected.append(value)

    trainer = PeftTrainer(
        model, optax.sgd(RATE), TrainingConfig(eval_every_n_steps=100, max_steps=3)
    ).with_gen_model_input_fn(lambda batch: inputs(batch.input_tokens, batch.input_mask))
    trainer.train([TrainingInput(input_tokens=ids, input_mask=MASK) for ids in IDS])
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    assert frozen_bytes(model) == before
    for path, factors in adapters_of(model).items():
        for kind, value in factors.items():
            np.testing.assert_allclose(value, adapters[path][kind], rtol=2e-3, atol=2e-5)
    assert max(float(jnp.abs(f["lora_b"]).max()) for f in adapters.values()) > 5e-3


def test_dpo_trainer_takes_the_steps_of_the_formula():
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

    start = make_model("llama3")
    reference = q4jax.quantize_model(start, tunix.quantization_rules(start))
    model = q4jax.add_lora(reference, RANK, ALPHA)
    before = frozen_bytes(model), frozen_bytes(reference)
    logits, adapters = by_hand(q4jax.dequantize_model(reference)), adapters_of(model)
    prompt, chosen, rejected = IDS[0, :, :6], IDS[1, :, :5], IDS[2, :, :5]
    beta = 2.0

    def log_probabilities(adapters, answer):
        batch = inputs(np.concatenate([prompt, answer], 1), np.ones((2, 11), bool))
        found = logits(
            adapters, batch["input_tokens"], batch["positions"], None, batch["attention_mask"]
        )
        each = optax.softmax_cross_entropy_with_integer_labels(found[:, 5:10], answer)
        return -each.sum(-1)

    def loss(adapters):
        margin = 0.0
        for answer, sign in ((chosen, 1), (rejected, -1)):
            against = jax.lax.stop_gradient(log_probabilities({}, answer))
            margin += sign * (log_probabilities(adapters, answer) - against)
        return jnp.logaddexp(0.0, -beta * margin).mean()

    expected, step = [], jax.jit(jax.value_and_grad(loss))
    for _ in range(2):
        value, grads = step(adapters)
        adapters = jax.tree.map(lambda w, g: w - 0.2 * g, adapters, grads)
        expected.append(value)
    np.testing.assert_allclose(expected[0], np.log(2), rtol=1e-5)
    assert expected[1] < expected[0] - 1e-3

    ones = np.ones((2, 6), np.int32)
    batch = TrainingInput(
        prompt_ids=prompt,
        prompt_mask=ones,
        chosen_ids=chosen,
        chosen_mask=ones[:, :5],
        rejected_ids=rejected,
        rejected_mask=ones[:, :5],
    )
    config = DPOTrainingConfig(eval_every_n_steps=100, max_steps=2, beta=beta)
    trainer = DPOTrainer(model, reference, optax.sgd(0.2), config)
    trainer.train([batch, batch])
    losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
    np.testing.assert_allclose(losses, expected, rtol=5e-5)
    assert (frozen_bytes(model), frozen_bytes(reference)) == before


def test_what_stays_in_full_precision():
    model = make_model("qwen3_moe")
    plan = q4jax.plan_quantization(model, tunix.quantization_rules(model))
    kept = {d.path.removeprefix("layers.0.") for d in plan.kept if "layers.1." not in d.path}
    assert kept == {"embedder", "lm_head", "mlp.router"}
    small = q4jax.quantize_model(model, tunix.quantization_rules(model))
    assert small.layers[0].mlp.gate_proj.shape == (4, 64, 64)
    assert q4jax.memory_report(small).quantized_weights == 2 * (3 * 64**2 * 4 + 4 * 64 * 48)
