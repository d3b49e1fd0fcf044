"""The gradient store: per checkpoint and segment, one Zarr v3 group of gradient rows, losses, norms and states.

    gradients/store.json                                  StoreSettings; a later collect that differs is refused
    gradients/<set>/<checkpoint>/<segment>/<array>/c/...  rows [n, D] (one array per module without a projection),
                                                          row_scale [n] (float16 only), losses [n], norms [n, modules],
                                                          state [n]: 0 missing, 1 done, 2 quarantined, 3 erased
                                                          (both all NaN)

A float16 row's values are rows x row_scale. One unit writes whole shards, create-only, `state` last; the done-record is the
journal's affair.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from storage.locations import Buffer, Location, ObjectConflict, ObjectRecord
from storage.precision import NAN_BFLOAT16, STORED, from_stored, row_scales, to_stored
from storage.zarr_groups import (
    COMPRESSIONS,
    ArraySpec,
    LocationStore,
    MissingRows,
    build_metadata,
    columns_of,
    encode_shard,
    open_array,
    shard_object,
    vector_of,
)

MISSING, DONE, QUARANTINED, ERASED = 0, 1, 2, 3
VECTORS = ("row_scale", "losses", "norms", "state")
VECTOR_TYPES: dict[str, np.dtype[Any]] = {
    "row_scale": np.dtype(np.float32), "losses": np.dtype(np.float64), "state": np.dtype(np.uint8)
}  # fmt: skip
SHARD_BYTES = 16 << 20
SETTINGS_KEY = "gradients/store.json"


class StoreMismatch(OSError):  # noqa: N818
    """The store was built with other settings."""


class DamagedRows(OSError):  # noqa: N818
    """An object of the store does not decode or fails its checksum."""


@dataclass(frozen=True)
class StoreSettings:
    """What every row of a store has in common; store.json holds it."""

    arrays: dict[str, int]  # name -> columns: {"rows": D}, or one per module
    ranges: list[dict[str, Any]]  # which columns of which array belong to which module
    modules: list[str]  # columns of norms
    dtype: str = "float16"  # or float32, bfloat16
    compression: str = "none"  # or blosc-lz4
    norms: bool = True
    extra: dict[str, Any] = field(default_factory=dict)  # projection, seed and whatever else must agree

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            raise ValueError(f"gradients.dtype={self.dtype!r} is not allowed: must be one of {', '.join(STORED)}.")
        if self.compression not in COMPRESSIONS:
            allowed = ", ".join(COMPRESSIONS)
            raise ValueError(f"gradients.compression={self.compression!r} is not allowed: must be one of {allowed}.")
        if self.norms and not self.modules:
            raise ValueError("norms without modules are not allowed: name the modules, or set norms to false.")
        for name, columns in self.arrays.items():
            if name in VECTORS or "/" in name or columns < 1:
                raise ValueError(
                    f"array {name!r} with {columns} columns is not allowed: reserved name, slash or empty."
                )


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of one segment under one checkpoint."""

    rows: dict[str, np.ndarray]  # each float32 [n, D]
    losses: np.ndarray  # float64 [n]
    norms: np.ndarray | None  # float32 [n, modules]
    state: np.ndarray  # uint8 [n]

    @property
    def nbytes(self) -> int:
        norms = 0 if self.norms is None else self.norms.nbytes
        return sum(rows.nbytes for rows in self.rows.values()) + self.losses.nbytes + norms + self.state.nbytes


