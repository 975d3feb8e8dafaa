"""From YAML files and `a.b=c` overrides to a Config, with errors that name the key, and back."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from apr_ray.config.section import Section
from apr_ray.config.settings import Config
from apr_ray.config.text import as_typed, field_type, read_override, read_yaml, write_yaml
from apr_ray.core.errors import ConfigError

log = logging.getLogger(__name__)
MOVED = {"grpo.overlap": "grpo.ahead=1 for true, grpo.ahead=0 for false"}
"""Keys that had another name, and what stands for them now."""
SIGN_OF_A_RUN = frozenset({"run", "task", "bounds", "engine"})
"""Sections that every run's config has."""


def load_config(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Later files override earlier ones, `a.b=c` overrides override files.

    Raises:
        ConfigError: a file that cannot be read, an unknown key (with the nearest known one), a bad value.
    """
    tree = Config().model_dump(mode="json")  # so that `a.b=c` keeps the other defaults of `a`
    for file in files:
        path = Path(file)
        try:
            data = as_typed(Config, read_yaml(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"cannot read config {path}: {error.strerror}", "Check the path") from error
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}", "Fix the file") from error
        if data and not isinstance(data, dict):
            raise ConfigError(f"{path} holds {str(data)[:40]!r}", "A config is a mapping of sections")
        tree = _merge(tree, data or {})
        _parsed(tree, f"{path}: ")
    for override in overrides:
        tree = _merge(tree, _override(override))
    return parse_config(tree)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """A plain mapping as a Config. Raises ConfigError naming key, value and remedy."""
    return _parsed(tree)


def _parsed(tree: Mapping[str, Any], where: str = "") -> Config:
    """`where` stands before an error: the file that was read last."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        found = _explain(error, Config)
        raise ConfigError(where + found.what, found.remedy) from None


def parse_options(kind: Any, options: Mapping[str, Any], prefix: str) -> Any:
    """A mapping as a task's own options dataclass; errors name the key under `prefix`."""
    try:
        _forbid_unknown(kind, options, prefix)
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        raise _explain(error, kind, prefix) from None


def to_yaml(config: Config) -> str:
    """The whole tree as YAML that `load_config` reads back to an equal Config."""
    return write_yaml(config.model_dump(mode="json"))


def config_of(policy: Path) -> Path | None:
    """The config of the run that a policy folder lies in, if it lies in one. Another program's file of that name is
    passed over, with a warning."""
    for folder in policy.resolve().parents[:3]:
        file = folder / "config.yaml"
        if not file.is_file():
            continue
        try:
            found = read_yaml(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            found = None
        if isinstance(found, dict) and found.keys() >= SIGN_OF_A_RUN:
            return file
        log.warning("%s is no run's config: the default bounds and engine are used", file)
    return None


def differences(old: Config, new: Config) -> list[str]:
    """`a.b: 1 -> 2` for every leaf that differs."""

    def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for key, sub in tree.items() for k, v in leaves(sub, f"{prefix}.{key}".lstrip(".")).items()}

    a, b = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"override {text!r} is not of the form a.b=value", "Write e.g. grpo.steps=20")
    kind: Any = Config
    for part in key.split("."):
        kind = field_type(kind, part)
    try:
        tree: Any = read_override(kind, value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML", "Write e.g. [1, 2] or {a: 1}") from error
    for part in reversed(key.split(".")):
        tree = {part: tree}
    assert isinstance(tree, dict)
    return tree


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        known = out.get(key)
        out[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return out


def _forbid_unknown(kind: Any, options: Mapping[str, Any], prefix: str) -> None:
    """Dataclasses accept no extra="forbid" of their own; nested ones are walked by their types."""
    hints = typing.get_type_hints(kind)
    for key, value in options.items():
        if key not in hints:
            raise _unknown_key(f"{prefix}.{key}", key, list(hints))
        for nested in (hints[key], *typing.get_args(hints[key])):  # of `A | None` too
            if dataclasses.is_dataclass(nested) and isinstance(value, Mapping):
                _forbid_unknown(nested, value, f"{prefix}.{key}")


def _unknown_key(path: str, key: str, known: Sequence[str]) -> ConfigError:
    if path in MOVED:
        return ConfigError(f"config key {path!r} is no more", f"Write {MOVED[path]}")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(sorted(known))}"
    return ConfigError(f"unknown config key {path!r}", hint)


def _explain(error: ValidationError, kind: Any, prefix: str = "") -> ConfigError:
    first = error.errors()[0]
    path = ".".join(str(p) for p in (prefix, *first["loc"]) if p != "")
    if first["type"] == "extra_forbidden":
        section = kind
        for part in first["loc"][:-1]:
            section = section.model_fields[str(part)].annotation
        return _unknown_key(path, str(first["loc"][-1]), list(section.model_fields))
    message = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list: [a, b]")
    seen = "" if isinstance(first["input"], dict | Section) else f" (got {first['input']!r})"
    return ConfigError(f"config {path or 'as a whole'}: {message}{seen}", "Run apr-ray config show for every key")
