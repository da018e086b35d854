"""Make the description of a decoder from the entries of a `config.json` and the table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder import config_values as values
from q4jax.models.decoder.activations import ACTIVATIONS
from q4jax.models.decoder.describe_mixers import Mixers
from q4jax.models.decoder.entries import Entries
from q4jax.models.decoder.families import FAMILIES, Family, Mixture
from q4jax.models.decoder.families.default_entries import default_entries
from q4jax.models.decoder.families.family import evaluate, evaluate_all
from q4jax.models.decoder.mixer_spec import DeltaNet, Norm
from q4jax.models.decoder.spec import MLP, Decoder, Experts, Layer

# Entries that are served at these values only, in every family.
_FIXED: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "is_decoder": (False, True, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
}
# Entries that change no result of a model that is not being trained: numbers of tokens, dropout,
# losses of routers, initial values, and what other entries decide.
IRRELEVANT = frozenset(
    (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "eod_token_id",
        "use_cache",
        "initializer_range",
        "init_std",
        "init_device",
        "attention_dropout",
        "attn_pdrop",
        "resid_pdrop",
        "emb_pdrop",
        "embd_pdrop",
        "dropout",
        "hidden_dropout",
        "embedding_dropout",
        "residual_dropout",
        "classifier_dropout",
        "layerdrop",
        "embedding_fraction",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "input_jitter_noise",
        "num_nextn_predict_layers",
        "moe_norm_min",
        "norm_topk_prob",
        "norm_type",
        "learned_pos_emb",
        "slow_but_exact",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "max_window_layers",
        "num_experts",
        "moe_intermediate_size",
        "top_k_experts",
        "vocab_size_per_layer_input",
        "model_type",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "quantization_config",
        "auto_map",
        "_name_or_path",
    )
)


def family_of(entries: Mapping[str, Any]) -> Family:
    """Return the table's entry for a `config.json`.

    Raises:
      NotImplementedError: the table has none.
    """
    name = entries.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise NotImplementedError(
            f"model_type {name!r}: q4jax.models implements {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]


def describe(entries: Mapping[str, Any]) -> tuple[Decoder, set[str]]:
    """Return what a decoder computes, and the entries that decided it.

    Raises:
      NotImplementedError: a feature is not served; the message says which values are.
      ValueError: an entry is missing or malformed, or entries contradict each other.
    """
    family = family_of(entries)
    defaults = {**family.defaults, **default_entries(str(entries["model_type"]))}
    return _Description(family, Entries(entries, defaults)).decoder()


@dataclasses.dataclass(frozen=True)
class _Description:
    family: Family
    c: Entries

    def decoder(self) -> tuple[Decoder, set[str]]:
        c, family = self.c, self.family
        self._check_fixed()
        hidden, norm = c.hidden, self._norm()
        layers = tuple(self._layer(number, norm) for number in range(c.layers))
        fields = evaluate_all(family.decoder, c)
        if c.get("hidden_size_per_layer_input"):
            fields["per_layer_vocab"] = c.size("vocab_size_per_layer_input")
        cap = c.optional_number("final_logit_softcapping")
        fields.setdefault("logit_cap", cap)
        found = Decoder(
            vocab_size=c.size("vocab_size"),
            hidden_size=hidden,
            layers=layers,
            norm=norm,
            tied=c.flag("tie_word_embeddings"),
            further_layers=c.optional_size("num_nextn_predict_layers") or 0,
            **fields,
        )
        return found, c.used

    def _check_fixed(self) -> None:
        c = self.c
        for name, allowed in {**_FIXED, **self.family.fixed}.items():
            value, allowed = c.get(name), tuple(evaluate(a, c) for a in allowed)
            if allowed and value is not None and value not in allowed:
                raise NotImplementedError(f"{name}={value!r}: q4jax implements {allowed[0]!r}")

    def _norm(self) -> Norm:
        c = self.c
        fields = evaluate_all(self.family.norm, c)
        if "eps" not in fields:
            names = (*self.family.eps, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
            default = 1e-5 if fields.get("kind") == "layer" else 1e-6
            fields["eps"] = c.optional_number(*names) or default
        return Norm(**fields)

    def _layer(self, number: int, norm: Norm) -> Layer:
        c, family = self.c, self.family
        mixer = Mixers(family, c).of_layer(number, norm)
        fields = evaluate_all(family.layer, c)
        if isinstance(mixer, DeltaNet):
            fields["mixer_name"] = "linear_attn"
        mixture = family.mixture
        mlp: Any
        if mixture is None or not mixture.in_layer(c, number):
            mlp = self._mlp(number)
        else:
            mlp = self._experts(mixture)
            if mixture.name:
                fields["mlp_name"] = mixture.name
        width = c.optional_size("hidden_size_per_layer_input") or 0
        return Layer(mixer, mlp, norm, per_layer=width, per_layer_act=self._act(), **fields)

    def _act(self) -> str:
        act = self.c.get(*self.family.act) or "silu"
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise NotImplementedError(
                f"{self.family.act[0]}={act!r}: q4jax implements {sorted(ACTIVATIONS)}"
            )
        return act

    def _mlp(self, number: int) -> MLP:
        c = self.c
        width = evaluate(self.family.width, c)
        if c.flag("use_double_wide_mlp") and number >= c.own_keys:
            width *= 2
        fields = {"act": self._act(), **evaluate_all(self.family.mlp, c)}
        return MLP(width=width, **fields)

    def _experts(self, mixture: Mixture) -> Experts:
        c = self.c
        count = c.size(*mixture.count)
        per_token = c.get(*mixture.per_token)
        # Hunyuan has a list, one for each layer.
        per_token = per_token[0] if isinstance(per_token, list) and per_token else per_token
        if per_token is None:
            raise ValueError(f"config.json lacks {mixture.per_token[0]!r}")
        per_token = values.size(mixture.per_token[0], per_token)
        if per_token > count:
            raise ValueError(
                f"{mixture.per_token[0]}={per_token} is more than {mixture.count[0]}={count}"
            )
        others = evaluate_all(mixture.others, c)
        base: dict[str, Any] = {"act": self._act(), **evaluate_all(self.family.mlp, c)}
        expert = base | {"bias": False}
        if len(mixture.names) == 3:
            expert |= dict(zip(("gate", "up", "down"), mixture.names, strict=True))
        else:
            expert |= dict(zip(("gate_up", "down"), mixture.names, strict=True))
            expert["interleaved"] = base.get("limit") is not None
            expert["bias"] = base.get("limit") is not None
        shared = mixture.shared_width(c)
        groups = (c.optional_size("n_group") or 1) if mixture.groups else 1
        if c.get("topk_method") == "greedy":
            groups = 1
        if count % groups:
            raise ValueError(f"n_group={groups} does not divide the {count} experts")
        return Experts(
            count=count,
            per_token=per_token,
            expert=MLP(width=c.size(*mixture.width), **expert),
            renormalize=evaluate(mixture.renormalize, c),
            scale=evaluate(mixture.scale, c),
            groups=groups,
            kept_groups=(c.optional_size("topk_group") or 1) if groups > 1 else 1,
            shared=mixture.shared if shared else "",
            shared_mlp=MLP(width=shared, **base) if shared else None,
            **others,
        )
