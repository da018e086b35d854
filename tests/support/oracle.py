"""The rules of 4-bit quantization a second time: in numpy, one block after another."""

import ml_dtypes
import numpy as np

F32 = np.float32
TINY = np.finfo(F32).smallest_normal

NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    F32,
)
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], F32) / F32(12)
FP4[8] = 0.0
CODE = {"nf4": NF4, "fp4": FP4}
# In ascending order of value; a value on the midpoint of two neighbours takes the lower one.
ORDER = {"nf4": list(range(16)), "fp4": [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]}
ZERO = {"nf4": 7, "fp4": 0}

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def midpoints(ascending):
    return (ascending[:-1] + ascending[1:]) / F32(2)


def flush(x):
    """XLA's arithmetic has no subnormals."""
    return np.where(np.abs(x) < TINY, F32(0), x)


def scale_block(block, blocksize):
    """A block scaled to [-1, 1], and the largest magnitude in it."""
    absmax = np.abs(block).max()
    with np.errstate(all="ignore"):
        if flush(absmax) == 0:
            scaled = np.zeros_like(block)
        elif len(block) < blocksize or absmax > 2.0**126:  # partial, or the reciprocal is subnormal
            scaled = flush(block) / absmax
        else:
            scaled = flush(block) * (F32(1) / absmax)
    return flush(scaled), absmax


def interval(scaled, ascending):
    """How many midpoints lie below each value; all of them for NaN."""
    return (~(scaled[:, None] <= midpoints(ascending))).sum(1)


def quantize(w, quant_type, blocksize):
    """(packed uint8, absmax float32), both flat."""
    flat = np.asarray(w).astype(F32).ravel()
    order = np.array(ORDER[quant_type], np.uint8)
    codes, scales = [], []
    for start in range(0, flat.size, blocksize):
        scaled, absmax = scale_block(flat[start : start + blocksize], blocksize)
        codes.append(order[interval(scaled, CODE[quant_type][order])])
        scales.append(absmax)
    if flat.size % 2:
        codes.append(np.array([ZERO[quant_type]], np.uint8))
    codes = np.concatenate(codes)
    return codes[::2] << 4 | codes[1::2], np.array(scales, F32)


def quantize_scales(absmax, offset, dynamic_map):
    """(codes uint8, nested_absmax float32) by the exact rule, for a given offset."""
    centred = absmax.astype(F32).ravel() - F32(offset)
    codes, scales = [], []
    for start in range(0, centred.size, 256):
        scaled, largest = scale_block(centred[start : start + 256], 256)
        # A block without any deviation: bitsandbytes writes code 0, of a scale that is 0.
        codes += list(interval(scaled, dynamic_map)) if largest else [0] * len(scaled)
        scales.append(largest)
    return np.array(codes, np.uint8), np.array(scales, F32)


def decode_scales(codes, nested_absmax, offset, dynamic_map):
    """Float32 scales: a product, then a sum, each rounded."""
    return dynamic_map[codes.ravel()] * np.repeat(nested_absmax, 256)[: codes.size] + F32(offset)


def dequantize(packed, absmax, quant_type, blocksize, shape, dtype):
    """Code times scale in float32, rounded once."""
    packed = np.asarray(packed).ravel()
    codes = np.stack([packed >> 4, packed & 15], axis=1).ravel()[: np.prod(shape, dtype=int)]
    scales = np.repeat(np.asarray(absmax).ravel(), blocksize)[: codes.size]
    with np.errstate(all="ignore"):
        return flush(CODE[quant_type][codes] * scales).astype(DTYPES[dtype]).reshape(shape)


def same_bits(a, b):
    """Equal bytes, any NaN counting as any other."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nans = (a != a) & (b != b)
    unsigned = f"u{a.dtype.itemsize}"
    return bool(((a.view(unsigned) == b.view(unsigned)) | nans).all())
