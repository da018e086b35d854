"""Tiny models of transformers for each architecture whose linear layers q4jax knows.

`python -m tests.support.tiny_transformers` writes what transformers quantizes of each to
`tests/interop/huggingface/linear_layers.json`.
"""

import json
import pathlib
import re
import tempfile

from safetensors.numpy import load_file

from q4jax.interop.huggingface.architectures import ARCHITECTURES

EXPECTED = pathlib.Path(__file__).parent.parent / "interop/huggingface/linear_layers.json"

# Sizes under all the names that configurations have for them.
_NAMES = {
    64: "hidden_size d_model n_embd dim embedding_size emb_dim max_position_embeddings n_positions",
    96: "intermediate_size d_ff hidden_dim ffn_dim encoder_ffn_dim decoder_ffn_dim",
    2: "num_hidden_layers num_layers num_decoder_layers encoder_layers decoder_layers n_layer"
    " n_layers num_key_value_heads type_vocab_size eos_token_id",
    4: "num_attention_heads num_heads encoder_attention_heads decoder_attention_heads n_head"
    " n_heads num_experts num_local_experts n_routed_experts",
    16: "d_kv head_dim",
    32: "moe_intermediate_size image_size",
    8: "state_size patch_size sliding_window attention_window",
    1: "num_hidden_groups decoder_start_token_id bos_token_id",
    128: "vocab_size",
    0: "pad_token_id",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_DROPPED = ((), ("num_key_value_heads",), ("head_dim", "num_key_value_heads"), ("sliding_window",))

_MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_MLA |= {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_MLA |= {"num_experts_per_tok": 2}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
_DELTA |= {"linear_value_head_dim": 16, "head_dim": 32}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_TEXT = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
_TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT |= {"max_position_embeddings": 64}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
_VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_LLAVA = {
    "text_config": _TEXT | {"model_type": "llama"},
    "vision_config": _VISION | {"model_type": "clip_vision_model"},
    "image_token_index": 3,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_QWEN_VISION = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32}
_QWEN_VISION |= {"num_heads": 2, "patch_size": 14}

# What a small model of a type needs besides.
EXTRA = {
    "cohere": {"use_qk_norm": True},
    "deepseek_v2": _MLA | {"q_lora_rank": None, "n_group": None, "topk_group": None},
    "deepseek_v3": _MLA | {"q_lora_rank": 24},
    "glm4_moe_lite": _MLA | {"q_lora_rank": 24},
    "glm_moe_dsa": _MLA | {"q_lora_rank": 24},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA | {"mamba_expand": 2, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
    **{key: {"head_dim": 16} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "gemma4_text": {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [96, 96],
        "activation_sparsity_pattern": [0.95, 0.0],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": _DELTA | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA | {"shared_expert_intermediate_size": 32},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "opt": {"word_embed_proj_dim": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "vipllava"), _LLAVA),
    "mistral3": {
        "text_config": _TEXT | {"model_type": "mistral", "head_dim": 16},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 16},
    },
    "paligemma": {
        "text_config": _TEXT | {"model_type": "gemma", "head_dim": 16},
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
    },
    "gemma3": {"text_config": _TEXT | {"head_dim": 16}, "vision_config": _VISION},
    **{
        key: {"text_config": _TEXT, "vision_config": _VISION, "scale_factor": 1}
        for key in ("idefics3", "smolvlm")
    },
    "qwen2_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
        "vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64},
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
        "vision_config": _QWEN_VISION | {"fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {
        "text_config": _TEXT | {"head_dim": 32},
        "vision_config": _QWEN_VISION
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_5": {
        "text_config": _TEXT | _DELTA,
        "vision_config": _QWEN_VISION | {"num_position_embeddings": 16},
    },
}


def cases():
    """Yield (model type, name of a class) for all model classes of the table's architectures."""
    from transformers.models.auto import modeling_auto

    tasks = (
        *("", "_FOR_CAUSAL_LM", "_FOR_SEQ_TO_SEQ_CAUSAL_LM", "_FOR_MASKED_LM"),
        *("_FOR_SEQUENCE_CLASSIFICATION", "_FOR_TOKEN_CLASSIFICATION", "_FOR_QUESTION_ANSWERING"),
        *("_FOR_IMAGE_TEXT_TO_TEXT", "_FOR_IMAGE_CLASSIFICATION", "_FOR_SPEECH_SEQ_2_SEQ"),
    )
    found = {}
    for task in tasks:
        mapping = getattr(modeling_auto, f"MODEL{task}_MAPPING_NAMES")
        for model_type in ARCHITECTURES:
            names = mapping.get(model_type, ())
            for name in (names,) if isinstance(names, str) else names:
                found[model_type, name] = None
    # transformers itself cannot make Falcon's 4-bit weights, nor Llama 4's experts on a CPU.
    left_out = ("falcon", "llama4_text")
    return [
        case
        for case in sorted(found)
        if case[0] not in left_out and case[1] != "Qwen3_5ForCausalLM"
    ]


def tiny(model_type, name):
    """Return a model with random weights."""
    import torch
    import transformers

    default = transformers.AutoConfig.for_model(model_type).to_dict()
    sizes = {k: v for k, v in SIZES.items() if default.get(k) is not None}
    for dropped in _DROPPED:
        settings = {k: v for k, v in sizes.items() if k not in dropped}
        try:
            config = transformers.AutoConfig.for_model(
                model_type, **settings | EXTRA.get(model_type, {})
            )
            break
        except Exception as caught:
            error = caught
    else:
        raise error
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def quantize_there(folder, model, **settings):
    """Save a model to `folder/full`; save and return its 4-bit form, in `folder/theirs`."""
    import torch
    from transformers import BitsAndBytesConfig

    model.save_pretrained(folder / "full", **settings)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    quantized = load(type(model), folder / "full", quantization_config=config)
    quantized.save_pretrained(folder / "theirs")
    return quantized


def load(model_class, folder, **settings):
    """Load a directory in float32 on the CPU."""
    import torch

    settings |= {"dtype": torch.float32, "attn_implementation": "eager", "device_map": "cpu"}
    return model_class.from_pretrained(folder, **settings)


def read(folder):
    """Return all tensors of a directory by name."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def described(folder, model):
    """Return what transformers made of each matrix in `folder`, one entry for equal layers."""
    from transformers.pytorch_utils import Conv1D

    config = json.loads((folder / "full/config.json").read_text())
    full, four_bit = read(folder / "full"), read(folder / "theirs")
    turned = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)}
    roles = {"linear": set(), "transposed": set(), "kept": set()}
    for name in (k for k, v in full.items() if k.endswith(".weight") and v.ndim == 2):
        quantized = f"{name}.absmax" in four_bit
        role = ("transposed" if name in turned else "linear") if quantized else "kept"
        roles[role].add(re.sub(r"\.\d+(?=\.)", ".0", name))
    parts = {k: v for k, v in config.items() if isinstance(v, dict) and "model_type" in v}
    heads = ("score.bias", "classifier.bias", "qa_outputs.bias")
    return {
        "config": {k: config[k] for k in ("model_type", "architectures")}
        | {k: {"model_type": part["model_type"]} for k, part in parts.items()},
        **{role: sorted(names) for role, names in roles.items()},
        "biases": sorted(k for k in full if k.endswith(heads)),
    }


WRITTEN = ("ForCausalLM", "LMHeadModel", "MaskedLM", "Generation")
WRITTEN += ("CLIPTextModel", "CLIPVisionModel", "SiglipVisionModel", "PixtralVisionModel")
WRITTEN += ("VLTextModel", "SequenceClassification", "ImageClassification", "GenerationEncoder")


def main():
    """Write the expected layers: one model with a head and one classifier of each type."""
    lines = []
    for model_type, name in cases():
        if name.endswith(WRITTEN):
            with tempfile.TemporaryDirectory() as folder:
                model = tiny(model_type, name)
                quantize_there(pathlib.Path(folder), model)
                lines.append(json.dumps(described(pathlib.Path(folder), model)))
    EXPECTED.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
