"""Zarr v3 groups on a location: their metadata, encoding one shard into objects, and a store that reads them.

Objects are encoded in memory and put by the caller, create-only; zarr itself never writes to a location. Two-dimensional
arrays are sharded (shard: all columns of `shard_rows` rows, inner chunk: those rows x 256 columns), every inner chunk
carries a checksum. Row vectors have plain chunks of the same rows.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype, cpu
from zarr.storage import MemoryStore

from storage.locations import Location

INNER_COLUMNS = 256
COMPRESSIONS = ("none", "blosc-lz4")
_ENCODING = threading.Lock()
_CHECKSUM, _PLACE = 4, 16  # bytes: of a CRC-32C; of a chunk's place in its shard's index


class MissingRows(OSError):  # noqa: N818
    """Rows, or an object that should hold them, are not in the store."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a group: its name, shape, type and fill; `attributes` are for readers."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fill: float | int
    attributes: dict[str, Any]


def build_metadata(
    specs: Iterable[ArraySpec], shard_rows: int, compression: str, attributes: dict[str, Any]
) -> dict[str, bytes]:
    """Return the group's zarr.json objects by key; the group's own, "zarr.json", comes last."""
    memory = MemoryStore()
    group = zarr.create_group(store=memory, attributes=attributes)
    checksum = [Crc32cCodec()]
    blosc = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")
    for spec in specs:
        chunks, shards = _grid(spec.shape, shard_rows)
        group.create_array(
            spec.name,
            shape=spec.shape,
            dtype=spec.dtype,
            chunks=chunks,
            shards=shards,
            compressors=[blosc, *checksum] if compression == "blosc-lz4" and shards else checksum,
            filters=None,
            fill_value=spec.fill,
            attributes=spec.attributes,
            config={"write_empty_chunks": True},
        )
    objects = {key: memory._store_dict[key].to_bytes() for key in memory._store_dict}
    return {**{key: data for key, data in objects.items() if key != "zarr.json"}, "zarr.json": objects["zarr.json"]}


def encode_shard(metadata: dict[str, bytes], values: dict[str, np.ndarray], start: int) -> dict[str, bytes]:
    """Return the objects that hold `values` from row `start` on, by key below the group, in the order of `values`."""
    memory = MemoryStore({key: cpu.Buffer.from_bytes(data) for key, data in metadata.items()})
    objects: dict[str, bytes] = {}
    # an array takes the setting up when it is opened; it is the process's, so one shard at a time
    with _ENCODING, zarr.config.set({"array.write_empty_chunks": True}):
        for name, array in values.items():
            open_array(memory, name)[start : start + len(array)] = array
    for name in values:
        keys = [key for key in memory._store_dict if key.startswith(f"{name}/c/")]
        objects |= {key: memory._store_dict[key].to_bytes() for key in sorted(keys)}
    return objects


def open_array(store: Store, name: str, mode: Any = "r+") -> zarr.Array:
    """Return one array of a group."""
    return zarr.open_array(store=store, path=name, mode=mode, zarr_format=3)


def shard_object(name: str, dimensions: int, number: int) -> str:
    """Return the key below the group of one array's shard."""
    return f"{name}/c/{number}" + "/0" * (dimensions - 1)


def chunk_bytes(size: int) -> int:
    """Return the bytes of a chunk that holds so many, with its checksum."""
    return size + _CHECKSUM


def shard_object_bytes(shard_rows: int, columns: int, itemsize: int) -> int:
    """Return the bytes of a shard's object: its inner chunks, the last one filled up, and their index."""
    inner = min(INNER_COLUMNS, columns)
    count = -(-columns // inner)
    return count * (chunk_bytes(shard_rows * inner * itemsize) + _PLACE) + _CHECKSUM


def vector_of(data: memoryview, dtype: np.dtype) -> np.ndarray:
    """Return the values of an uncompressed chunk, not copied. ValueError if its checksum is another."""
    return np.frombuffer(_checked(data), dtype)


def columns_of(view: memoryview, shard_rows: int, columns: int, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the inner chunks of an uncompressed shard, [shard_rows, 256] or fewer columns, and which columns they hold.

    Nothing is copied: for scans of many shards, which zarr's own machinery would take several times as long for.
    ValueError for a checksum that is another, and for data that are no such shard.
    """
    inner = min(INNER_COLUMNS, columns)
    count = -(-columns // inner)
    places = np.frombuffer(_checked(view[len(view) - count * _PLACE - _CHECKSUM :]), "<u8").reshape(count, 2)
    for number, (offset, size) in enumerate(places.tolist()):
        first, stop = number * inner, min((number + 1) * inner, columns)
        values = np.frombuffer(_checked(view[offset : offset + size]), dtype).reshape(shard_rows, inner)
        yield slice(first, stop), values[:, : stop - first]


def _checked(data: memoryview) -> memoryview:
    """Return data without the checksum at their end. ValueError if it is another."""
    held, found = bytes(data[-_CHECKSUM:]), google_crc32c.value(np.frombuffer(data[:-_CHECKSUM], np.uint8))
    if held != found.to_bytes(_CHECKSUM, "little"):
        raise ValueError("its checksum is another")
    return data[:-_CHECKSUM]


class LocationStore(Store):
    """What zarr reads a group through. A shard that is not there is an error unless `allow_missing`."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, location: Location, metadata: dict[str, bytes], allow_missing: bool = False) -> None:
        super().__init__(read_only=True)
        self.location, self.metadata, self.allow_missing = location, metadata, allow_missing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocationStore) and self.location == other.location

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        data = self.metadata.get(key)
        if data is None:
            if key.rpartition("/")[2] in ("zarr.json", ".zarray", ".zattrs", ".zgroup"):
                return None
            data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        return key in self.metadata or await asyncio.to_thread(self.location.exists, key)

    async def set(self, key: str, value: Buffer) -> None:
        raise PermissionError(f"{self.location.uri}/{key}: this store only reads.")

    async def delete(self, key: str) -> None:
        raise PermissionError(f"{self.location.uri}/{key}: this store only reads.")

    async def list(self) -> AsyncIterator[str]:
        for key in await asyncio.to_thread(self.location.list):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in await asyncio.to_thread(self.location.list):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        lead = f"{prefix.rstrip('/')}/" if prefix else ""
        keys = await asyncio.to_thread(self.location.list, prefix.rstrip("/"))
        for name in dict.fromkeys(key.removeprefix(lead).partition("/")[0] for key in keys):
            yield name

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        try:
            match byte_range:
                case None:
                    return self.location.read(key)
                case RangeByteRequest(start, end):
                    return self.location.read_range(key, start, end)
                case OffsetByteRequest(offset):
                    return self.location.read_range(key, offset)
                case SuffixByteRequest(suffix):
                    return self.location.read_range(key, -suffix)
        except FileNotFoundError as error:
            if self.allow_missing:
                return None
            raise MissingRows(
                f"{self.location.uri}/{key} is missing though its rows were written. Run launch/status.py --verify, then its "
                "job again."
            ) from error
        raise TypeError(f"unknown byte range {byte_range!r}")


def _grid(shape: tuple[int, ...], shard_rows: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return (chunk shape, shard shape or None) of an array."""
    if len(shape) == 1:
        return (shard_rows,), None
    inner = min(INNER_COLUMNS, shape[1])
    return (shard_rows, inner), (shard_rows, -(-shape[1] // inner) * inner)
