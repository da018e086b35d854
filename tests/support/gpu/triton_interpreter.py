"""`implementation="triton"` on CPU, for tests: Triton's interpreter, with inline PTX added.

Import it in a process of its own, with TRITON_INTERPRET=1 set before Triton is imported. Kernels
then run on real memory. Every array lies between NaNs, which a load or store beside it meets.
"""

import functools
import re

import jax
import jax.numpy as jnp
import jax_triton
import ml_dtypes
import numpy as np
import triton.language as tl
from jax.interpreters import mlir
from triton.runtime import interpreter

import q4jax
from q4jax.gpu import cuda_call as kernel_call
from q4jax.ops.registry import IMPLEMENTATIONS

GUARD = 4096
_TRITON_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "uint8": "u8"}


def _bytes(*words):
    return np.stack(words, -1).view(np.uint8)


def _permute(a, b, selector):
    a, b, selector = np.broadcast_arrays(a, b, selector)
    index = (selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    assert (index < 8).all()
    picked = np.take_along_axis(_bytes(a, b), index.astype(np.int64), -1)
    return np.ascontiguousarray(picked).view(np.uint32)[..., 0]


def _logic(a, b, c, table):
    minterms = (
        (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        for i in range(8)
        if table >> np.uint32(i) & 1
    )
    return np.bitwise_or.reduce(np.broadcast_arrays(*minterms))


def _floats(function):
    return lambda *words: function(*(w.view(np.float32) for w in words)).view(np.uint32)


def _convert(dtype):
    def convert(high, low):
        halves = [w.view(np.float32).astype(dtype).view(np.uint16) for w in (low, high)]
        return np.ascontiguousarray(np.stack(halves, -1)).view(np.uint32)[..., 0]

    return convert


_PTX = {
    "mul.rn.f32": _floats(np.multiply),
    "add.rn.f32": _floats(np.add),
    "cvt.rn.bf16x2.f32": _convert(ml_dtypes.bfloat16),
    "cvt.rn.f16x2.f32": _convert(np.float16),
    "and.b32": np.bitwise_and,
    "mul.hi.u32": lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32),
    "prmt.b32": _permute,
    "lop3.b32": _logic,
}


class _Result:
    def __init__(self, handle):
        self.handle = handle

    def get_result(self, _):
        return self.handle


def _immediate(text):
    """A float is written as 0f and its bits."""
    return np.uint32(int(text[2:], 16) if text.startswith("0f") else int(text, 0))


def _inline_asm(self, asm, constraints, values, types, is_pure, pack):
    """One PTX instruction after the other, on whole arrays of 32-bit words."""
    assert pack == 1 and len(types) == 1
    assert len(constraints.split(",")) == 1 + len(values)
    registers = {}
    for i, (value, letter) in enumerate(zip(values, constraints.split(",")[1:], strict=True)):
        assert value.data.dtype == {"r": np.int32, "f": np.float32}[letter]
        registers[f"${i + 1}"] = np.ascontiguousarray(value.data).view(np.uint32)
    with np.errstate(over="ignore"):
        for line in re.split(r"[;{}]\s*", asm):
            name, _, operands = line.strip().partition(" ")
            if not name or name == ".reg":
                continue
            target, *sources = (s.strip() for s in operands.split(","))
            registers[target] = _PTX[name](
                *(registers[s] if s in registers else _immediate(s) for s in sources)
            )
    dtype = types[0].scalar
    result = registers["$0"].view({tl.int32: np.int32, tl.float32: np.float32}[dtype])
    return _Result(interpreter.TensorHandle(result, dtype))


def _as_float32(handle):
    data = handle.data
    return (data.view(ml_dtypes.bfloat16) if handle.dtype == tl.bfloat16 else data).astype("f4")


def _dot(self, a, b, c, input_precision, max_num_imprecise_acc):
    """The interpreter's own takes bfloat16 for integers."""
    assert a.dtype == b.dtype
    return interpreter.TensorHandle(_as_float32(a) @ _as_float32(b) + c.data, tl.float32)


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_rounding(self, source, dtype):
    """The interpreter's own cuts float32 to bfloat16."""
    if source.dtype.scalar == tl.bfloat16:
        source = interpreter.TensorHandle(_as_float32(source), tl.float32)
    if dtype.scalar == tl.bfloat16:
        data = source.data.astype(ml_dtypes.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(data, dtype.scalar)
    return _cast(self, source, dtype)


class _Pointer:
    """An array among NaNs, as the interpreter takes a tensor."""

    def __init__(self, array):
        array = np.asarray(array)
        self.dtype = _TRITON_NAMES[array.dtype.name]
        self._memory = np.full(array.nbytes + 2 * GUARD, 0xFF, np.uint8)
        inner = self._memory[GUARD : GUARD + array.nbytes]
        self.array = inner.view(array.dtype).reshape(array.shape)
        self.array[...] = array

    def data_ptr(self):
        return self._memory.ctypes.data + GUARD

    def check(self):
        assert (self._memory[:GUARD] == 0xFF).all() and (self._memory[-GUARD:] == 0xFF).all()


class _Executor(interpreter.GridExecutor):
    def _init_args_hst(self, args, kwargs):
        return args, kwargs

    def _restore_args_dev(self, *_):
        pass


def _triton_call(*, kernel, out_type, grid, m, PLAN, name, num_warps, num_stages, **operands):
    """`jax_triton.triton_call`, for the kernels of q4jax."""
    del operands["backend_options"]
    arrays = {name: a for name, a in operands.items() if a is not None}
    out_name = [n for n in kernel.arg_names if n not in (*operands, "m", "PLAN")]

    def run(arrays):
        pointers = {name: _Pointer(a) for name, a in arrays.items()}
        out = _Pointer(np.full(out_type.shape, np.nan, out_type.dtype))
        none = dict.fromkeys(operands.keys() - arrays.keys())
        arguments = pointers | none | {out_name[0]: out, "m": m, "PLAN": PLAN}
        _Executor(kernel.rewrite(), kernel.arg_names, (grid,))(**arguments)
        for pointer in (*pointers.values(), out):
            pointer.check()
        return out.array

    return jax.pure_callback(run, out_type, arrays)


interpreter.InterpreterBuilder.create_inline_asm = _inline_asm
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.cast_impl = _cast_rounding
jax_triton.triton_call = _triton_call
mlir.register_lowering(kernel_call._kernel_p, kernel_call._lower_cuda, platform="cpu")


def _arrays(tree):
    return jax.tree.map(np.asarray, tree)


def product(x, w, bias, g, quantization):
    """(y, dx, dbias) of `matmul_4bit`, and its weight in x's dtype.

    Args:
      x: `[..., K]`.
      w: `[N, K]`.
      bias: `[N]` or None.
      g: the cotangent `[..., N]`.
      quantization: arguments of `quantize_4bit`.
    """
    weight = q4jax.Params4bit.quantize(jnp.asarray(w), **quantization)

    def f(x, bias):
        return q4jax.matmul_4bit(x, weight, bias=bias, implementation="triton")

    y, pull = jax.vjp(f, *jax.tree.map(jnp.asarray, (x, bias)))
    w_hat = q4jax.dequantize_4bit(weight.packed, weight.quant_state, dtype=x.dtype)
    return _arrays((y, *pull(jnp.asarray(g)), w_hat))


def decoded(codes, dtype, quantization):
    """The weight with these codes, as both products and as `dequantize_4bit` decode it."""
    n, half = codes.shape
    w = np.random.default_rng(0).normal(size=(n, 2 * half)).astype(np.float32)
    packed, state = q4jax.quantize_4bit(jnp.asarray(w), **quantization)
    assert packed.shape == codes.shape
    weight = q4jax.Params4bit(jnp.asarray(codes), state)

    def f(x):
        return q4jax.matmul_4bit(x, weight, implementation="triton")

    columns = f(jnp.eye(2 * half, dtype=dtype))
    [rows] = jax.vjp(f, jnp.zeros((n, 2 * half), dtype))[1](jnp.eye(n, dtype=dtype))
    return _arrays((columns.T, rows, q4jax.dequantize_4bit(weight.packed, state, dtype=dtype)))


def mapped(case):
    """A product under `jax.vmap`, and the same with `implementation="xla"`.

    Args:
      case: "x", "weight", "both", "gradient", "x of weights" or "weights of x".
    """
    quantization = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.vmap(lambda w: q4jax.Params4bit.quantize(w, check_finite=False, **quantization))(
        jax.random.normal(keys[0], (3, 80, 128))
    )
    one = jax.tree.map(lambda a: a[1], weights)
    biases = jax.random.normal(keys[1], (3, 80))
    xs = jax.random.normal(keys[2], (2, 3, 5, 128))

    def run(implementation):
        def f(x, weight, bias):
            return q4jax.matmul_4bit(x, weight, bias=bias, implementation=implementation)

        def gradient(x, weight, bias):
            return jax.grad(lambda x: f(x, weight, bias).sum())(x)

        return {
            "x": lambda: jax.vmap(f, (0, None, None))(xs[0], one, biases[0]),
            "weight": lambda: jax.vmap(f, (None, 0, None))(xs[0, 0], weights, biases[0]),
            "both": lambda: jax.vmap(f)(xs[0], weights, biases),
            "gradient": lambda: jax.vmap(gradient)(xs[0], weights, biases),
            "x of weights": lambda: jax.vmap(jax.vmap(f), (0, None, None))(xs, weights, biases),
            "weights of x": lambda: jax.vmap(jax.vmap(f, (0, None, None)), (1, 0, 0))(
                xs, weights, biases
            ),
        }[case]()

    return _arrays((run("triton"), run("xla")))


def run(op, operands, static):
    """The results of an op of `implementation="triton"`."""
    function = functools.partial(getattr(IMPLEMENTATIONS["triton"], op), **static)
    return _arrays(jax.jit(function)(*jax.tree.map(jnp.asarray, operands)))
