"""Every kind of LoRA adapter that PEFT writes: its logits here, and ours there."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import q4jax
from q4jax.interop import peft as adapters
from q4jax.models import from_pretrained
from tests.models.vectors import families, make_vectors

IDS = np.arange(34).reshape(2, 17) * 7 % 96
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"num_experts": 4, "head_dim": 16}),
}
# Other names of modules, stacks that mix, and parts beside attention and MLP.
FAMILIES = [
    "gemma3_text",
    "gemma4_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "falcon_new",
    "opt",
    "bloom",
    "mpt",
    "gpt_oss",
    "llama4_text",
    "granitemoe",
    "deepseek_v3",
    "qwen3_next",
    "qwen2_moe_dense_layers",
]
MODELS |= {name: families.CASES[name] for name in FAMILIES}


def their_model(path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")

    def write(name):
        if not (folder / name).exists():
            kind, settings = MODELS[name]
            torch.manual_seed(0)
            sizes = make_vectors.BASE if name in FAMILIES else SIZES
            sizes = make_vectors.TOKENS if kind in families.OF_GPT else sizes
            config = AutoConfig.for_model(kind, **(sizes | settings))
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        return folder / name

    return write


def their_adapters(model, **settings):
    """An adapter with random weights, none of them zero."""
    import peft
    import torch

    settings = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | settings
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def their_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def our_logits(model):
    return np.asarray(nnx.jit(lambda model, ids: model(ids))(model, jnp.asarray(IDS)))


def assert_close(found, expected):
    error, largest = np.abs(found - expected).max(), np.abs(expected).max()
    assert error <= 1e-5 * largest, (error, largest)


def read_there(base, path):
    """PEFT's model of a directory; a warning of missing or unexpected keys is an error."""
    import peft

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(their_model(base), path)
    said = [str(w.message) for w in caught]
    assert not [text for text in said if "missing" in text or "unexpected" in text], said
    return model.eval()


