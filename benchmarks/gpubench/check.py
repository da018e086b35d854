"""Every kernel against the reference, on the device, before anything is timed.

The reference is q4jax's plain form on the CPU. Quantizing gives the same bytes and the same
scales, bit for bit, and dequantizing the same weights. A product is compared with float64 sums over
the weight as it is rounded, within what accumulation in float32 and one rounding allow: K exact
products summed in any order are off by at most K 2^-24 times the sum of their magnitudes.
"""

import contextlib
import dataclasses
import functools
import itertools
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

import q4jax
from gpubench.clock import one_line
from q4jax import Params4bit
from q4jax.gpu import tiles
from q4jax.ops.matmul import LinearTranspose
from q4jax.ops.registry import check_name
from q4jax.sharding import partition

OPERATIONS = ("quantize", "dequantize", "linear", "linear_transpose")
DTYPES = ("bfloat16", "float16", "float32")
LAYOUTS = ((64, (101, 448)), (32, (136, 224)), (128, (64, 1024)), (4096, (24, 8192)))
MS = (1, 16, 5, 33, 64, 130)
COPIES = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of one kernel.

    Attributes:
      operation: one of `OPERATIONS`.
      quant_type, dtype, blocksize, nested: of the weight; dtype is the compute dtype, too.
      shape: [N, K].
      m: rows of the activation; 0 where there is none.
      mapped: whether `jax.vmap` runs it over a stack of weights.
    """

    operation: str
    quant_type: str = "nf4"
    dtype: str = "bfloat16"
    blocksize: int = 64
    nested: bool = True
    shape: tuple[int, int] = LAYOUTS[0][1]
    m: int = 0
    mapped: bool = False

    def __str__(self):
        n, k = self.shape
        scales = "nested" if self.nested else "plain"
        m = f" M={self.m}" if self.m else ""
        mapped = " vmapped" if self.mapped else ""
        return (
            f"{self.operation} {self.quant_type} {self.dtype} b{self.blocksize} {scales} "
            f"[{n}, {k}]{m}{mapped}"
        )

    @property
    def is_product(self):
        return self.operation in ("linear", "linear_transpose")


def all_cases():
    """Each combination of type, dtype, scales and layout for the products; half of them for the
    others; each M and tile; stacked weights; layers as they are timed."""
    formats = itertools.product(LAYOUTS, ("nf4", "fp4"), DTYPES, (False, True))
    cases = []
    for i, ((blocksize, shape), quant_type, dtype, nested) in enumerate(formats):
        fields = quant_type, dtype, blocksize, nested, shape
        # Two in a row differ in `nested` alone, which is nothing to the kernel that quantizes.
        if i % 2 == (i // 2) % 2:
            cases.append(Case("quantize", *fields))
        cases.append(Case("dequantize", *fields))
        cases += [Case(name, *fields, MS[i % len(MS)]) for name in ("linear", "linear_transpose")]
    for name in ("linear", "linear_transpose"):
        cases += [Case(name, m=m) for m in MS]
        cases += [Case(name, shape=(4096, 4096), m=m) for m in (1, 64, 512)]
        cases.append(Case(name, shape=(264, 11008), m=3))
    cases += mapped_cases()
    return list(dict.fromkeys(cases))


def mapped_cases():
    """One of each operation over a stack."""
    return [Case(name, m=5 * (name[0] in "lt"), mapped=True) for name in OPERATIONS]


def dry_cases():
    """The fewest that pass through each kernel."""
    small = {"shape": (24, 128)}
    other = {"quant_type": "fp4", "dtype": "float32", "blocksize": 32, "nested": False, **small}
    cases = [Case(name, m=3 * (name[0] in "lt"), **small) for name in OPERATIONS]
    return [
        *cases,
        Case("linear", m=2, **other),
    ]


def unavailable(implementation):
    """Why it does not serve calls here, in one line; None where it does."""
    case = Case("linear", m=1)
    try:
        check_name(implementation)
        jax.jit(_function(case, implementation)).lower(*_abstract(case))
    except NotImplementedError as error:
        return one_line(error)
    return None


def run(implementation, cases, threads, tile=None, refusals=False):
    """{"run": number, "refused": [...], "failures": [{"operation", "case", "reason"}]}.

    Args:
      implementation: whose kernels.
      cases: which calls.
      threads: that compile and compute what is expected.
      tile: for all products, instead of those of the table.
      refusals: whether a case that it says it does not serve is no failure.
    """
    report = {"run": 0, "refused": [], "failures": []}
    with futures.ThreadPoolExecutor(threads) as pool:
        prepared = pool.map(lambda case: _prepare(case, implementation, tile), cases)
        for case, (program, expected) in zip(cases, prepared, strict=True):
            if isinstance(program, NotImplementedError) and refusals:
                report["refused"].append(f"{case}: {one_line(program)}")
                continue
            report["run"] += 1
            reason = _reason(case, program, expected)
            if reason is not None:
                failure = {"operation": case.operation, "case": str(case), "reason": reason}
                report["failures"].append(failure)
    return report


def summary(implementation, report):
    """What `run` found, in a line and one more for each failure."""
    refused = f", {len(report['refused'])} refused" if report["refused"] else ""
    failures = report["failures"]
    lines = [f"{implementation}: {report['run']} checks, {len(failures)} failed{refused}"]
    return "\n".join(lines + [f"  FAILED {f['case']}: {f['reason']}" for f in failures])


def _prepare(case, implementation, tile):
    """(what runs the case on the device, or the error that it raises; what is expected)."""
    args, expected = _expected(case)
    try:
        args = jax.device_put(args, jax.devices()[0])
        with tiles.override(tile) if tile else contextlib.nullcontext():
            compiled = jax.jit(_function(case, implementation)).lower(*args).compile()
    except Exception as error:
        return error, expected
    return lambda: compiled(*args), expected


def _reason(case, program, expected):
    """Why the result is wrong; None where it is right."""
    if isinstance(program, Exception):
        return one_line(program)
    try:
        found = jax.device_get(program())
    except Exception as error:
        return one_line(error)
    if case.is_product:
        return _outside(found, *expected)
    for path, one in jax.tree.leaves_with_path(found):
        other = np.asarray(expected.pop(0))
        name = jax.tree_util.keystr(path).split("__")[0] or "the weight"
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"{name} is {one.dtype}{one.shape}, not {other.dtype}{other.shape}"
        bits = [np.frombuffer(a.tobytes(), np.uint8) for a in (one, other)]
        wrong = int((bits[0] != bits[1]).sum())
        if wrong:
            return f"{name}: {wrong} of {bits[0].size} bytes differ"
    return None


def _outside(found, exact, bound):
    """How far a product is outside its bound; None where it is not."""
    if found.shape != exact.shape:
        return f"shape {found.shape}, not {exact.shape}"
    error = np.abs(found.astype(np.float64) - exact)
    wrong = ~(error <= bound)  # NaN is wrong, too
    if not wrong.any():
        return None
    worst = np.where(np.isnan(error), np.inf, error / bound).max()
    return (
        f"{int(wrong.sum())} of {wrong.size} outside the bound, the worst by a factor {worst:.3g}"
    )


def _expected(case):
    """(arguments, leaves of the result), or for a product (arguments, (exact result, bound))."""
    with jax.default_device(jax.devices("cpu")[0]):
        args = _arguments(case)
        if not case.is_product:
            return args, jax.tree.leaves(_reference(case)(*args))
        x, weight, *bias = args
        w = _reference(dataclasses.replace(case, operation="dequantize"))(weight)
        w, x = (np.asarray(a).astype(np.float64) for a in (w, x))
    if case.operation == "linear":
        w = np.swapaxes(w, -1, -2)
    extra = np.asarray(bias[0]).astype(np.float64)[..., None, :] if bias else np.float64(0)
    exact = x @ w + extra
    summed = (x.shape[-1] + 2) * 2.0**-24 * (np.abs(x) @ np.abs(w) + np.abs(extra))
    info = jnp.finfo(case.dtype)
    rounded = float(info.eps) / 2 * (np.abs(exact) + summed)
    return args, (exact, summed + rounded + float(info.smallest_subnormal))


def _reference(case):
    """The plain form of quantize and dequantize, compiled once for all M."""
    return _compiled_reference(dataclasses.replace(case, m=0))


@functools.cache
def _compiled_reference(case):
    return jax.jit(_function(case, "xla"))


def _function(case, implementation):
    """The call on arrays, by the public functions where there is one."""

    def quantize(w):
        return Params4bit.quantize(
            w,
            case.blocksize,
            case.nested,
            case.quant_type,
            check_finite=False,
            implementation=implementation,
        )

    def dequantize(weight):
        return weight.dequantize(case.dtype, implementation=implementation)

    def linear(x, weight, bias=None):
        return q4jax.matmul_4bit(x, weight, bias=bias, implementation=implementation)

    def linear_transpose(g, weight):
        op = LinearTranspose(weight.quant_state.spec, check_name(implementation), False)
        return partition.run(op, g, weight.arrays)[0]

    function = locals()[case.operation]
    if not case.mapped:
        return function
    return lambda *args: jax.vmap(function)(*args)


def _arguments(case):
    """Of a case, the same in each run."""
    rng = np.random.default_rng(sum(map(ord, str(case))))
    lead = (COPIES,) if case.mapped else ()
    n, k = case.shape
    w = rng.standard_normal((*lead, n, k)).astype(np.float32)
    if not case.is_product:
        # Blocks of zeros; of subnormal numbers and of those whose reciprocal is subnormal, which
        # is to say that a device may flush.
        large, small = (6e4, 1e-7) if case.dtype == "float16" else (2.0**126, 2.0**-130)
        w[..., 0, :] = 0
        w[..., 1, :] = np.clip(w[..., 1, :], -1, 1) * large
        w[..., 2, :] *= small
    w = jnp.asarray(w).astype(case.dtype)
    if case.operation == "quantize":
        return (w,)
    weight = _reference(dataclasses.replace(case, operation="quantize"))(w)
    if case.operation == "dequantize":
        return (weight,)
    rows, out = (k, n) if case.operation == "linear" else (n, k)
    x = jnp.asarray(rng.standard_normal((*lead, case.m, rows))).astype(case.dtype)
    if case.operation == "linear_transpose" or case.m % 2:
        return x, weight
    return x, weight, jnp.asarray(rng.standard_normal((*lead, out)), jnp.float32)


def _abstract(case):
    """Shapes of the arguments of a product without a bias."""
    n, k = case.shape

    def make():
        weight = _function(dataclasses.replace(case, operation="quantize"), "xla")
        return jnp.zeros((case.m, k), case.dtype), weight(jnp.zeros((n, k), case.dtype))

    return jax.eval_shape(make)
