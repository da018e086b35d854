"""All implementations on random small problems, against numpy in float64.

A run draws shapes at the edges of tiles and blocks, one program for each, and for each of them
many problems: weights and activations with NaN, infinities, subnormals and zeros of both signs.
`--problems` is their number and `--seed` repeats the run that a report's header or a failure names.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import q4jax
from q4jax.core import blockwise, codebooks
from q4jax.core.blockwise import WeightArrays
from q4jax.core.spec import QuantSpec
from tests.support import oracle
from tests.support.implementations import params, unsupported

SHAPES, CORE_SHAPES = 20, 3  # the rest is heavy
VARIANTS = params(lambda v: v.name != "triton_interpreted")
TINY = 2.0**-126
ODD = (np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, -1e-45, 1e-38, 6e-8)
TRANSFORMS = ("jit", "vmap", "scan", "remat")


@dataclasses.dataclass(frozen=True)
class Draw:
    """What the problems of one program share, and how many they are."""

    seed: tuple[int, int]
    count: int
    m: int
    n: int
    k: int
    dtype: str
    quant_type: str
    blocksize: int
    nested: bool
    transform: str

    @classmethod
    def from_seed(cls, seed: int, number: int, count: int) -> "Draw":
        rng = np.random.default_rng((seed, number))
        blocksize = int(rng.choice([32, 64, 128]))
        ragged = rng.random() < 0.25
        k = int(rng.choice([1, 7, 31, 33, 50, 65])) if ragged else blocksize * rng.integers(1, 4)
        return cls(
            (seed, number),
            count,
            int(rng.choice([1, 2, 3, 7, 8, 15, 16, 17, 33])),
            int(rng.choice([1, 2, 3, 7, 8, 9, 15, 16, 17])),
            int(k),
            str(rng.choice(list(oracle.DTYPES))),
            str(rng.choice(list(oracle.CODE))),
            blocksize,
            bool(rng.random() < 0.5),
            str(rng.choice(TRANSFORMS)),
        )

    @property
    def spec(self) -> QuantSpec:
        shape = (self.n, self.k)
        return QuantSpec.from_shape(shape, self.dtype, self.quant_type, self.blocksize, self.nested)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Operands in numpy, and what they mean."""

    w: np.ndarray
    codes: np.ndarray
    absmax: np.ndarray
    arrays: WeightArrays
    x: np.ndarray
    bias: np.ndarray
    g: np.ndarray
    decoded: np.ndarray


def odd_places(rng, values, chance):
    """Put odd numbers into one row, so that the others show whether they stay there."""
    if rng.random() < chance:
        row = values[rng.integers(len(values))]
        places = rng.integers(0, row.size, rng.integers(1, 4))
        row[places] = rng.choice(ODD, places.size)
    return values


@functools.lru_cache(1)
def problems(draw: Draw) -> list[Problem]:
    rng = np.random.default_rng((*draw.seed, 1))
    spec, dtype = draw.spec, oracle.DTYPES[draw.dtype]
    found = []
    for _ in range(draw.count):

        def operand(*shape, chance=0.5):
            with np.errstate(all="ignore"):
                return odd_places(rng, rng.standard_normal(shape), chance).astype(dtype)

        # The statistics of a nested weight are shared by all its rows: one odd number spoils all.
        w = operand(draw.n, draw.k, chance=0.0 if draw.nested else 0.3)
        x, bias, g = (
            operand(draw.m, draw.k),
            operand(1, draw.n, chance=0)[0],
            operand(draw.m, draw.n),
        )
        codes, absmax = oracle.quantize(w, draw.quant_type, draw.blocksize)
        scales, statistics = absmax, (None, None)
        if draw.nested:
            stored, *statistics = map(np.asarray, blockwise.double_quantize(jnp.asarray(absmax)))
            scales = oracle.decode_scales(stored, *statistics, codebooks.DYNAMIC_MAP)
        else:
            stored = absmax
        arrays = WeightArrays(
            codes.reshape(spec.packed_shape), stored.reshape(spec.absmax_shape), *statistics
        )
        decoded = oracle.dequantize(
            codes, scales, draw.quant_type, draw.blocksize, (draw.n, draw.k), draw.dtype
        )
        found.append(Problem(w, codes, absmax, arrays, x, bias, g, decoded))
    return found


def wrong(found, a, b, extra=0.0):
    """The elements of a product that are not `a @ b.T + extra` within a justified bound.

    Float32 sums of K terms in any order, a few roundings more where they are split, one rounding
    to the result's dtype, and terms with subnormal factors, which may count as zero. Where numpy
    has NaN or an infinity, so has the product; NaN too where a factor of zero meets an infinity.
    """
    result, found = found.dtype, np.asarray(found).astype(np.float64)
    a, b, extra = (np.asarray(t).astype(np.float64) for t in (a, b, extra))
    with np.errstate(all="ignore"):
        exact = a @ b.T + extra
        terms = np.abs(a) @ np.abs(b).T + np.abs(extra)
        info = jnp.finfo(result)
        bound = (a.shape[-1] + 16) * 2.0**-24 * terms + float(info.smallest_subnormal)
        sizes = [np.where(np.isfinite(t), np.abs(t), 0).max(initial=1.0) for t in (a, b)]
        bound += a.shape[-1] * TINY * max(sizes)
        bound += float(info.eps) / 2 * (np.abs(exact) + bound)
        close = np.abs(found - exact) <= bound
    small, infinite = ([of(t).astype(int) for t in (a, b)] for of in (_is_subnormal, np.isinf))
    flushed = small[0] @ infinite[1].T + infinite[0] @ small[1].T > 0
    special = ~np.isfinite(exact)
    same = (found == exact) | (np.isnan(found) & (np.isnan(exact) | flushed))
    return np.argwhere(np.where(special, ~same, ~close))


