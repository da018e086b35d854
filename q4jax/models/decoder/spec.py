"""What a decoder computes, as data: one frozen description for each part of each layer.

`describe` makes it from a `config.json` and the table of families; the modules do what it says.
Names are those of Hugging Face's modules, and of this package's too.
"""

import dataclasses

from q4jax.models.decoder.mixer_spec import Attention, DeltaNet, LatentAttention, Norm


@dataclasses.dataclass(frozen=True)
class MLP:
    """Two or three projections with an activation.

    Attributes:
      gate: name of the projection that the activation is applied to, "" if that is `up`.
      gate_up: name of one projection to both, "" if they are apart.
      act: the activation.
      interleaved: whether the outputs of `gate_up` alternate.
      limit: bound of the inputs of gpt_oss's activation.
    """

    width: int
    act: str = "silu"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = ""
    bias: bool = False
    interleaved: bool = False
    limit: float | None = None


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
      count, per_token: number of experts, and of those that compute a token.
      expert: what one is.
      score: how scores become weights: "softmax", "sigmoid", "top" (softmax of the best),
        "sparsemixer", or "input" (the sigmoid of the best scales the expert's input).
      router: name of the router; with a dot, of a module in it.
      router_bias: whether it has a bias.
      correction: name of a bias that decides which experts are best, "" if there is none.
      groups, kept_groups: experts are chosen from the best groups only.
      group_best: a group counts as its best experts' sum of this number.
      renormalize: whether a token's weights are made to sum to 1.
      scale: factor of the weights.
      jitter: threshold of "sparsemixer".
      inner: name of the experts' module, "" if they are parameters of the mixture.
      layout: "apart": each expert has tensors of its own; "in_out" or "out_in": one tensor of all.
      shared: name of an MLP that computes every token, "" if there is none.
      shared_gate: name of its gate, likewise.
    """

    count: int
    per_token: int
    expert: MLP
    score: str = "softmax"
    router: str = "gate"
    router_bias: bool = False
    correction: str = ""
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    renormalize: bool = False
    scale: float = 1.0
    jitter: float = 0.0
    inner: str = "experts"
    layout: str = "apart"
    shared: str = ""
    shared_mlp: MLP | None = None
    shared_gate: str = ""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
      mixer: what mixes tokens.
      mlp: what follows.
      mixer_name, mlp_name: their names; "" for the MLP: its projections are the layer's.
      norm: the norm of all four places.
      before_mixer, after_mixer, before_mlp, after_mlp: names of norms; "": there is none.
      parallel: whether the MLP reads the layer's input, not the mixer's result.
      residual: factor of what is added to the residual stream.
      scaled: whether the result is multiplied by a learned number.
      per_layer: width of the inputs that each layer has of its own; 0: there are none.
    """

    mixer: Attention | LatentAttention | DeltaNet
    mlp: MLP | Experts
    norm: Norm
    mixer_name: str = "self_attn"
    mlp_name: str = "mlp"
    before_mixer: str = "input_layernorm"
    after_mixer: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    parallel: bool = False
    residual: float = 1.0
    scaled: bool = False
    per_layer: int = 0
    per_layer_act: str = ""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A whole model.

    Attributes:
      layers: each layer.
      norm: the last norm, and that of the embedding.
      embed_scale: factor of the embedding.
      embed_norm: whether the embedding is normalized.
      positions: rows of the table of learned positions; 0: there is none.
      position_offset: row of position 0.
      tied: whether the head is the embedding.
      head_bias: whether the head has a bias.
      logit_scale: factor of the logits.
      logit_cap: bound of the logits, by tanh.
      per_layer_vocab: vocabulary of the inputs of each layer.
      further_layers: layers after these that predict further tokens, and are not computed.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: Norm
    embed_scale: float = 1.0
    embed_norm: bool = False
    positions: int = 0
    position_offset: int = 0
    tied: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None
    per_layer_vocab: int = 0
    further_layers: int = 0

    @property
    def width(self) -> int:
        """Inner width of the first dense MLP, or of an expert."""
        mlps = [layer.mlp for layer in self.layers]
        dense = next((mlp for mlp in mlps if isinstance(mlp, MLP)), None)
        found = dense or mlps[0]
        return found.width if isinstance(found, MLP) else found.expert.width
