"""How many bytes a group of the gradient store takes, before there is one."""

from storage.gradients import VECTOR_TYPES, GradientStore, StoreSettings
from storage.locations import Location
from storage.precision import STORED
from storage.zarr_groups import chunk_bytes, shard_object_bytes


def group_bytes(settings: StoreSettings, rows: int, shard_rows: int) -> int:
    """Return the bytes that a group of `rows` rows takes in the store, metadata included: exact without compression."""
    shard_rows = min(shard_rows, rows)
    store = GradientStore(Location(""), settings)
    total = sum(len(data) for data in store.metadata(rows, shard_rows).values())
    for name in store.dimensions():
        if name in VECTOR_TYPES:
            each = chunk_bytes(shard_rows * VECTOR_TYPES[name].itemsize)
        elif name == "norms":
            each = shard_object_bytes(shard_rows, len(settings.modules), 4)
        else:
            each = shard_object_bytes(shard_rows, settings.arrays[name], STORED[settings.dtype].itemsize)
        total += each * -(-rows // shard_rows)
    return total
