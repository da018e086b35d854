"""The kernels' operations on numpy arrays, by a machine."""

import struct

import ml_dtypes
import numpy as np

from q4jax import codebooks
from tests.support.emulated.machine import PAGE, pages

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 2}
# Those of `Arguments` in program.cc.
FIELDS = [
    *("packed", "plain", "codes", "nested_absmax", "offset", "dynamic_map", "code"),
    *("n", "k", "blocksize", "dtype", "bias_dtype", "x", "bias", "y", "m"),
    *("thresholds", "sorted_codes", "size", "to_packed", "to_absmax"),
]
ARRAYS = 0x2000_0000
UNTOUCHED = 0xA5  # fills what surrounds an array in its pages, and what is to be written


class Operations:
    """Each array has pages of its own, with pages that are not mapped around them.

    Attributes:
      aligned: "end": an array ends where its last page does, so that a read of one byte too many
        raises; "start": it starts where its first page does, for reads before it.
    """

    def __init__(self, machine, program):
        self.machine, self.program, self.aligned = machine, program, "end"
        machine.load(program)

    def quantize(self, w, quant_type, blocksize):
        """(packed, absmax), both flat, of a flat array."""
        return self._run(
            "quantize",
            {
                "to_packed": np.zeros(-(-w.size // 2), np.uint8),
                "to_absmax": np.zeros(-(-w.size // blocksize), np.float32),
            },
            x=w,
            size=w.size,
            blocksize=blocksize,
            dtype=NUMBERS[w.dtype.name],
            thresholds=codebooks.CODEBOOKS[quant_type].thresholds,
            sorted_codes=codebooks.CODEBOOKS[quant_type].sorted_codes,
        )

    def dequantize(self, weight, dtype):
        """The weight [n, k]; `weight` is what `weight_arguments` makes."""
        y = np.zeros((weight["n"], weight["k"]), DTYPES[dtype])
        return self._run("dequantize", {"y": y}, dtype=NUMBERS[dtype], **weight)[0]

    def linear(self, x, weight, bias=None):
        """x @ W.T + bias."""
        return self._product("linear", x, weight["n"], weight, bias)

    def transposed(self, x, weight):
        """x @ W."""
        return self._product("transposed", x, weight["k"], weight, None)

    def _product(self, operation, x, columns, weight, bias):
        more = {} if bias is None else {"bias": bias, "bias_dtype": NUMBERS[bias.dtype.name]}
        y = np.zeros((len(x), columns), x.dtype)
        more |= {"x": x, "m": len(x), "dtype": NUMBERS[x.dtype.name]}
        return self._run(operation, {"y": y}, **more, **weight)[0]

    def _run(self, operation, results, **arguments):
        """Calls the operation; returns the results, of which shape and dtype are given."""
        fields, placed, at = dict.fromkeys(FIELDS, 0), {}, ARRAYS
        for name, value in (arguments | results).items():
            assert name in fields
            if isinstance(value, int):
                fields[name] = value
                continue
            data = np.ascontiguousarray(value).tobytes()
            if name in results:
                data = bytes([UNTOUCHED]) * len(data)
            at, placed[name] = self._place(at, data)
            fields[name] = placed[name][0]
        at, placed["arguments"] = self._place(at, struct.pack(f"<{len(FIELDS)}q", *fields.values()))
        try:
            self.machine.call(self.program.symbols[operation], placed["arguments"][0])
            found = {name: self._page_content(*place) for name, place in placed.items()}
        finally:
            for address, data in placed.values():
                self.machine.unmap(*pages(address, len(data)))
        for name, (before, inside, after) in found.items():
            assert set(before) | set(after) <= {UNTOUCHED}, f"written beside {name}"
            assert name in results or inside == placed[name][1], f"{name} was changed"
        return [
            np.frombuffer(found[name][1], value.dtype).reshape(value.shape)
            for name, value in results.items()
        ]

    def _place(self, at, data):
        """Puts data into pages from `at` on: (where the next may be, (its address, data))."""
        size = -(-max(len(data), 1) // PAGE) * PAGE
        self.machine.map(at, size)
        self.machine.write(at, bytes([UNTOUCHED]) * size)
        address = at if self.aligned == "start" else at + size - len(data)
        self.machine.write(address, data)
        return at + size + 16 * PAGE, (address, data)

    def _page_content(self, address, data):
        """What its pages hold: before it, in its place, and after it."""
        first, size = pages(address, len(data))
        content, start = self.machine.read(first, size), address - first
        end = start + len(data)
        return content[:start], content[start:end], content[end:]


def weight_arguments(packed, scales, n, quant_type, blocksize):
    """What the kernels need to know of a weight.

    Args:
      packed: uint8, flat.
      scales: float32 of its blocks; or (codes, nested_absmax, offset).
      n: rows.
      quant_type: "nf4" or "fp4".
      blocksize: elements that share a scale.
    """
    if isinstance(scales, tuple):
        codes, nested_absmax, offset = scales
        named = {
            "codes": codes,
            "nested_absmax": nested_absmax,
            "offset": int(np.float32(offset).view(np.uint32)),
            "dynamic_map": codebooks.DYNAMIC_MAP,
        }
    else:
        named = {"plain": scales}
    k = 2 * packed.size // n
    code = codebooks.CODEBOOKS[quant_type].values
    return {"packed": packed, "code": code, "n": n, "k": k, "blocksize": blocksize} | named
