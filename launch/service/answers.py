"""Answers as JSON or as an Arrow stream, whichever the request accepts."""

import json
from typing import Any

import orjson
import pyarrow as pa
from fastapi import Request
from fastapi.responses import Response

ARROW = "application/vnd.apache.arrow.stream"
_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_BRIEF = [("source_id", _TEXT), ("label", _TEXT), ("snippet", _TEXT)]
QUERIES = pa.schema(
    [("query", _INT), ("predicted", _TEXT), ("misclassified", pa.bool_()), ("loss", _FLOAT), *_BRIEF]
)  # fmt: skip
INFLUENCES = pa.schema([("side", _TEXT), ("rank", _INT), ("id", _INT), ("score", _FLOAT), *_BRIEF])
INFLUENCED = pa.schema([*QUERIES, ("side", _TEXT), ("rank", _INT), ("score", _FLOAT)])
EXAMPLES = pa.schema(
    [
        ("id", _INT),
        ("self_influence", _FLOAT),
        ("total", _FLOAT),
        ("loss", _FLOAT),
        ("quarantined", pa.bool_()),
        *_BRIEF,
    ]
)


def to_json(value: Any) -> bytes:
    """Return plain data as UTF-8 JSON. Numbers beyond 64 bits, which a corpus may hold, take the slow way."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return json.dumps(value, ensure_ascii=True, allow_nan=False).encode()


def wants_arrow(request: Request) -> bool:
    return ARROW in request.headers.get("accept", "")


def answer(value: Any, status: int = 200) -> Response:
    """Return plain data as a JSON response."""
    return Response(to_json(value), status, media_type="application/json")


def listing(request: Request, rows: list[dict[str, Any]], schema: pa.Schema, **about: Any) -> Response:
    """Return rows as JSON, `{"rows": …, **about}`, or as an Arrow stream with `about` in the schema's metadata."""
    if not wants_arrow(request):
        return answer({"rows": rows, **about})
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({k: str(v) for k, v in about.items()}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return Response(sink.getvalue().to_pybytes(), media_type=ARROW)
