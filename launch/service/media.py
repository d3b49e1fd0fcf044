"""Records as JSON can hold them; an image is named, and served as PNG."""

import datetime
import io
import math
from typing import Any

import numpy as np
from PIL import Image

LONGEST = 1000  # numbers of an array that a record shows


def is_image(value: Any) -> bool:
    """Return whether a field is an image as corpora hold them: uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]."""
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        return False
    return value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (1, 3, 4))


def plain_record(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a record of the set `name` with plain values; an image becomes {"image": "<set>/<id>"}."""
    return {key: _plain(value, f"{name}/{record['id']}") for key, value in record.items()}


def _plain(value: Any, image: str) -> Any:
    if is_image(value):
        return {"image": image}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        flat = value.reshape(-1)
        short = flat[:LONGEST].astype(np.float64 if value.dtype.kind == "f" else value.dtype).tolist()
        return {"shape": list(value.shape), "values": [_plain(one, image) for one in short]}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(inner, image) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, image) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def png_of(record: dict[str, Any]) -> bytes:
    """Return a record's first image as PNG. LookupError if it has none."""
    for value in record.values():
        if is_image(value):
            picture = value[:, :, 0] if value.ndim == 3 and value.shape[2] == 1 else value
            out = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(picture)).save(out, format="PNG")
            return out.getvalue()
    raise LookupError("this record holds no image")
