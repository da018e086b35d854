"""Make the description of what mixes the tokens in a layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from q4jax.models.decoder.entries import FULL, SLIDING, Entries
from q4jax.models.decoder.families.common import CHUNKED, LINEAR
from q4jax.models.decoder.families.family import Family, evaluate_all
from q4jax.models.decoder.mixer_spec import Attention, DeltaNet, LatentAttention, Norm, Rope, View
from q4jax.models.decoder.rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True)
class Mixers:
    """The mixers of a family's model with the entries `c`."""

    family: Family
    c: Entries

    def of_layer(self, number: int, norm: Norm) -> Attention | LatentAttention | DeltaNet:
        """Return what mixes the tokens in a layer; `norm` is the model's."""
        family = self.family
        kind = self.c.layer_type(number, family.every)
        if family.chunks and not self.c.is_given("layer_types"):
            kind = CHUNKED if family.rope(self.c, number) else FULL
        if family.mixer == "delta" and kind == SLIDING:
            kind = LINEAR
        served = {FULL, LINEAR} if family.mixer == "delta" else {FULL, SLIDING, CHUNKED}
        if kind not in served:
            raise NotImplementedError(
                f"layer_types has {kind!r}: q4jax implements {sorted(served)}"
            )
        if kind == LINEAR:
            return self._delta(norm)
        return self._latent() if family.mixer == "latent" else self._attention(number, kind, norm)

    def _view(self, kind: str) -> View:
        c = self.c
        if kind == CHUNKED:
            return View(chunk=c.size("attention_chunk_size"))
        window = c.optional_size("sliding_window")
        if c.get("use_sliding_window") is False:
            window = None
        if self.family.windows == "none":
            return View()
        if self.family.windows == "typed" and kind != SLIDING:
            return View()
        if window is None and kind == SLIDING:
            raise ValueError(f"layer_types has {SLIDING!r}, but sliding_window is None")
        return View(window=window)

    def _attention(self, number: int, kind: str, norm: Norm) -> Attention:
        c, family = self.c, self.family
        heads = c.heads
        own = c.section("per_layer_config").section(str(number))
        head_dim = c.optional_size("head_dim") or c.even_head_dim
        kv_heads = self._kv_heads(heads)
        fields = evaluate_all(family.attention, c)
        if kind == FULL:
            head_dim = c.optional_size("global_head_dim") or head_dim
            if c.flag("attention_k_eq_v"):
                kv_heads = c.optional_size("num_global_key_value_heads") or kv_heads
                fields["v"] = ""
        head_dim = own.optional_size("head_dim") or head_dim
        kv_heads = own.optional_size("num_key_value_heads") or kv_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        own_keys = c.own_keys
        if own_keys < c.layers:
            last = max(i for i in range(own_keys) if c.layer_type(i, family.every) == kind)
            reads = number >= own_keys
            fields["keys_of"] = "reads" if reads else "lends" if number == last else ""
            fields["group"] = kind
            if reads:
                fields["k"] = fields["v"] = ""
        rope = self._rope(kind, head_dim) if family.rope(c, number) else None
        bare = fields.pop("bare_norm", False)
        over = fields.pop("norm_over", "")
        if over and not (bare and rope is None):
            fields["norm"] = dataclasses.replace(norm, scale=not bare)
            fields["norm_over"] = over
        temperature = fields.pop("unrotated_temperature", None)
        if temperature is not None and rope is None:
            fields["temperature"] = temperature
        cap = c.optional_number("attn_logit_softcapping")
        fields = {"scale": head_dim**-0.5, "cap": cap, **fields}
        return Attention(heads, kv_heads, head_dim, view=self._view(kind), rope=rope, **fields)

    def _kv_heads(self, heads: int) -> int:
        c, names = self.c, self.family.kv_heads
        new = c.flag("new_decoder_architecture")
        if c.get("multi_query") and not new:  # Falcon's
            return 1
        if not names or c.get("new_decoder_architecture") is False:
            return heads
        return c.optional_size(*names) or heads

    def _rope_entries(self, kind: str) -> dict[str, Any]:
        """Return the entries of a kind of layer, which transformers 4 has outside of the dict."""
        c = self.c
        # Defaults of transformers hold only where nothing is said of the base either.
        said = c.is_given("rope_parameters", "rope_scaling") or not c.is_given("rope_theta")
        found = (c.get("rope_parameters", "rope_scaling") or {}) if said else {}
        if not isinstance(found, Mapping):
            raise ValueError(f"rope_parameters must be an object, got {found!r}")
        local = c.optional_number("rope_local_base_freq")
        if kind in found:
            found, local = found[kind] or {}, None
            if not isinstance(found, Mapping):
                raise ValueError(f"rope_parameters of {kind} must be an object, got {found!r}")
        elif kind == SLIDING and local is not None:
            found = {"rope_theta": local}
        elif set(found) & {FULL, SLIDING}:
            raise ValueError(f"rope_parameters has no entries for layers of type {kind!r}")
        theta = c.optional_number("rope_theta", "rotary_emb_base") or 10000.0
        given = {name: value for name, value in found.items() if value is not None}
        context = c.get("original_max_position_embeddings")
        outside = {"original_max_position_embeddings": context} if context else {}
        return {"rope_theta": theta, **outside, **given}

    def _rope(self, kind: str, head_dim: int) -> Rope:
        c = self.c
        found = self._rope_entries(kind)
        entries = Entries(found, {})
        part = c.optional_number("partial_rotary_factor", "rotary_pct") or 1.0
        part = entries.optional_number("partial_rotary_factor") or part
        scaling = RopeScaling.from_hf({**found, "partial_rotary_factor": part}, c.context)
        dim = c.optional_size("rotary_dim") or int(head_dim * part)
        if scaling is not None and scaling.rope_type == "proportional":
            dim = head_dim
        theta = entries.number("rope_theta")
        if dim < 1 or dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even: rotary embeddings pair it up")
        if scaling is not None:
            scaling.check(theta, dim)
        return Rope(dim, theta, c.context, scaling, self.family.interleaved)

    def _latent(self) -> LatentAttention:
        c = self.c
        c.get("head_dim", "qk_head_dim", "num_key_value_heads")  # which follow from the others
        plain, rotated = c.size("qk_nope_head_dim"), c.size("qk_rope_head_dim")
        rope = self._rope(FULL, rotated)
        interleaved = self.family.interleaved or c.flag("rope_interleave")
        scale = (plain + rotated) ** -0.5
        if rope.scaling is not None:
            scale *= rope.scaling.latent_scale**2
        return LatentAttention(
            heads=c.heads,
            q_rank=c.optional_size("q_lora_rank"),
            kv_rank=c.size("kv_lora_rank"),
            plain_dim=plain,
            value_dim=c.size("v_head_dim"),
            scale=scale,
            rope=dataclasses.replace(rope, interleaved=interleaved),
            norm=Norm(),
            bias=c.flag("attention_bias"),
        )

    def _delta(self, norm: Norm) -> DeltaNet:
        c = self.c
        return DeltaNet(
            key_heads=c.size("linear_num_key_heads"),
            value_heads=c.size("linear_num_value_heads"),
            key_dim=c.size("linear_key_head_dim"),
            value_dim=c.size("linear_value_head_dim"),
            kernel=c.size("linear_conv_kernel_dim"),
            norm=Norm(eps=norm.eps),
            fused=self.family.delta_fused,
        )
