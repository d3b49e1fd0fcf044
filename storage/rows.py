"""Rows of a corpus as Arrow tables and back: plain Python records and numpy arrays on one side, Parquet on the other.

A 1-D array is a list column. An array of more dimensions is a struct of `shape` and flat `data`, which any reader of
Parquet understands. The types come from a first batch of rows; later rows must fit them.
"""

from typing import Any

import numpy as np
import pyarrow as pa

OWN = {  # the columns that we add, in this order; an original field of such a name gets a trailing underscore
    "id": pa.int64(),  # base of the segment + row
    "source_id": pa.string(),  # the corpus's own id, else the record's running number
    "doc_id": pa.int64(),  # running number of the record; all chunks of a document share it
    "chunk": pa.int32(),  # number of the chunk in its document
    "length": pa.int32(),  # tokens, 1 without input_ids
}
_STAY, _BLANK = ("id", "doc_id", "chunk"), {"length": 0}  # of an erased row
ENCODED = "encoded"  # struct column of what the task's encode returned


def rename_field(name: str) -> str:
    """Return the column that keeps an original field."""
    return f"{name}_" if name in OWN or name == ENCODED else name


def infer_schema(rows: list[dict[str, Any]], places: list[str]) -> pa.Schema:
    """Return the schema of a first batch of rows: own columns, original fields, struct `encoded` if it has fields.

    A field that is null in all of them becomes a string. ValueError names a field of mixed types and where it stands.
    """
    originals = [{name: value for name, value in row.items() if name not in OWN and name != ENCODED} for row in rows]
    encoded = [row[ENCODED] for row in rows]
    fields = [pa.field(name, kind, nullable=False) for name, kind in OWN.items()]
    fields += _infer_fields(originals, places)
    inner = _infer_fields(encoded, places)
    return pa.schema([*fields, pa.field(ENCODED, pa.struct(inner))] if inner else fields)  # Parquet has no empty struct


def to_batch(rows: list[dict[str, Any]], schema: pa.Schema, places: list[str]) -> pa.RecordBatch:
    """Return rows as a batch of the schema; a missing field is null.

    ValueError names a field that the schema lacks or whose type does not fit, and where (`places`, one per row).
    """
    _refuse_new_fields(rows, {*schema.names, ENCODED}, places)
    kind = schema.field(ENCODED).type if ENCODED in schema.names else pa.struct([])
    names = [kind.field(i).name for i in range(kind.num_fields)]
    encoded = [row[ENCODED] for row in rows]
    _refuse_new_fields(encoded, set(names), places)
    columns = [_column(name, rows, schema.field(name).type, places) for name in schema.names if name != ENCODED]
    parts = [_column(name, encoded, kind.field(name).type, places) for name in names]
    if names:
        columns.append(pa.StructArray.from_arrays(parts, fields=list(kind)))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def blanked(batch: pa.RecordBatch, ids: frozenset[int]) -> pa.RecordBatch:
    """Return rows of which those with these ids hold nothing but id, doc_id and chunk: empty texts, nulls, length 0."""
    erased = np.isin(batch.column("id").to_numpy(), np.fromiter(ids, np.int64, len(ids)))
    if not erased.any():
        return batch
    kept = pa.array(np.where(erased, len(erased), np.arange(len(erased))))  # the place of the blank, or a row's own
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        blank = pa.array([_BLANK.get(name, "" if pa.types.is_string(column.type) else None)], column.type)
        columns.append(column if name in _STAY else pa.concat_arrays([column, blank]).take(kept))
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def from_table(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows as dicts: original fields, then encoded ones over them, then id, source_id, doc_id, chunk, length.

    Lists of numbers come back as numpy arrays of the stored type, flat arrays with a shape as ndarrays.
    """
    columns = {name: from_column(table.column(name)) for name in table.column_names if name != ENCODED}
    if ENCODED in table.column_names:
        struct = table.column(ENCODED).combine_chunks()
        for i in range(struct.type.num_fields):
            name = struct.type.field(i).name
            columns.setdefault(name, [])
            if name not in OWN:
                columns[name] = from_column(struct.field(i))
    names = list(columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def from_column(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Return one Python value or numpy array per row, None for a null."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if _is_numbers(array.type):
        return _split(array)
    if _is_tensor(array.type):
        parts = dict(zip([f.name for f in array.type], array.flatten(), strict=True))  # flatten hands nulls down
        shapes, flats = _split(parts["shape"]), _split(parts["data"])
        return [None if d is None or s is None else d.reshape(s) for s, d in zip(shapes, flats, strict=True)]
    return array.to_pylist()


def _infer_fields(records: list[dict[str, Any]], places: list[str]) -> list[pa.Field]:
    names = dict.fromkeys(name for record in records for name in record)
    return [pa.field(name, _infer(name, [r.get(name) for r in records], places)) for name in names]


def _infer(name: str, values: list[Any], places: list[str]) -> pa.DataType:
    try:
        kind = pa.array([_to_arrow(value) for value in values]).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        kinds: dict[str, str] = {}
        for value, place in zip(values, places, strict=True):
            kinds.setdefault(type(value).__name__, place)
        seen = ", ".join(f"{kind} ({place})" for kind, place in kinds.items() if kind != "NoneType")
        raise ValueError(f"field {name!r} must have one type in every record, has {seen}: {error}") from error
    return pa.string() if pa.types.is_null(kind) else kind


def _column(name: str, records: list[dict[str, Any]], kind: pa.DataType, places: list[str]) -> pa.Array:
    values = [_to_arrow(record.get(name)) for record in records]
    try:
        return _convert(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        for value, place in zip(values, places, strict=True):
            try:
                _convert([value], kind)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                sentence = f"{place}: field {name!r} must be {kind} as in the first records, is {_excerpt(value)}"
                raise ValueError(f"{sentence}. Give every record the same type.") from error
        raise


def _convert(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_integer(kind.value_type if pa.types.is_list(kind) else kind):
        pa.array(values).cast(kind)  # refuses 0.5, which the conversion below would cut to 0
    return pa.array(values, type=kind)


def _refuse_new_fields(records: list[dict[str, Any]], known: set[str], places: list[str]) -> None:
    for record, place in zip(records, places, strict=True):
        new = [name for name in record if name not in known]
        if new:
            allowed = ", ".join(sorted(known - OWN.keys() - {ENCODED})) or "none"
            raise ValueError(f"{place}: field {new[0]!r} is not in the first records, which have: {allowed}.")


def _to_arrow(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.ndim != 1:
        return {"shape": np.array(value.shape, np.int32), "data": np.ascontiguousarray(value).reshape(-1)}
    return value


def _is_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and (
        pa.types.is_integer(kind.value_type)
        or pa.types.is_floating(kind.value_type)
        or pa.types.is_boolean(kind.value_type)
    )


def _is_tensor(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"shape", "data"}


def _split(array: pa.ListArray) -> list[np.ndarray | None]:
    values = array.values.to_numpy(zero_copy_only=False)
    offsets = array.offsets.to_numpy()
    present = array.is_valid().to_numpy(zero_copy_only=False)
    return [values[a:b].copy() if ok else None for a, b, ok in zip(offsets, offsets[1:], present, strict=False)]


def _excerpt(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
