"""Which weights of each architecture bitsandbytes quantizes through transformers, as a table.

transformers replaces exactly the modules of type `torch.nn.Linear`, and those of its own `Conv1D`,
outside the output head. Names and shapes in a file do not tell them from embeddings, routers or
experts that one module holds as a parameter, so the table says it, for each `model_type`.

A name in the table is the end of a module's path: `down_proj`, or `experts.*.down_proj` where a
longer one decides otherwise; `*` is a number. Of the names that fit a path, the longest decides.
"""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The weights of one architecture, each attribute names separated by spaces.

    Attributes:
      linear: linear layers, which are quantized.
      transposed: the same with kernels `[in, out]` (`Conv1D`): quantized as `[out, in]`.
      kept: other matrices, besides `KEPT`.
      heads: linear layers that stay in full precision, besides `lm_head`, as the file names them.
      head: the output head's path in transformers, which a skip list names.
      last: the linear layer that ends a model without a head; transformers keeps the last of them.
      renamed: whether transformers' paths of linear layers differ from those in the file.
    """

    linear: str = ""
    transposed: str = ""
    kept: str = ""
    heads: str = ""
    head: str = "lm_head"
    last: str = ""
    renamed: bool = False


# Matrices that are no linear layers wherever they appear: embeddings and lookup tables, norms of
# each head, routers that are modules of their own, and experts, which are one parameter in memory.
KEPT = (
    "embed_tokens embed_positions embed_in embed_global embed_tokens_per_layer embedding embeddings"
    " word_embedding word_embeddings wte wpe shared position_embedding position_embeddings"
    " positions_embed tokens_embed token_embedding token_type_embeddings tok_embeddings pos_embed"
    " ngram_embeddings x_position_embeddings y_position_embeddings h_position_embeddings"
    " w_position_embeddings relative_attention_bias tile_embedding q_norm k_norm gate router"
    " experts.*.gate_proj experts.*.up_proj experts.*.down_proj"
)
# Heads of classifiers. transformers keeps the last parameter of a model in full precision; for a
# head with a bias that is the bias, so that its weight is quantized.
CLASSIFIERS = "score classifier qa_outputs"

_QKVO = "q_proj k_proj v_proj o_proj "
_OUT = "q_proj k_proj v_proj out_proj "
_GATED = "gate_proj up_proj down_proj "
_MIXTRAL = "experts.*.w1 experts.*.w2 experts.*.w3"
_MLA = "q_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj "
_DELTA = "in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj "
_SHARED = "shared_expert.gate_proj shared_expert.up_proj shared_expert.down_proj shared_expert_gate"
_PER_LAYER = "per_layer_input_gate per_layer_model_projection per_layer_projection "
_CONV1D = "c_attn q_attn c_proj c_fc"
_BERT = "query key value dense "
_NEOX = "query_key_value dense dense_h_to_4h dense_4h_to_h"
_XLM = "q_lin k_lin v_lin out_lin lin1 lin2 "
_ENCODER = _OUT + "fc1 fc2 "
_QWEN_VISION = "visual.blocks.*.attn.qkv visual.blocks.*.attn.proj "

_DECODERS = {
    "llama mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text vaultgemma olmo2"
    " olmo3 granite smollm3 cohere cohere2 stablelm glm4_moe exaone4 llama4_text hunyuan_v1_dense"
    " ernie4_5 ernie4_5_moe seed_oss helium cwm diffllama pixtral qwen2_vl_text qwen2_5_vl_text"
    " qwen3_vl_text qwen3_moe olmoe flex_olmo": Architecture(_QKVO + _GATED),
    "olmo": Architecture(_QKVO + _GATED, last="mlp.down_proj"),
    "mixtral phimoe minimax_m2": Architecture(_QKVO, kept=_MIXTRAL),
    "minimax": Architecture(_QKVO + "qkv_proj output_gate out_proj", kept=_MIXTRAL),
    "gpt_oss": Architecture(_QKVO),
    "granitemoe granitemoeshared granitemoehybrid": Architecture(
        _QKVO + "in_proj out_proj input_linear output_linear", kept="router.layer"
    ),
    "nemotron apertus arcee": Architecture(_QKVO + "up_proj down_proj"),
    "gemma4_text": Architecture(_QKVO + _GATED + _PER_LAYER),
    "gemma3n_text": Architecture(
        _QKVO
        + _GATED
        + _PER_LAYER
        + "altup_projections.* altup_unembed_projections.* correction_coefs prediction_coefs"
        " modality_router linear_left linear_right",
        last="altup_unembed_projections.*",
    ),
    "deepseek_v2 deepseek_v3 glm4_moe_lite": Architecture(_MLA + _GATED),
    "glm_moe_dsa": Architecture(_MLA + _GATED + "wk wq_b", kept="weights_proj"),
    "glm glm4": Architecture(_QKVO + "gate_up_proj down_proj"),
    "qwen2_moe": Architecture(_QKVO + _GATED + _SHARED),
    "qwen3_next": Architecture(_QKVO + _GATED + _SHARED + " in_proj_qkvz in_proj_ba out_proj"),
    "qwen3_5_text": Architecture(_QKVO + _GATED + _DELTA),
    "qwen3_5_moe_text": Architecture(_QKVO + _GATED + _DELTA + _SHARED),
    "hunyuan_v1_moe": Architecture(_QKVO + _GATED + "wg"),
    "phi": Architecture("q_proj k_proj v_proj dense fc1 fc2"),
    "phi3": Architecture("qkv_proj o_proj gate_up_proj down_proj"),
    "starcoder2": Architecture(_QKVO + "c_fc c_proj"),
    "lfm2": Architecture(_OUT + "in_proj w1 w2 w3"),
    "falcon_h1 bamba": Architecture(_QKVO + _GATED + "in_proj out_proj"),
    "jamba": Architecture(_QKVO + _GATED + "in_proj out_proj dt_proj x_proj"),
    "mamba falcon_mamba": Architecture("in_proj out_proj dt_proj x_proj"),
    "mamba2": Architecture("in_proj out_proj"),
    "nemotron_h": Architecture(
        _QKVO + "up_proj down_proj in_proj out_proj fc1_latent_proj fc2_latent_proj", renamed=True
    ),
    "doge": Architecture(_QKVO + _GATED + "dt_proj router_gate"),
    "gpt2 openai-gpt imagegpt": Architecture("summary", transposed=_CONV1D),
    # Falcon's linear layers are of a class of its own, which transformers does not replace.
    "falcon": Architecture(kept=_NEOX),
    "gpt_neox": Architecture(_NEOX, heads="embed_out"),
    "gpt_neox_japanese": Architecture(_NEOX, heads="embed_out", head="embed_out"),
    "bloom persimmon": Architecture(_NEOX),
    "gpt_bigcode": Architecture("c_attn q_attn c_proj c_fc"),
    "gpt_neo": Architecture(_OUT + "c_fc c_proj"),
    "gptj": Architecture(_OUT + "fc_in fc_out"),
    "codegen": Architecture("qkv_proj out_proj fc_in fc_out"),
    "mpt": Architecture("Wqkv out_proj up_proj down_proj"),
    "opt xglm": Architecture(_ENCODER + "project_in project_out"),
    "biogpt": Architecture(_ENCODER, heads="output_projection", head="output_projection"),
}

_ENCODERS = {
    "bert ernie megatron-bert layoutlm big_bird": Architecture(
        _BERT + "pooler out_proj seq_relationship",
        heads="predictions.decoder",
        head="predictions.decoder",
    ),
    "squeezebert rembert": Architecture(
        _BERT + "embedding_hidden_mapping_in",
        heads="predictions.decoder",
        head="predictions.decoder",
    ),
    "fnet": Architecture(
        "dense projection seq_relationship", heads="predictions.decoder", head="predictions.decoder"
    ),
    "roberta roberta-prelayernorm camembert xlm-roberta xlm-roberta-xl data2vec-text"
    " bert-generation": Architecture(
        _BERT + "out_proj", heads="lm_head.decoder", head="lm_head.decoder"
    ),
    "longformer": Architecture(
        _BERT + "out_proj query_global key_global value_global",
        heads="lm_head.decoder",
        head="lm_head.decoder",
    ),
    "mpnet": Architecture(
        "q k v o dense out_proj", heads="lm_head.decoder", head="lm_head.decoder"
    ),
    "albert": Architecture(
        _BERT + "embedding_hidden_mapping_in ffn ffn_output pooler",
        heads="predictions.decoder",
        head="predictions.decoder",
    ),
    "electra": Architecture(
        _BERT + "embeddings_project out_proj summary dense_prediction",
        heads="generator_lm_head",
        head="generator_lm_head",
    ),
    "distilbert": Architecture(
        _XLM + "pre_classifier vocab_transform", heads="vocab_projector", head="vocab_projector"
    ),
    "deberta": Architecture(
        "in_proj pos_proj pos_q_proj dense",
        heads="predictions.decoder",
        head="predictions.decoder",
    ),
    "deberta-v2": Architecture(
        "query_proj key_proj value_proj pos_key_proj pos_query_proj dense",
        heads="predictions.decoder",
        head="predictions.decoder",
    ),
    "modernbert": Architecture("Wqkv Wi Wo dense", heads="decoder", head="decoder"),
    "eurobert": Architecture(_QKVO + _GATED + "dense"),
}

_SEQUENCE_TO_SEQUENCE = {
    # transformers keeps `wo` of these three in float32.
    "t5 mt5 umt5": Architecture("q k v o wi wi_0 wi_1 dense out_proj", kept="wo"),
    "longt5": Architecture("q k v o wi wi_0 wi_1 wo"),
    "bart mbart mvp plbart pegasus pegasus_x marian m2m_100 blenderbot blenderbot-small"
    " speech_to_text": Architecture(_ENCODER + "dense"),
    "led": Architecture(
        _ENCODER + "query key value query_global key_global value_global output dense"
    ),
    "bigbird_pegasus": Architecture(_ENCODER + "query key value output dense"),
    "whisper": Architecture(_ENCODER + "projector", heads="proj_out", head="proj_out"),
}

_VISION = {
    "clip_text_model clip_vision_model": Architecture(_ENCODER),
    # The pooling head's attention is `torch.nn.MultiheadAttention`, whose `out_proj` is no Linear.
    "siglip_vision_model": Architecture(_ENCODER, kept="head.attention.out_proj"),
    "vit deit beit": Architecture(
        _BERT + _QKVO + "fc1 fc2 cls_classifier distillation_classifier", renamed=True
    ),
    "dinov2 dinov2_with_registers": Architecture(_BERT + "fc1 fc2", renamed=True),
}

# The parts of these are looked up too, under the `model_type` of each config in theirs.
_IMAGES_AND_TEXT = {
    "llava llava_next llava_onevision vipllava": Architecture("linear_1 linear_2", renamed=True),
    "mistral3": Architecture("linear_1 linear_2 merging_layer", renamed=True),
    "paligemma": Architecture("multi_modal_projector.linear", renamed=True),
    "gemma3": Architecture(renamed=True),
    "idefics3 smolvlm": Architecture(_QKVO + _GATED + _ENCODER + "modality_projection.proj"),
    "qwen2_vl qwen2_5_vl": Architecture(
        _QKVO + _GATED + _QWEN_VISION + "fc1 fc2 mlp.*", renamed=True
    ),
    "qwen3_vl": Architecture(_QKVO + _GATED + _QWEN_VISION + "linear_fc1 linear_fc2"),
    "qwen3_5": Architecture(_QKVO + _GATED + _DELTA + _QWEN_VISION + "linear_fc1 linear_fc2"),
}


def _each(*tables: dict[str, Architecture]) -> Iterator[tuple[str, Architecture]]:
    for table in tables:
        for model_types, architecture in table.items():
            for model_type in model_types.split():
                yield model_type, architecture


ARCHITECTURES: dict[str, Architecture] = dict(
    _each(_DECODERS, _ENCODERS, _SEQUENCE_TO_SEQUENCE, _VISION, _IMAGES_AND_TEXT)
)
"""`model_type` of `config.json` -> the architecture."""
