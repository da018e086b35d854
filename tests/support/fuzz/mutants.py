"""Malformed files from good ones: one seed, one mutant."""

import json
import random

JUNK = [
    *(None, True, False, 0, -1, 1, 1.5, 64, 2**31, 2**53 + 1, 2**63, 2**64 - 1, 10**30, -(2**63)),
    *("", "x", "\x00", "../x", "float32", "nf4", "F32", "U8", float("nan"), float("inf")),
    *([], [1], [0], [0, 0], [[]], [None], [1, 2, 3], [2**62, 4], [10**25], [1] * 40, {}, {"a": 1}),
]
DTYPES = ["U8", "I8", "BF16", "F16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "C64", "Q4", "f32"]
SUFFIXES = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "qweight", "code"]
STATE = ".quant_state.bitsandbytes__"


def split(data):
    """(header, payload) of a good file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header, payload, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def rebuild(tensors):
    """A file of (dtype, shape, bytes) by name, its header true."""
    header, payload = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        start = len(payload)
        payload += raw
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(payload)]}
    return join(header, payload)


def parts(data):
    header, payload = split(data)
    header.pop("__metadata__", None)
    return {
        name: (e["dtype"], e["shape"], payload[slice(*e["data_offsets"])])
        for name, e in header.items()
    }


def mutate(data, rng):
    """A mutant of the file `data`."""
    return rng.choice(FILE_MUTATIONS)(data, rng)


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def extend(data, rng):
    return data + rng.randbytes(rng.choice([1, 8, 100]))


def lie_about_the_length(data, rng):
    header, payload = split(data)
    size = len(json.dumps(header))
    wrong = rng.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1])
    return join(header, payload, wrong)


def flip_header(data, rng):
    length = int.from_bytes(data[:8], "little")
    return flip(data, rng.randrange(8 + length), rng)


def flip_payload(data, rng):
    length = int.from_bytes(data[:8], "little")
    return flip(data, rng.randrange(8 + length, len(data)), rng)


def flip(data, position, rng):
    mutant = bytearray(data)
    mutant[position] ^= 1 << rng.randrange(8)
    return bytes(mutant)


def no_header(data, rng):
    _, payload = split(data)
    text = rng.choice(
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"\xff\xfe",
            b'{"a":1,"a":2}',
            b"1" * 5000,
            b'{"__metadata__":3}',
        ]
    )
    return join(text, payload)


def twice(data, rng):
    header, payload = split(data)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = json.dumps({name: header[name]})[1:-1]
    return join((json.dumps(header)[:-1] + "," + entry + "}").encode(), payload)


def junk_in_the_header(data, rng):
    header, payload = split(data)
    name = rng.choice(list(header))
    where = rng.choice(["entry", "dtype", "shape", "data_offsets", "offset", "axis", "field"])
    entry = header[name]
    if where == "entry" or "dtype" not in entry:
        header[name] = rng.choice(JUNK)
    elif where == "offset":
        entry["data_offsets"][rng.randrange(2)] = rng.choice([*JUNK, 3, 100, len(payload)])
    elif where == "axis":
        entry["shape"] = [*entry["shape"], rng.choice(JUNK)]
    elif where == "field":
        entry.pop(rng.choice(list(entry)))
    else:
        entry[where] = rng.choice(JUNK + DTYPES)
    return join(header, payload)


def overlap(data, rng):
    header, payload = split(data)
    names = [n for n in header if n != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    header[one]["data_offsets"] = list(header[other]["data_offsets"])
    if rng.random() < 0.5:
        header[one]["shape"], header[one]["dtype"] = header[other]["shape"], header[other]["dtype"]
    return join(header, payload)


def remove(data, rng):
    tensors = parts(data)
    for name in rng.sample(sorted(tensors), rng.randrange(1, min(4, len(tensors)) + 1)):
        del tensors[name]
    return rebuild(tensors)


def rename(data, rng):
    tensors = parts(data)
    name = rng.choice(sorted(tensors))
    new = rng.choice(
        [
            name + "x",
            name.rpartition(".")[0] + "." + rng.choice(SUFFIXES),
            "",
            "weight",
            name.replace("nf4", "fp4"),
            name.replace("weight", "other"),
            "a\x00b",
            "." * 300,
            name * 200,
            STATE,
            f"x{STATE}nf4",
            "weight.SCB",
            "\udc80",
        ]
    )
    return rebuild({new if key == name else key: value for key, value in tensors.items()})


def swap(data, rng):
    tensors = parts(data)
    one, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return rebuild(tensors)


def resize(data, rng):
    """Another length or form of one tensor, its header true."""
    tensors = parts(data)
    name = rng.choice(sorted(tensors))
    dtype, shape, raw = tensors[name]
    size = len(raw) // max(1, _product(shape))
    count = max(0, _product(shape) + rng.choice([-1, 1, -_product(shape), 7]))
    raw = (raw + bytes(size * 8))[: count * size]
    forms = [[count], [count, 1], [1, count], [0, 10**6], []]
    form = rng.choice([f for f in forms if _product(f) == count] or [[count]])
    tensors[name] = dtype, form, raw
    return rebuild(tensors)


def recast(data, rng):
    """Another dtype of as many bytes."""
    tensors = parts(data)
    name = rng.choice(sorted(tensors))
    _, _, raw = tensors[name]
    dtype, size = rng.choice(
        [
            ("I8", 1),
            ("BOOL", 1),
            ("F16", 2),
            ("BF16", 2),
            ("I32", 4),
            ("F64", 8),
            ("U64", 8),
            ("F8_E5M2", 1),
        ]
    )
    count = len(raw) // size
    tensors[name] = dtype, rng.choice([[count], [count, 1]]), raw[: count * size]
    return rebuild(tensors)


def junk_in_the_state(data, rng):
    """The JSON of a quant_state: wrong kinds, wrong numbers, missing or extra keys."""
    tensors = parts(data)
    names = [name for name in tensors if STATE in name]
    if not names:
        return truncate(data, rng)
    name = rng.choice(names)
    info = json.loads(tensors[name][2])
    kind = rng.randrange(7)
    key = rng.choice(list(info))
    if kind == 0:
        info[key] = rng.choice(JUNK)
    elif kind == 1:
        del info[key]
    elif kind == 2:
        info[rng.choice(["absmax", "x", "code", "packed"])] = rng.choice(JUNK)
    elif kind == 3:
        info["shape"] = [
            rng.choice([1, 2, 3, 64, 2**20, 2**40, 10**18]) for _ in range(rng.randrange(5))
        ]
    elif kind == 4:
        info["blocksize"] = rng.choice([0, 1, 16, 32, 63, 128, 4096, 8192, 64.0, "64", 10**20])
    elif kind == 5:
        info["dtype"] = rng.choice(
            ["float64", "bfloat16", "float16", "int8", "f4", ">f4", "(2,)f4", ","]
        )
    else:
        info["shape"] = info["shape"][::-1]
    text = json.dumps(info).encode()
    if rng.random() < 0.1:
        text = rng.choice([b"", b"[]", b"{", b"null", b"\xff", b"9" * 5000, b"[" * 4000, text * 2])
    tensors[name] = "U8", [len(text)], text
    return rebuild(tensors)


def _product(shape):
    count = 1
    for n in shape:
        count *= n
    return count


FILE_MUTATIONS = [
    *(truncate, extend, lie_about_the_length, flip_header, flip_payload, no_header, twice),
    *(junk_in_the_header, junk_in_the_header, overlap, remove, rename, swap, resize, recast),
    *(junk_in_the_state, junk_in_the_state, junk_in_the_state),
]


def mutate_json(value, rng, depth=0):
    """A copy of a JSON value with one thing in it exchanged, removed, added or made deep."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.7):
        copy = dict(value)
        key = rng.choice(list(copy))
        action = rng.random()
        if action < 0.15:
            del copy[key]
        elif action < 0.3:
            copy[rng.choice(["x", "quantization_config", "rope_parameters"])] = rng.choice(JUNK)
        elif action < 0.5:
            copy[key] = mutate_json(copy[key], rng, depth + 1)
        else:
            copy[key] = rng.choice(JUNK)
        return copy
    return rng.choice(JUNK)


def json_text(value, rng):
    """The text of a JSON file, now and then cut or no JSON at all."""
    text = json.dumps(value).encode()
    if rng.random() < 0.1:
        return rng.choice(
            [b"", text[: len(text) // 2], b"\xff" + text, b"[" * 100_000, b"[]", b"3"]
        )
    return text


__all__ = ["join", "json_text", "mutate", "mutate_json", "random"]