@dataclass
class GradientStore:
    """A run's gradients. Picklable; what it remembers of a group is its metadata."""

    run: Location
    settings: StoreSettings
    _groups: dict[str, tuple[int, int, dict[str, bytes]]] = field(default_factory=dict, repr=False)

    @classmethod
    def create(cls, run: Location, settings: StoreSettings) -> "GradientStore":
        """Return the run's store, new or with the same settings. StoreMismatch names the first that differs."""
        try:
            run.create_json(SETTINGS_KEY, asdict(settings))
        except ObjectConflict:
            cls.open(run).check(settings)
        return cls.open(run)

    @classmethod
    def open(cls, run: Location) -> "GradientStore":
        """Return the run's store. FileNotFoundError if none was created."""
        if not run.exists(SETTINGS_KEY):
            raise FileNotFoundError(f"{run.uri} has no gradient store. Collect gradients first, or check run.store.")
        return cls(run, StoreSettings(**run.read_json(SETTINGS_KEY)))

    def check(self, settings: StoreSettings) -> None:
        """Raise StoreMismatch naming the first setting in which the store differs from these."""
        stored, asked = (json.loads(json.dumps(asdict(one))) for one in (self.settings, settings))
        causes = ("extra", "modules")  # before what follows from them: columns and their ranges
        order = {key: stored[key] for key in [*causes, *stored]}
        _refuse_difference(self.run, order, asked)

    def prepare(self, set_name: str, checkpoint: str, segment: str, rows: int, shard_rows: int) -> None:
        """Make the group of `rows` rows; one that is there with the same shape is fine, also made at the same time.

        A segment shorter than `shard_rows` gets shards of its own length, one without rows no group. Metadata follows
        from the shape: what of it is missing or damaged is written again. StoreMismatch for another shape.
        """
        if not rows:
            return
        shard_rows = min(shard_rows, rows)
        group = _group_key(set_name, checkpoint, segment)
        try:
            _refuse_other_shape(self.run, group, self._load(group)[:2], (rows, shard_rows))
        except StoreMismatch:
            raise
        except (OSError, KeyError, TypeError):  # not there yet, or damaged: it is written below
            pass
        for key, data in self.metadata(rows, shard_rows).items():
            try:
                self.run.create(f"{group}/{key}", data)
            except ObjectConflict:
                self.run.replace(f"{group}/{key}", data)

    def write(self, set_name: str, checkpoint: str, segment: str, start: int, block: RowBlock) -> list[ObjectRecord]:
        """Write the one shard that begins at row `start` and return its objects' records.

        Quarantined rows become NaN. ObjectConflict if another writer left other bytes: `delete_shard`, then again.
        ValueError for a block that is not exactly that shard, or has a non-finite row not marked as quarantined.
        """
        group = _group_key(set_name, checkpoint, segment)
        rows, shard_rows, metadata = self._load(group)
        self._check(block, start, rows, shard_rows)
        objects = encode_shard(metadata, self._stored_values(block), start)
        for key, data in objects.items():
            self.run.create(f"{group}/{key}", data)
        return [ObjectRecord.of(f"{group}/{key}", data) for key, data in objects.items()]

    def delete_shard(self, set_name: str, checkpoint: str, segment: str, start: int) -> None:
        """Remove the objects of the shard that begins at row `start`, `state` first."""
        group = _group_key(set_name, checkpoint, segment)
        number = start // self._load(group)[1]
        for name, dimensions in reversed(self.dimensions().items()):
            self.run.delete(f"{group}/{shard_object(name, dimensions, number)}")

    def blank_shard(
        self, set_name: str, checkpoint: str, segment: str, target: str, start: int, erased: np.ndarray
    ) -> list[ObjectRecord]:
        """Write one shard, less its erased rows (bool [n]), into another generation of its segment; return the records.

        The other rows keep their stored bits. Errors as for `read`.
        """
        group, new = _group_key(set_name, checkpoint, segment), _group_key(set_name, checkpoint, target)
        rows, shard_rows, metadata = self._load(group)
        store, stop = LocationStore(self.run.child(group), metadata), min(start + shard_rows, rows)
        values = {name: _read(store, name, start, stop) for name in self.dimensions()}
        nan = NAN_BFLOAT16 if self.settings.dtype == "bfloat16" else np.nan
        for name, array in values.items():
            array[erased] = ERASED if name == "state" else nan if name in self.settings.arrays else np.nan
        objects = encode_shard(self._load(new)[2], values, start)
        for key, data in objects.items():
            self.run.create(f"{new}/{key}", data)
        return [ObjectRecord.of(f"{new}/{key}", data) for key, data in objects.items()]

    def read(self, set_name: str, checkpoint: str, segment: str, start: int, stop: int) -> RowBlock:
        """Return rows start:stop. MissingRows names the shard or object that is not there, DamagedRows one that rots."""
        group = _group_key(set_name, checkpoint, segment)
        rows, shard_rows, metadata = self._load(group)
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start}:{stop} of {group} are not allowed: it has {rows}.")
        location = self.run.child(group)
        state = _read(LocationStore(location, metadata, allow_missing=True), "state", start, stop)
        if (state == MISSING).any():
            first = (start + int(np.argmax(state == MISSING))) // shard_rows * shard_rows
            shard = f"rows {first}:{min(first + shard_rows, rows)} of {location.uri}"
            raise MissingRows(f"{shard} are missing. Run launch/status.py --verify, then its job again.")
        store = LocationStore(location, metadata)
        scales = _read(store, "row_scale", start, stop) if self.settings.dtype == "float16" else None
        dtype = self.settings.dtype
        return RowBlock(
            {name: from_stored(_read(store, name, start, stop), dtype, scales) for name in self.settings.arrays},
            _read(store, "losses", start, stop),
            _read(store, "norms", start, stop) if self.settings.norms else None,
            state,
        )

    def stored_columns(
        self, set_name: str, checkpoint: str, segment: str, start: int, buffer: Buffer
    ) -> Iterator[tuple[str, slice, np.ndarray]]:
        """Yield the one shard that begins at row `start` as it is stored, some columns of an array at a time.

        They are not copied: `buffer` holds them until the next array. Only without compression. FileNotFoundError and
        ValueError for what `read` has a name for.
        """
        for name, columns in self.settings.arrays.items():
            data, rows, shard_rows = self._object(set_name, checkpoint, segment, start, name, buffer)
            for where, values in columns_of(data, shard_rows, columns, STORED[self.settings.dtype]):
                yield name, where, values[:rows]

    def vectors(self, set_name: str, checkpoint: str, segment: str, start: int) -> dict[str, np.ndarray]:
        """Return state, losses, and norms and row_scale where the store has them, of the same shard. Errors likewise."""
        found = {}
        for name, dimensions in self.dimensions().items():
            if name in self.settings.arrays:
                continue
            data, rows, shard_rows = self._object(set_name, checkpoint, segment, start, name, Buffer())
            if dimensions == 1:
                found[name] = vector_of(data, VECTOR_TYPES[name])[:rows]
            else:
                width = len(self.settings.modules)
                parts = columns_of(data, shard_rows, width, np.dtype(np.float32))
                found[name] = np.concatenate([values[:rows] for _, values in parts], 1)
        return found

    def _object(
        self, set_name: str, checkpoint: str, segment: str, start: int, name: str, buffer: Buffer
    ) -> tuple[memoryview, int, int]:
        """Return an array's object of a shard, the rows that it has, and those that it has room for.

        The bytes may be written to, as torch wants of an array that it shares.
        """
        group = _group_key(set_name, checkpoint, segment)
        rows, shard_rows, _ = self._load(group)
        key = shard_object(name, self.dimensions()[name], start // shard_rows)
        return self.run.read_into(f"{group}/{key}", buffer), min(shard_rows, rows - start), shard_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": {}}

    def _load(self, group: str) -> tuple[int, int, dict[str, bytes]]:
        """Return (rows, shard rows, metadata) of a group; metadata follows from the first two."""
        if group not in self._groups:
            if not self.run.exists(f"{group}/zarr.json"):
                raise MissingRows(
                    f"{self.run.uri}/{group} is missing. Run launch/status.py --verify, then its job again."
                )
            stored = self.run.read_json(f"{group}/zarr.json")["attributes"]
            metadata = self.metadata(stored["rows"], stored["shard_rows"])
            self._groups[group] = (stored["rows"], stored["shard_rows"], metadata)
        return self._groups[group]

    def metadata(self, rows: int, shard_rows: int) -> dict[str, bytes]:
        """Return a group's objects of metadata by key: they follow from settings and shape."""
        settings = self.settings
        nan = NAN_BFLOAT16 if settings.dtype == "bfloat16" else float("nan")
        specs = [
            ArraySpec(name, (rows, columns), STORED[settings.dtype], nan, {"dtype": settings.dtype})
            for name, columns in settings.arrays.items()
        ]
        if settings.dtype == "float16":
            specs.append(ArraySpec("row_scale", (rows,), np.dtype(np.float32), float("nan"), {}))
        specs.append(ArraySpec("losses", (rows,), np.dtype(np.float64), float("nan"), {}))
        if settings.norms:
            shape = (rows, len(settings.modules))
            specs.append(ArraySpec("norms", shape, np.dtype(np.float32), float("nan"), {"modules": settings.modules}))
        specs.append(ArraySpec("state", (rows,), np.dtype(np.uint8), MISSING, {}))
        attributes = {"rows": rows, "shard_rows": shard_rows, "ranges": settings.ranges}
        return build_metadata(specs, shard_rows, settings.compression, attributes)

    def dimensions(self) -> dict[str, int]:
        """Return each array's number of dimensions, in the order in which a shard is written."""
        scale = {"row_scale": 1} if self.settings.dtype == "float16" else {}
        norms = {"norms": 2} if self.settings.norms else {}
        return {**dict.fromkeys(self.settings.arrays, 2), **scale, "losses": 1, **norms, "state": 1}

    def _stored_values(self, block: RowBlock) -> dict[str, np.ndarray]:
        bad = (block.state != DONE)[:, None]
        rows = {name: np.where(bad, np.float32("nan"), block.rows[name]) for name in self.settings.arrays}
        scales = row_scales(rows) if self.settings.dtype == "float16" else None
        values = {name: to_stored(array, self.settings.dtype, scales) for name, array in rows.items()}
        if scales is not None:
            values["row_scale"] = scales
        values["losses"] = block.losses
        if block.norms is not None:
            values["norms"] = np.where(bad, np.float32("nan"), block.norms)
        return {**values, "state": block.state}

    def _check(self, block: RowBlock, start: int, rows: int, shard_rows: int) -> None:
        count = min(shard_rows, rows - start)
        if start % shard_rows or count <= 0:
            raise ValueError(f"row {start} begins no shard: must be a multiple of {shard_rows} below {rows}.")
        expected: dict[str, tuple[np.ndarray | None, tuple[int, ...], type]] = {
            **{name: (block.rows.get(name), (count, d), np.float32) for name, d in self.settings.arrays.items()},
            "losses": (block.losses, (count,), np.float64),
            "state": (block.state, (count,), np.uint8),
        }
        if self.settings.norms:
            expected["norms"] = (block.norms, (count, len(self.settings.modules)), np.float32)
        for name, (array, shape, dtype) in expected.items():
            if array is None or array.shape != shape or array.dtype != dtype:
                found = "absent" if array is None else f"{array.dtype} {list(array.shape)}"
                raise ValueError(
                    f"{name} of the shard at row {start} is {found}, must be {dtype.__name__} {list(shape)}."
                )
        _refuse_unmarked(block, start)


def altered_metadata(run: Location) -> tuple[int, dict[str, str]]:
    """Return how many objects of metadata a run's store has, and by key what is wrong with those that were changed.

    Metadata follows from settings and shape, so that the next collect writes it again.
    """
    if not run.exists(SETTINGS_KEY):
        return 0, {}
    store = GradientStore.open(run)
    looked, wrong = 0, dict[str, str]()
    for group in {"/".join(key.split("/")[:4]): None for key in run.list("gradients") if key.count("/") > 3}:
        try:
            metadata = store._load(group)[2]
        except (OSError, KeyError, TypeError) as error:
            wrong[f"{group}/zarr.json"] = "is missing" if isinstance(error, MissingRows) else "does not parse"
            continue
        looked += len(metadata)
        for key, data in metadata.items():
            try:
                if run.read(f"{group}/{key}") != data:
                    wrong[f"{group}/{key}"] = "is altered"
            except FileNotFoundError:
                wrong[f"{group}/{key}"] = "is missing"
    return looked, wrong


def shard_rows_for(columns: int, itemsize: int) -> int:
    """Return the rows of a shard of at most 16 MiB: a power of two from 32 to 8192."""
    fitting = max(SHARD_BYTES // (columns * itemsize), 1)
    return min(max(1 << (fitting.bit_length() - 1), 32), 8192)


def _group_key(set_name: str, checkpoint: str, segment: str) -> str:
    return f"gradients/{set_name}/{checkpoint}/{segment}"


def _read(store: LocationStore, name: str, start: int, stop: int) -> np.ndarray:
    try:
        return np.asarray(open_array(store, name, "r")[start:stop])
    except (ValueError, RuntimeError) as error:
        raise DamagedRows(
            f"{name} rows {start}:{stop} of {store.location.uri} are damaged: {error}. "
            "Run launch/status.py --verify, then its job again."
        ) from error


def _refuse_unmarked(block: RowBlock, start: int) -> None:
    unknown = ~np.isin(block.state, (DONE, QUARANTINED, ERASED))
    if unknown.any():
        row = int(np.argmax(unknown))
        raise ValueError(
            f"row {start + row} has state {block.state[row]}: must be 1 (done), 2 (quarantined) or 3 (erased)."
        )
    finite = np.isfinite(block.losses)
    for array in [*block.rows.values(), *([] if block.norms is None else [block.norms])]:
        finite &= np.isfinite(array).all(axis=1)
    unmarked = ~finite & (block.state == DONE)
    if unmarked.any():
        raise ValueError(f"row {start + int(np.argmax(unmarked))} is not finite but marked as done: quarantine it.")


def _refuse_other_shape(run: Location, group: str, stored: tuple[int, ...], asked: tuple[int, ...]) -> None:
    if stored != asked:
        made = f"{run.uri}/{group} was made with {stored[0]} rows in shards of {stored[1]}"
        raise StoreMismatch(f"{made}, this run has {asked[0]} in shards of {asked[1]}. Use another run.")


def _refuse_difference(run: Location, stored: Any, asked: Any, name: str = "gradients") -> None:
    """Raise StoreMismatch naming the first setting that differs, if one does."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*stored, *asked]):
            inner = name if key == "extra" else "run.seed" if key == "seed" else f"{name}.{key}"
            _refuse_difference(run, stored.get(key), asked.get(key), inner)
    elif stored != asked:
        built = f"store {run.uri} was built with {name}={_short(stored)}, this run has {_short(asked)}"
        raise StoreMismatch(f"{built}. Use another run, or {name}={_short(stored)}.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
