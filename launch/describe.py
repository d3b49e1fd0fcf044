"""What `score.py --help` says of a config: every section and field with its meaning, what it takes and its default."""

import json
import re
from collections.abc import Mapping
from inspect import getsource
from textwrap import wrap
from typing import Any

from engine.methods.contract import METHODS
from engine.models import import_path
from engine.tasks.contract import BUILT_IN
from launch.config import Config
from launch.sections import Section, allowed, section_in, section_of

_MEANING = re.compile(r"^ +(\w+): .*[^\s]  # (.+)$", re.M)  # the comment behind an argument or a field of a class


def describe_config() -> str:
    """Return every section and field with its meaning, what it takes and its default, as `--help` prints it.

    Beneath `method` and `task` stand what each method and built-in task takes besides.
    """
    lines = ["A config is YAML with these sections; any field can be set on the command line as section.key=value."]
    own = {"method": METHODS, "task": BUILT_IN}
    for name, section in Config.model_fields.items():
        kind = section_in(section.annotation)
        assert kind is not None
        shorthand = f" A text for the whole section is its {kind.shorthand}." if kind.shorthand else ""
        lines += ["", *wrap(f"{name}: {_first_line(kind)}{shorthand}", 100), *describe_fields(kind)]
        for key, field in kind.model_fields.items():
            if (inner := section_in(field.annotation)) is not None:
                lines += ["", *wrap(f"  {name}.{key}: {_first_line(inner)}", 100, subsequent_indent="  ")]
                lines += describe_fields(inner, "    ")
        for choice, path in own.get(name, {}).items():
            made = import_path(path)
            lead = "method" if name == "method" else "task.settings"
            lines += ["", *wrap(f"  {lead} of {choice}: {_first_line(made)}", 100, subsequent_indent="  ")]
            lines += describe_fields(section_of(made), "    ", dict(_MEANING.findall(getsource(made))))
    return "\n".join(lines)


def describe_fields(kind: type[Section], indent: str = "  ", meanings: Mapping[str, str] | None = None) -> list[str]:
    """Return the lines about a section's fields: meaning, allowed values, default."""
    lines = []
    for key, field in kind.model_fields.items():
        meaning = field.description or (meanings or {}).get(key)
        default = "required" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True))
        text = "; ".join([*([meaning] if meaning else []), allowed(field.annotation, field.metadata)])
        lead = f"{indent}{key:<17} "
        lines += wrap(f"{lead}{text} [{default}]", 100, subsequent_indent=" " * len(lead), break_on_hyphens=False)
    return lines


def _first_line(made: Any) -> str:
    return (made.__doc__ or "").strip().partition("\n")[0]


def _as_yaml(value: Any) -> str:
    """Return a default as a config would say it."""
    if isinstance(value, Section):
        return "{}"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
