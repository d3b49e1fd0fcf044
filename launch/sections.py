"""What a section of a config is, and how a mistake in one is told: the value seen, what is allowed, the default."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A part of the config. A plain text or list stands for the field named by `shorthand`, an empty one for no fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _as_mapping(cls, data: Any) -> Any:
        if isinstance(data, str | list) and cls.shorthand:
            return {cls.shorthand: data}
        return {} if data is None else data


def section_of(made: Callable[..., Any]) -> type[Section]:
    """Return a section whose fields are the arguments of a class: their names, and their types where they are given."""
    fields: dict[str, Any] = {}
    extra: Literal["allow", "forbid"] = "forbid"
    for argument in inspect.signature(made).parameters.values():
        if argument.kind is argument.VAR_KEYWORD:
            extra = "allow"
        elif argument.kind is not argument.VAR_POSITIONAL:
            unknown = argument.annotation is argument.empty or isinstance(argument.annotation, str)
            default = None if argument.default is argument.empty else argument.default
            fields[argument.name] = (Any if unknown else argument.annotation, default)

    class Settings(Section):
        model_config = ConfigDict(extra=extra, arbitrary_types_allowed=True)

    return create_model("Settings", __base__=Settings, **fields)


def explain(error: ValidationError, schema: type[Section]) -> str:
    """Return one line per mistake, whatever the number of types that a field could have had."""
    lines: dict[str, str] = {}
    for one in error.errors():
        where, field, known = locate(one["loc"], schema)
        lines.setdefault(where, _line(one, where, field, known))
    return "\n".join(lines.values())


def locate(loc: tuple[int | str, ...], schema: type[Section]) -> tuple[str, FieldInfo | None, list[str]]:
    """Return the name of a place in a config, its field (None: there is none), and the fields beside it.

    What follows the field in `loc` is a place inside its value, or the name of one of the types it was tried as.
    """
    names: list[str] = []
    kind: type[Section] | None = schema
    field, known = None, list[str]()
    for part in loc:
        if kind is None:
            break
        known = list(kind.model_fields)
        names.append(str(part))
        field = kind.model_fields.get(str(part))
        kind = None if field is None else section_in(field.annotation)
    return ".".join(names), field, known


def section_in(annotation: Any) -> type[Section] | None:
    """Return the section that a field holds, if it is one."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _line(error: Any, where: str, field: FieldInfo | None, known: list[str]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if field is None:
        section, _, key = where.rpartition(".")
        return unknown_name(where, key, known, lead=f"{section}." if section else "")
    if error["type"] == "missing":
        return f"{where} is missing: {described(field)}."
    default = field.get_default(call_default_factory=True, validated_data={})
    told = default is not None and not field.is_required() and not isinstance(default, Section)
    return f"{where}={error['input']!r} is not allowed: must be {allowed(field.annotation, field.metadata)}." + (
        f" The default is {default!r}." if told else ""
    )


def unknown_name(what: str, name: str, known: Iterable[str], lead: str = "") -> str:
    """Return the sentence for a name that is not known: the nearest that is, and all of them."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    meant = f" Did you mean {lead}{near[0]}?" if near else ""
    return f"{what} is not known.{meant} Allowed: {', '.join(known) or 'none'}."


def described(field: FieldInfo) -> str:
    """Return a field's line of meaning; a section's is the first line of its docstring."""
    section = section_in(field.annotation)
    if section is None:
        return field.description or "it has no default"
    first = (section.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return f"{first[:1].lower()}{first[1:]}"


def allowed(kind: Any, limits: Iterable[Any] = ()) -> str:
    """Return in words which values a type with these limits takes."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return allowed(inner[0], [limit for one in inner[1:] for limit in getattr(one, "metadata", [one])])
    if origin in (Union, UnionType):
        return " or ".join(allowed(one, limits) for one in inner if one is not NoneType)
    if origin is Literal:
        *others, last = map(repr, inner)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (list, tuple):
        return f"a list of {_PLURALS[inner[0]]}" if inner and inner[0] in _PLURALS else "a list"
    if origin is dict and get_origin(inner[0]) is Literal:
        return f"a mapping of {' and '.join(get_args(inner[0]))}"
    section = section_in(kind)
    if section is not None:
        short = f", or a text for its {section.shorthand}" if section.shorthand else ""
        return f"a mapping of settings ({', '.join(section.model_fields)}){short}"
    word = _WORDS.get(kind if isinstance(kind, type) else origin or kind)
    return f"{word or getattr(kind, '__name__', str(kind))}{_bounds(limits)}"


_PLURALS: dict[Any, str] = {str: "texts", int: "whole numbers", float: "numbers"}
_WORDS: dict[Any, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping", Any: "any value"
}  # fmt: skip


def _bounds(limits: Iterable[Any]) -> str:
    """Return a number's range or a text's pattern in words."""
    found = {name: value for one in limits for name in ("ge", "gt", "le", "lt", "pattern")
             if (value := getattr(one, name, None)) is not None}  # fmt: skip
    if "ge" in found and "le" in found:
        return f" from {found['ge']} to {found['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below", "pattern": "that matches"}
    return "".join(f" {words[name]} {value}" for name, value in found.items())