def _is_subnormal(a):
    return (a != 0) & (np.abs(a) < TINY)


def public(variant, draw):
    """A function from stacks of problems to products and gradients, as a user calls it."""

    def one(x, arrays, bias, g):
        state = q4jax.QuantState(*arrays[1:], draw.spec)

        def matmul(x):
            return q4jax.matmul_4bit(
                x, arrays.packed, state, bias=bias, implementation=variant.public
            )

        y, vjp = jax.vjp(jax.remat(matmul) if draw.transform == "remat" else matmul, x)
        return y, vjp(g)[0]

    if draw.transform == "vmap":
        return jax.jit(jax.vmap(one))
    if draw.transform == "scan":
        return jax.jit(lambda *stacks: jax.lax.map(lambda each: one(*each), stacks))
    compiled = jax.jit(one)

    def each(*stacks):
        parts = [compiled(*jax.tree.map(lambda a, i=i: a[i], stacks)) for i in range(draw.count)]
        return jax.tree.map(lambda *a: np.stack(a), *parts)

    return each


def products(variant, draw, found):
    """The products and the gradients of all problems."""
    if variant.public is None:
        run = functools.partial(variant.run, spec=draw.spec)
        return (
            [run("linear", p.x, p.arrays, p.bias) for p in found],
            [run("linear_transpose", p.g, p.arrays) for p in found],
        )
    operands = [(p.x, p.arrays, p.bias, p.g) for p in found]
    return public(variant, draw)(*jax.tree.map(lambda *a: jnp.stack(a), *operands))


def check(variant, draw):
    found, spec = problems(draw), draw.spec
    dtype = np.dtype(oracle.DTYPES[draw.dtype])
    refused = 0
    for number, p in enumerate(found):
        where = f"--seed {draw.seed[0]}: {variant.name}, {draw}, problem {number}"
        try:
            codes, absmax = variant.run("quantize", p.w, spec=spec)
            assert oracle.same_bits(np.ravel(codes), p.codes), where
            assert oracle.same_bits(np.ravel(absmax), p.absmax), where
        except NotImplementedError as error:
            last, refused = error, 1
        try:
            decoded = variant.run("dequantize", p.arrays, spec=spec, dtype=dtype)
            assert oracle.same_bits(decoded, p.decoded), where
        except NotImplementedError as error:
            last, refused = error, 1
    try:
        ys, dxs = products(variant, draw, found)
    except NotImplementedError as error:
        last, refused = error, 1
    else:
        for number, (p, y, dx) in enumerate(zip(found, ys, dxs, strict=True)):
            where = f"--seed {draw.seed[0]}: {variant.name}, {draw}, problem {number}"
            for name, places in (
                ("y", wrong(y, p.x, p.decoded, p.bias)),
                ("dx", wrong(dx, p.g, p.decoded.T)),
            ):
                assert not len(places), f"{where}: {name} at {places[:5].tolist()}"
    if refused:
        unsupported(variant, last)


def pytest_generate_tests(metafunc):
    seed, total = (metafunc.config.getoption(name) for name in ("--seed", "--problems"))
    count = -(-total // SHAPES)
    chosen = {"draw": range(CORE_SHAPES), "more_draw": range(CORE_SHAPES, SHAPES)}
    for name, numbers in chosen.items():
        if name in metafunc.fixturenames:
            draws = [Draw.from_seed(seed, number, count) for number in numbers]
            metafunc.parametrize(name, draws, ids=map(str, numbers))


@pytest.mark.parametrize("variant", VARIANTS)
def test_problems(draw, variant):
    with variant.context():
        check(variant, draw)


@pytest.mark.heavy
@pytest.mark.parametrize("variant", VARIANTS)
def test_more_problems(more_draw, variant):
    with variant.context():
        check(variant, more_draw)


def test_a_wrong_product_is_seen():
    """Also one that is NaN, or finite where numpy has NaN."""
    x, w = np.ones((2, 8), np.float32), np.ones((3, 8), np.float32)
    x[1, 0] = np.nan
    y = np.array([[8, 8, 8], [np.nan] * 3], np.float32)
    assert not len(wrong(y, x, w))
    for place, value in (((0, 1), np.nan), ((1, 1), 8.0), ((0, 2), 8.00002)):
        changed = y.copy()
        changed[place] = value
        assert wrong(changed, x, w).tolist() == [list(place)]
