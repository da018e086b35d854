"""What mixes the tokens in a layer, as data: attention in its forms, and the delta net."""

import dataclasses

from q4jax.models.decoder.rope_scaling import RopeScaling


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalization over the last axis.

    Attributes:
      kind: "rms", or "layer", which subtracts the mean.
      eps: added to the variance.
      offset: added to the stored scale.
      scale: whether there is a scale.
      bias: whether there is a bias.
    """

    kind: str = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    scale: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embeddings of one kind of layer.

    Attributes:
      dim: the first features of a head, which are rotated; an even number.
      theta: base of the frequencies.
      context: `max_position_embeddings`.
      scaling: stretches the context; None: it does not.
      interleaved: feature 2i pairs with 2i+1, not i with i + dim/2.
    """

    dim: int
    theta: float
    context: int
    scaling: RopeScaling | None = None
    interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class View:
    """The earlier tokens that a layer attends to.

    Attributes:
      window: the number of the last tokens, itself included; None: all.
      chunk: the length of chunks that do not see each other; None: there are none.
    """

    window: int | None = None
    chunk: int | None = None


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Queries at position p are scaled by `1 + scale * log(1 + floor((p + shift) / length))`."""

    scale: float
    length: float
    shift: float = 0.0


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention with a head for each query and a key/value head for one or more of them.

    Attributes:
      q: name of the projection to queries; k, v and o likewise; k or v is "" where there is none.
      qkv: name of one projection to all three, "" if they are apart.
      grouped: whether the outputs of `qkv` lie by key/value head, each with its queries first.
      scale: factor of the products of queries and keys.
      rope: rotary embeddings; None: none.
      clip: bound of queries, keys and values.
      norm: norm of queries and keys.
      norm_over: "head", or "all" heads at once, or "each" head with a scale of its own.
      norm_last: whether the rotation comes first.
      norm_values: whether values are normalized, without a scale.
      cap: bound of the products, by tanh.
      alibi: slopes of a bias that grows with a key's position, one for each head.
      sinks: whether each head has a learned product beside those of the keys.
      gated: whether queries come with a gate of the outputs.
      keys_of: key/value states of another layer are used ("reads") or lent ("lends").
      group: the layers that share them.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    view: View = View()
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str = ""
    grouped: bool = False
    bias: bool = False
    out_bias: bool = False
    rope: Rope | None = None
    clip: float | None = None
    norm: Norm | None = None
    norm_over: str = "head"
    norm_last: bool = False
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"
    norm_values: bool = False
    cap: float | None = None
    alibi: tuple[float, ...] | None = None
    sinks: bool = False
    temperature: Temperature | None = None
    gated: bool = False
    keys_of: str = ""
    group: str = ""

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of key/value heads, and features of a head."""
        return self.kv_heads, self.head_dim


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values are projected from a narrow vector (MLA).

    Attributes:
      q_rank: width of the narrow vector of queries; None: they are projected at once.
      kv_rank: width of that of keys and values.
      plain_dim: features of a head without rotation.
      value_dim: features of a head's values.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    plain_dim: int
    value_dim: int
    scale: float
    rope: Rope
    norm: Norm
    bias: bool = False
    view: View = View()

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of key/value heads, and features of a head."""
        return self.heads, self.plain_dim + self.rope.dim


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Gated delta net: a linear attention with a state of fixed size.

    Attributes:
      fused: whether two projections yield all inputs, key head by key head.
      kernel: taps of the convolution over time.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    norm: Norm
    fused: bool
