"""Reading a configuration: a YAML file plus `key=value` overrides, and errors that people understand.

`load` turns both into a `Config`, `load_labelling` into a `LabellingRun`; or they raise `ConfigError` with one line
that names the field and what is allowed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import ValidationError

from contracts.config import Config, ConfigError, LabellingRun
from contracts.section import Section

Kind = TypeVar("Kind", bound=Section)


@overload
def load(path: Path | str, overrides: Sequence[str] = ()) -> Config: ...


@overload
def load(path: Path | str, overrides: Sequence[str] = (), *, kind: type[Kind]) -> Kind: ...


def load(path: Path | str, overrides: Sequence[str] = (), *, kind: type[Section] = Config) -> Section:
    """Read a YAML file, apply `key=value` overrides and validate as the settings of a `kind` of command.

    Raises:
        ConfigError: one line that names the file or field and what is allowed.
    """
    return _validated(_read(path, overrides), kind, source=str(path))


def load_labelling(path: Path | str, overrides: Sequence[str] = ()) -> LabellingRun:
    """The same for `headrace label`: of a file with its sections alone, or of the whole configuration of a run.

    Raises:
        ConfigError: also where there is no section `labelling`.
    """
    data = _read(path, overrides)
    if data.get("labelling") is None and not set(data) - set(Config.model_fields):
        raise ConfigError(f"{path}: labelling: required, but missing; docs/labelling.md has an example")
    if set(data) <= set(LabellingRun.model_fields):
        return _validated(data, LabellingRun, source=str(path))
    run = validate(data, source=str(path))
    return _validated({name: getattr(run, name) for name in LabellingRun.model_fields}, LabellingRun, source=str(path))


def _read(path: Path | str, overrides: Sequence[str]) -> dict[str, Any]:
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}:{line} not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, this file holds {_kind(data)}")
    for override in overrides:
        _override(data, override)
    return data


def validate(data: Mapping[str, Any], *, source: str) -> Config:
    """Validate a nested mapping; `source` names it in errors."""
    return _validated(data, Config, source=source)


def _validated(data: Mapping[str, Any], kind: type[Kind], *, source: str) -> Kind:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_first_problem(error, kind)}") from error


def dump(config: Section) -> str:
    """The resolved configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: write key=value, for example training.learning_rate=1e-6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    if value == text.strip():  # unquoted text: prompts.system='"5"' stays text
        value = _number(value)
    *parents, last = key.split(".")
    node: Any = data
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {name} is {_kind(node)}, not a section")
    node[last] = value


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as text; people mean the number."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def _first_problem(error: ValidationError, kind: type[Section]) -> str:
    # A default that follows from a wrong field is no second mistake.
    problems = [each for each in error.errors() if each["type"] != "default_factory_not_called"]
    # A misspelt key often leaves the right one missing: name the misspelt one.
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    field = ".".join(str(part) for part in problem["loc"]) or "configuration"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown key{_nearest(problem['loc'], kind)}{more}"
    if problem["type"] == "missing":
        return f"{field}: required, but missing{more}"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{field}: {message}{more}" if problem["loc"] else f"{message}{more}"
    got = _shortened(repr(problem["input"]))
    if problem["type"] == "model_type":
        return f"{field}: a section with keys of its own is expected, got {got}{more}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{field}: {message}, got {got}{more}"


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _nearest(loc: tuple[int | str, ...], kind: type[Section]) -> str:
    known = _keys_at(loc[:-1], kind)
    matches = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    if matches:
        return f", did you mean {matches[0]}?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def _keys_at(loc: tuple[int | str, ...], kind: type[Section]) -> list[str]:
    section: Any = kind
    for part in loc:
        if isinstance(part, int) or not _is_section(section) or part not in section.model_fields:
            continue  # an index into a list, or a name the person chose
        section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields) if _is_section(section) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section_of(annotation: Any) -> Any:
    """The Section inside `X | None`, `tuple[X, ...]` or `dict[str, X]`."""
    if _is_section(annotation):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
