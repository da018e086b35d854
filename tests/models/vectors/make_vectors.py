"""Make the vectors: results of transformers with a small model of each architecture.

    pip install "transformers>=5" torch safetensors
    python -m tests.models.vectors.make_vectors [CASE...]

One safetensors file a case: `input_ids` and `attention_mask` (two prompts, the second one shorter
and padded on the left), `logits`, and `tokens`, the prompts continued greedily. Its metadata hold
the `config.json` and the names and shapes of the tensors that transformers writes; their values
are those of `random_weights`.
"""

import inspect
import itertools
import json
import pathlib
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.models.vectors import families
from tests.support.random_weights import random_weights

HERE = pathlib.Path(__file__).parent
SEED, PROMPT, SHORTER, NEW = 7, 20, 6, 12
# The two likeliest tokens of a step are further apart than rounding could move them, in parts of
# the largest logit.
MARGIN = 1e-3

TOKENS = {"vocab_size": 96, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BASE = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def rope(**values):
    return {"rope_parameters": {"rope_theta": 10000.0, **values}}


CASES = {
    "llama": ("llama", rope(**LLAMA3) | {"attention_bias": True, "mlp_bias": True}),
    "llama_linear_tied": (
        "llama",
        rope(rope_type="linear", factor=4.0) | {"tie_word_embeddings": True},
    ),
    "llama_dynamic": (
        "llama",
        rope(rope_type="dynamic", factor=4.0) | {"max_position_embeddings": 16},
    ),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2": (
        "qwen2",
        rope(**YARN) | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": (
        "qwen3",
        rope(**YARN, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3, truncate=False)
        | {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "mixtral": ("mixtral", {"sliding_window": 7, "num_local_experts": 5}),
    "qwen2_moe": (
        "qwen2_moe",
        EXPERTS
        | {
            "shared_expert_intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 3,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        EXPERTS
        | {
            "norm_topk_prob": True,
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    **families.CASES,
}


def make(kind, changes, seed, folder):
    """Return the arrays and the metadata of a case; None if two tokens are too close to call."""
    import torch
    import transformers

    base = TOKENS if kind in families.OF_GPT else BASE
    config = transformers.AutoConfig.for_model(kind, **base | changes)
    cls = transformers.AutoModelForCausalLM
    cls.from_config(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: tensor.shape for name, tensor in load_file(file).items()}
    save_file(random_weights(shapes, seed), file, metadata={"format": "pt"})
    # Falcon's eager code adds its bias twice.
    how = "sdpa" if kind == "falcon" else "eager"
    model = cls.from_pretrained(folder, attn_implementation=how, dtype=torch.float32).eval()

    ids = np.random.default_rng(seed).integers(0, BASE["vocab_size"], (2, PROMPT))
    mask = np.ones_like(ids)
    ids[1, :SHORTER] = mask[1, :SHORTER] = 0
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    positions = {"position_ids": torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        positions = {}  # such models count the tokens of the mask
    with torch.no_grad():
        logits = model(**inputs, **positions).logits.numpy()
        out = model.generate(
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for step in out.logits:
        first, second = step.topk(2).values.T
        if not ((first - second) > MARGIN * step.abs().max()).all():
            return None
    arrays = {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "logits": logits,
        "tokens": out.sequences.numpy().astype(np.int32),
    }
    written = json.loads((folder / "config.json").read_text())
    written["dtype"] = "float32"
    metadata = {
        "transformers": transformers.__version__,
        "seed": str(seed),
        "config": json.dumps(written),
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
    }
    return arrays, metadata


def find(kind, changes):
    """Return the arrays and the metadata with the first seed that suits."""
    for seed in itertools.count(SEED):
        with tempfile.TemporaryDirectory() as folder:
            made = make(kind, changes, seed, pathlib.Path(folder))
        if made is not None:
            return made
    return None


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        arrays, metadata = find(*CASES[name])
        save_file(arrays, HERE / f"{name}.safetensors", metadata=metadata)
        print(name, np.abs(arrays["logits"]).max(), arrays["tokens"][:, PROMPT:].tolist())
