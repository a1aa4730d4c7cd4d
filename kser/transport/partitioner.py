"""The partition of a key, as the Java producer picks it (librdkafka calls it murmur2_random)."""

import struct
from functools import lru_cache

__all__ = ["murmur2", "partition_of"]

_MASK = 0xFFFFFFFF
_SEED = 0x9747B28C
_M = 0x5BD1E995


@lru_cache(maxsize=4096)
def murmur2(data: bytes) -> int:
    """The 32-bit murmur2 hash of ``data``, unsigned.

    Source: org.apache.kafka.common.utils.Utils.murmur2, which gives the same bits as a signed int.
    """
    words, rest = divmod(len(data), 4)
    h = _SEED ^ len(data)
    for k in struct.unpack_from(f"<{words}I", data):
        k = k * _M & _MASK
        k ^= k >> 24
        h = (h * _M ^ k * _M) & _MASK
    if rest:
        h = (h ^ int.from_bytes(data[-rest:], "little")) * _M & _MASK
    h ^= h >> 13
    h = h * _M & _MASK
    return h ^ h >> 15


def partition_of(key: bytes, partitions: int) -> int:
    """The partition, from 0, that a record with this key goes to in a topic of so many."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
