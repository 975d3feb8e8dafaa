"""Text as values: a field's type decides how its text is read, in files and in overrides alike.

A text field takes the text as it stands: `run.name=1e3`, `off`, `12:30` and `#x` are names. Elsewhere a word without
quotes is what YAML 1.2 says it is: a number, true, false or null, else text. PyYAML alone would read YAML 1.1, in which
`off` is false, 010 is eight, 12:30 is 750 and a date is an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from apr_ray.config.section import Section

_NULL = re.compile("null|Null|NULL|~|")
_TRUE = re.compile("true|True|TRUE")
_FALSE = re.compile("false|False|FALSE")
_INT = re.compile("[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)


class Plain(str):
    """A scalar that was written without quotes; its field's type says what it is."""


class _Loader(yaml.SafeLoader):
    """Resolves no scalar, and refuses a key that is there twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012 - PyYAML's own form
        "<": [("tag:yaml.org,2002:merge", re.compile("<<"))]
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As in PyYAML, of distinct keys."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(
                    "in a mapping", node.start_mark, "a key is no text", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "in a mapping", node.start_mark, f"key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return {str(key): value for key, value in found.items()}

    def _text(self, node: Any) -> str:
        return Plain(node.value) if node.style is None else str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader._text)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text YAML 1.1 or 1.2 would take for something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """Mappings, lists and scalars, those without quotes as `Plain`. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def write_yaml(tree: Mapping[str, Any]) -> str:
    """YAML that `read_yaml` and `as_typed` read back to the same values."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
    return text


def read_override(kind: Any, text: str) -> Any:
    """The value of an override for a field of type `kind`: text for a text field, else YAML on one line.

    Raises yaml.YAMLError.
    """
    structured = text.startswith(("[", "{", '"', "'")) and not _takes_text(kind)
    return as_typed(kind, read_yaml(text) if structured else Plain(text))


def field_type(section: Any, name: str) -> Any:
    """The type of a section's field; Any where nothing is known of it."""
    if isinstance(section, type) and issubclass(section, Section) and name in section.model_fields:
        return section.model_fields[name].annotation
    return Any


def as_typed(kind: Any, value: Any) -> Any:
    """A tree with `Plain` scalars as one for a field of type `kind`; other values are left to validation."""
    if isinstance(value, dict):
        section = next((k for k in _alternatives(kind) if isinstance(k, type) and issubclass(k, Section)), None)
        return {key: as_typed(field_type(section, key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        items = [get_args(k)[0] for k in _alternatives(kind) if get_origin(k) in (list, tuple)]
        return [as_typed(items[0] if items else Any, item) for item in value]
    if not isinstance(value, Plain):
        return value
    if _takes_text(kind):
        return None if value == "null" and NoneType in _alternatives(kind) else str(value)
    return _resolved(value)


def _resolved(text: str) -> Any:
    """A scalar by YAML 1.2's core schema."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text) else str(text)


def _alternatives(kind: Any) -> Iterator[Any]:
    """The members of a union, or the type alone; without annotations."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif origin in (Union, UnionType):
        for member in get_args(kind):
            yield from _alternatives(member)
    else:
        yield kind


def _takes_text(kind: Any) -> bool:
    """Whether a field's values are text."""
    return any(
        k is str or (get_origin(k) is Literal and all(isinstance(choice, str) for choice in get_args(k)))
        for k in _alternatives(kind)
    )
