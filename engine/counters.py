"""Random numbers addressed by position: the same on every worker, device, batch and library version.

Owns the derivation of keys from names and the map from (key, position) to bits, signs and normals. Philox is a
counter-based generator (Salmon et al. 2011), so position 10^12 costs no more than position 0 and nothing is stored.
"""

import hashlib
import math

import numpy as np

_BLOCK = 4  # uint64 words that one Philox counter yields
_CHUNK = 1 << 22  # positions drawn at a time: bounds the float64 scratch memory


def derive_key(*names: int | str) -> int:
    """Return a 128-bit key for a named stream; the run's seed comes first, then what the stream is for."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def words(key: int, start: int, count: int) -> np.ndarray:
    """Return uint64 [count]: the words at positions start, start + 1, … of the stream."""
    first = start // _BLOCK
    skip = start - first * _BLOCK
    stream = np.random.Philox(key=key, counter=first)
    return stream.random_raw(skip + count)[skip:]


def normals(key: int, start: int, count: int) -> np.ndarray:
    """Return float64 [count] standard normals at the given positions (Box-Muller on pairs of words)."""
    out = np.empty(count, dtype=np.float64)
    for begin in range(0, count, _CHUNK):
        size = min(_CHUNK, count - begin)
        first = (start + begin) // 2 * 2
        skip = start + begin - first
        pairs = words(key, first, (skip + size + 1) // 2 * 2).reshape(-1, 2)
        uniform = ((pairs >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53  # in (0, 1]: its logarithm is finite
        radius = np.sqrt(-2.0 * np.log(uniform[:, 0]))
        angle = 2.0 * math.pi * uniform[:, 1]
        both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
        out[begin : begin + size] = both[skip : skip + size]
    return out


def signs(key: int, start: int, count: int) -> np.ndarray:
    """Return int8 [count] of fair ±1 at the given positions, one bit each."""
    first = start // 64
    skip = start - first * 64
    drawn = words(key, first, (skip + count + 63) // 64).astype("<u8")
    bits = np.unpackbits(drawn.view(np.uint8), bitorder="little")[skip : skip + count]
    return bits.astype(np.int8) * 2 - 1


def permutation(key: int, count: int) -> np.ndarray:
    """Return int64 [count]: a shuffled order of 0 … count − 1."""
    return np.argsort(words(key, 0, count), kind="stable")
