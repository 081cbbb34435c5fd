"""How do flags, a YAML file and keyword arguments become one checked settings object?

Each verb has one frozen pydantic model (`slmops.config`). Precedence: default < YAML < flag or keyword. A model may
group its fields in nested models; the outside (flags, YAML keys, keywords) is flat, so every field name is unique
within a verb. All problems are reported at once, one `field: problem` each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from slmops.errors import InvalidInput

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of every settings model: frozen, unknown keys forbidden."""

    # defer_build: --help reads the fields of every verb and validates none.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="null", defer_build=True)


def setting(default: Any, description: str, *, escapes: bool = False, flag: str | None = None, **bounds: Any) -> Any:
    r"""Declare a settings field.

    Args:
        default: its default, or `...` where it must be given.
        description: one line for the help text and the docs table.
        escapes: a value given as a flag has `\n`, `\t` and `\\` decoded.
        flag: name of the command-line flag where it is not the field's own (`out` is `-o/--out`).
        bounds: pydantic bounds such as `ge=1`.
    """
    extra = {"escapes": escapes, "flag": flag}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def fields(model: type[Settings]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every leaf field of a settings model, groups opened, in order."""
    for name, info in model.model_fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, Settings):
            yield from fields(group)
        else:
            yield name, info


def load(model: type[S], /, config: Path | str | Mapping[str, Any] | None = None, **overrides: Any) -> S:
    """Make the settings of a verb.

    Args:
        model: the verb's settings model.
        config: a YAML file, or a mapping with its content.
        overrides: flags or keywords; a value of None means "not given".

    Raises:
        InvalidInput: an unknown key, a value of the wrong type or out of bounds (all of them in one message).
    """
    values = dict(config) if isinstance(config, Mapping) else read_yaml(config) if config is not None else {}
    # Fields that may be a hub id as well as a path are text; a Path given for one means its text.
    values.update({name: str(value) if isinstance(value, Path) else value for name, value in overrides.items() if value is not None})
    known = [name for name, _ in fields(model)]
    problems = [f"{key}: unknown setting{_nearest(key, known)}" for key in values if key not in known]
    flat = {key: value for key, value in values.items() if key in known}
    try:
        settings = model.model_validate(_grouped(model, flat))
    except ValidationError as error:
        problems += [f"{_leaf(e['loc'])}: {_plain(e['msg'])}" for e in error.errors()]
        settings = None
    if problems or settings is None:
        where = f" in {config}" if isinstance(config, (str, Path)) else ""
        raise InvalidInput(f"bad settings{where}: " + "; ".join(problems), "the command's --help lists every setting")
    return settings


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InvalidInput: no such file, not YAML, or not a mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise InvalidInput(f"no such file: {path}", "give the path of a YAML file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not valid YAML: {' '.join(str(error).split())}", "mend the line it names") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidInput(f"{path} holds a {type(content).__name__}, not a mapping of settings", "write `name: value` lines")
    return content


def flat(settings: Settings, *, given: bool = False) -> dict[str, Any]:
    """Return the settings as a flat JSON-ready mapping: what a manifest keeps and a YAML file can give again.

    Args:
        settings: of a verb.
        given: only what somebody set; defaults are left out.
    """
    result: dict[str, Any] = {}
    for name, value in settings.model_dump(mode="json", exclude_unset=given).items():
        nested = isinstance(getattr(settings, name), Settings)
        result.update(value if nested else {name: value})
    return result


def decode_escapes(text: str) -> str:
    r"""Decode `\n`, `\t` and `\\` in a template given as a flag; any other backslash stays as it is."""
    import re

    return re.sub(r"\\[nt\\]", lambda m: {"n": "\n", "t": "\t", "\\": "\\"}[m.group()[1]], text)


def _loader() -> type:
    """YAML 1.1 reads `1e-3` as text; read it as the number that everybody means. Refuse a key given twice."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            if twice:
                raise yaml.MarkedYAMLError(problem=f"key given twice: {', '.join(twice)}", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _grouped(model: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, Settings):
            result[name] = _grouped(group, values)
        elif name in values:
            # One value for a setting that takes several is a list of one.
            alone = isinstance(values[name], str) and get_origin(_without_none(group)) is list
            result[name] = [values[name]] if alone else values[name]
    return result


def _without_none(annotation: Any) -> Any:
    kept = [part for part in get_args(annotation) if part is not type(None)]
    return kept[0] if len(kept) == 1 and type(None) in get_args(annotation) else annotation


def _leaf(location: tuple[int | str, ...]) -> str:
    names = [str(part) for part in location if isinstance(part, str)]
    return names[-1] if names else "settings"


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "must be")


def _nearest(key: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