Q, MLP = ["q_proj"], ["q_proj", "down_proj"]
LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
READ = {
    "linear": ("llama", {"target_modules": MLP}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "biases of the base": ("qwen2", {"target_modules": "all-linear", "use_rslora": True}),
    "regex of modules": ("llama", {"target_modules": r".*layers\.[02]\..*(q|v)_proj"}),
    "the head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "the head alone": ("llama", {"target_modules": ["lm_head"]}),
    "the embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "a tied embedding": (
        "tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "some layers": ("llama", {"target_modules": MLP, "layers_to_transform": [1]}),
    "some layers by name": ("llama", {"target_modules": LAYERS}),
    "excluded modules": (
        "llama",
        {"target_modules": MLP, "exclude_modules": r".*\.1\.self_attn.*"},
    ),
    "ranks by regex": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {
                ".*q_proj": 2,
                r"layers\.[01]\.mlp\..*": 8,
                "^model.layers.1.*k_proj": 3,
            },
            "alpha_pattern": {r"^model\.layers\.2\..*down_proj": 5, "k_proj|q_proj": 7},
        },
    ),
    "ranks with rslora": (
        "llama",
        {"target_modules": MLP, "rank_pattern": {"0.*q_proj": 2}, "use_rslora": True},
    ),
    "gaussian": ("llama", {"target_modules": Q, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": Q, "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": Q, "init_lora_weights": "mica"}),
    "dora": ("llama", {"target_modules": MLP, "use_dora": True}),
    "dora with biases": ("qwen2", {"target_modules": "all-linear", "use_dora": True}),
    "dora on some layers": ("llama", {"target_modules": LAYERS, "use_dora": True}),
    "whole modules": (
        "llama",
        {"target_modules": Q, "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "whole modules of layers": (
        "qwen2",
        {"target_modules": Q, "modules_to_save": ["input_layernorm", "1.self_attn.v_proj"]},
    ),
    "parameters of linear layers": (
        "llama",
        {"target_modules": [], "target_parameters": ["q_proj.weight"], "alpha_pattern": {".*t": 3}},
    ),
    "all-linear of mixtral": ("mixtral", {"target_modules": "all-linear"}),
    "all-linear of qwen2_moe": ("qwen2_moe", {"target_modules": "all-linear"}),
    "all-linear of qwen3_moe": ("qwen3_moe", {"target_modules": "all-linear"}),
    "experts": ("mixtral", {"target_modules": Q, "target_parameters": [GATE_UP, DOWN]}),
    "experts, one parameter": ("mixtral", {"target_modules": Q, "target_parameters": [DOWN]}),
    "experts, the other": ("qwen2_moe", {"target_modules": [], "target_parameters": [GATE_UP]}),
    "experts of some layers": (
        "qwen3_moe",
        {
            "target_modules": Q,
            "target_parameters": ["1.mlp.experts.gate_up_proj", "2.mlp.experts.down_proj"],
        },
    ),
    "experts with ranks": (
        "mixtral",
        {
            "target_modules": Q,
            "target_parameters": [GATE_UP, DOWN, "gate.weight"],
            "rank_pattern": {r".*1\.mlp.*gate_up_proj": 3, "gate.weight": 1},
            "alpha_pattern": {r"layers\.2\..*": 5},
            "use_rslora": True,
        },
    ),
    "experts of gpt_oss": ("gpt_oss", {"target_modules": Q, "target_parameters": [GATE_UP, DOWN]}),
    "experts of llama4_text": (
        "llama4_text",
        {
            "target_modules": Q,
            "target_parameters": [
                "feed_forward.experts.gate_up_proj",
                "feed_forward.experts.down_proj",
            ],
        },
    ),
    "experts of granitemoe": (
        "granitemoe",
        {
            "target_modules": Q,
            "target_parameters": [
                "block_sparse_moe.experts.gate_up_proj",
                "block_sparse_moe.experts.down_proj",
            ],
        },
    ),
    **{
        f"all-linear of {name}": (name, {"target_modules": "all-linear"})
        for name in FAMILIES
        if name != "llama4_text"  # whose router PEFT adapts but cannot run
    },
}


@pytest.mark.parametrize("kind", READ)
def test_their_adapter_here_and_back(kind, directories, tmp_path):
    name, settings = READ[kind]
    base = directories(name)
    theirs = their_adapters(their_model(base), **settings)
    expected = their_logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")

    plain = from_pretrained(base)
    ours = adapters.load_adapters(plain, tmp_path / "theirs")
    assert np.abs(expected - our_logits(plain)).max() > 0.01 * np.abs(expected).max()
    assert_close(our_logits(ours), expected)

    adapters.save_adapters(ours, tmp_path / "ours")
    assert_close(their_logits(read_there(base, tmp_path / "ours")), expected)
    again = adapters.load_adapters(plain, tmp_path / "ours")
    np.testing.assert_array_equal(our_logits(again), our_logits(ours))


REFUSED = {
    "biases": ({"target_modules": Q, "bias": "all"}, "bias='all'"),
    "biases of adapted layers": ({"target_modules": Q, "bias": "lora_only"}, "bias='lora_only'"),
    "biases of adapters": ({"target_modules": Q, "lora_bias": True}, "lora_bias=True"),
    "tokens": ({"target_modules": Q, "trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "pissa": ({"target_modules": Q, "init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "olora": ({"target_modules": Q, "init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "replication": (
        {"target_modules": Q, "layer_replication": [(0, 2), (1, 3)]},
        "layer_replication",
    ),
    "dora of embeddings": (
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        "use_dora",
    ),
    "activated": (
        {"target_modules": Q, "alora_invocation_tokens": [1]},
        "alora_invocation_tokens",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_by_name(kind, directories, tmp_path):
    settings, message = REFUSED[kind]
    base = directories("qwen2")
    their_adapters(their_model(base), **settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(NotImplementedError, match=message):
        adapters.load_adapters(from_pretrained(base), tmp_path / "theirs")


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("use_bdlora", lambda peft: peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=Q)),
        ("velora_config", lambda peft: peft.tuners.lora.config.VeloraConfig()),
        ("kasa_config", lambda peft: peft.tuners.lora.config.KasaConfig()),
        ("monteclora_config", lambda peft: peft.tuners.lora.config.MontecloraConfig()),
        ("arrow_config", lambda peft: peft.tuners.lora.config.ArrowConfig()),
        ("use_qalora", lambda peft: True),
        ("megatron_config", lambda peft: {"a": 1}),
    ],
)
def test_variants_are_refused_by_the_field_of_their_config(field, make, directories, tmp_path):
    import peft

    theirs = their_adapters(their_model(directories("llama")), target_modules=Q)
    theirs.save_pretrained(tmp_path)
    config = peft.LoraConfig(target_modules=Q, r=4, **{field: make(peft)})
    config.save_pretrained(tmp_path / "config")
    written = json.loads((tmp_path / "config" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | {"peft_type": "LORA"}))
    with pytest.raises(NotImplementedError, match=field):
        adapters.load_adapters(from_pretrained(directories("llama")), tmp_path)


def test_every_field_of_the_config_is_known():
    import dataclasses

    import peft

    from q4jax.interop.peft import config

    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert fields <= {*config._UNSUPPORTED, *config._IGNORED, *config._READ}


def fill(model):
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, q4jax.lora.Adapter):
            for v in (module.lora_a, module.lora_b):
                v[...] = jnp.asarray(rng.normal(size=v.shape) * 0.2, v.dtype)
    return model


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ("lm_head",)),
        ("llama", ("q_proj", "embed_tokens")),
        ("tied", ("embed_tokens",)),
        ("qwen2", ("layers",)),
        ("mixtral", None),
        ("mixtral", ("gate", "down_proj")),
        ("qwen2_moe", ("layers",)),
        ("qwen3_moe", ("up_proj", "q_proj")),
        ("gpt_oss", None),
        ("llama4_text", ("experts", "q_proj")),
        ("granitemoe", ("experts", "q_proj")),
    ],
)
def test_our_adapter_there(name, targets, four_bit, directories, tmp_path):
    base = from_pretrained(directories(name))
    if targets is None or four_bit:
        adapted = q4jax.add_lora(q4jax.quantize_model(base), 4, 12, targets=targets)
        fill(adapted)
        adapters.save_adapters(adapted, tmp_path / "ours")
        ours = adapters.load_adapters(base, tmp_path / "ours")
    else:
        ours = fill(q4jax.add_lora(base, 4, 12, targets=targets))
        adapters.save_adapters(ours, tmp_path / "ours")
    there = read_there(directories(name), tmp_path / "ours")
    assert_close(our_logits(ours), their_logits(there))
