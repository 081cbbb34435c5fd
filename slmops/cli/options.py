"""How do the fields of a settings model become the options of a command?

Options are generated: name, type, choices, bounds, default and help come from the model's field, so that flags, YAML
keys and Python keywords cannot drift apart. An option that was not given is None, and the YAML file or the default holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from slmops.cli.commands import entry_of
from slmops.config import Settings, decode_escapes, fields, load

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_METAVARS = {int: "N", float: "X", str: "TEXT"}
_COMMON = "General"


class Option(click.Option):
    """An option that knows the heading it stands under."""

    def __init__(self, *args: Any, heading: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class Command(click.Command):
    """A command whose help groups its options and ends with lines to copy."""

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings, the common ones last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            # Arguments stand in the usage line and are explained by the text.
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(parameter, "heading", _COMMON), []).append(record)
        for heading in sorted(sections, key=lambda name: name == _COMMON):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are to be typed."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


@dataclass(frozen=True)
class Call:
    """What a command body gets: the settings file and the flags that were really given."""

    config: Path | None
    overrides: dict[str, Any]


Body = Callable[..., Any]


def command(
    path: str, model: type[Settings] | None, *, writes: str | None = None, unless: str = "", examples: tuple[str, ...] = ()
) -> Callable[[Body], Command]:
    """Make a command of a body that takes its arguments by name and a `Call`, and returns the result to show.

    Args:
        path: the command's name, with its group: "export", "data inspect".
        model: settings whose fields become options; None where there are none.
        writes: "" where `-o/--out` must be given, a path where that is its default, None where nothing is written.
        unless: a switch with which nothing is written, and `-o` need not be given.
        examples: lines for the help text.
    """

    def decorate(body: Body) -> Command:
        names = {name for name, _ in (fields(model) if model else ())}
        # click.argument leaves them on the function, last first.
        arguments = list(reversed(getattr(body, "__click_params__", [])))

        @wraps(body)
        def callback(config: Path | None, as_json: bool, quiet: bool, out: Path | None = None, **values: Any) -> None:
            from slmops.cli.session import perform

            if model is None and config is not None:
                load(Settings, config)  # nothing to set here: whatever the file says is refused, not ignored
            overrides = {name: _decoded(model, name, values.pop(name)) for name in list(values) if name in names}
            overrides = {name: value for name, value in overrides.items() if value not in (None, ())}
            if out is not None:
                overrides["out"] = out
            elif unless and not overrides.get(unless):
                context = click.get_current_context()
                raise click.MissingParameter(ctx=context, param=next(p for p in context.command.params if p.name == "out"))
            perform(path, lambda: body(call=Call(config, overrides), **values), as_json=as_json, quiet=quiet)

        name = path.split()[-1]
        entry = entry_of(path)
        details = (body.__doc__ or "").partition("\n\n")[2]
        return Command(
            name,
            callback=callback,
            params=[*arguments, *_out(writes, unless), *(settings_options(model) if model else ()), *_common()],
            help=f"{entry.summary}\n\n{_dedented(details)}".strip(),
            short_help=entry.summary,
            examples=examples,
            context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        )

    return decorate


def settings_options(model: type[Settings]) -> Iterator[Option]:
    """Yield the options of a settings model, one a field (two for a switch), in order."""
    for heading, (name, info) in _headed(model):
        yield from _options(name, info, heading)


def _headed(model: type[Settings]) -> Iterator[tuple[str, tuple[str, FieldInfo]]]:
    for name, info in model.model_fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, Settings):
            for leaf in group.model_fields.items():
                yield name.capitalize(), leaf
        else:
            yield "Options", (name, info)


def _options(name: str, info: FieldInfo, heading: str) -> Iterator[Option]:
    extra = _extra(info)
    flag = extra.get("flag") or f"--{name.replace('_', '-')}"
    kind = _plain_type(info.annotation)
    text = f"{info.description or ''}{_figures(info)}"
    common = {"heading": heading, "default": None, "help": text}
    if kind is bool:
        if info.default:
            yield Option([name, f"{flag}/--no-{flag[2:]}"], is_flag=True, **common)
        else:
            # Off unless asked for; --no-x exists to overrule a YAML file, and would only clutter the help text.
            yield Option([name, flag], is_flag=True, flag_value=True, **common)
            yield Option([name, f"--no-{flag[2:]}"], is_flag=True, flag_value=False, hidden=True, default=None)
    elif get_origin(kind) is Literal:
        yield Option([name, flag], type=click.Choice([str(choice) for choice in get_args(kind)]), **common)
    elif get_origin(kind) is list:
        yield Option([name, flag], multiple=True, metavar="TEXT", **{**common, "help": f"{text} [repeat for several]"})
    elif kind is Path:
        yield Option([name, *(["-o"] if flag == "--out" else []), flag], type=click.Path(path_type=Path), metavar="PATH", **common)
    else:
        yield Option([name, flag], type=kind, metavar=_METAVARS[kind], **common)


def _plain_type(annotation: Any) -> Any:
    """Return the type without `| None`."""
    if get_origin(annotation) in (Union, UnionType):
        kept = [part for part in get_args(annotation) if part is not NoneType]
        if len(kept) == 1:
            return kept[0]
    return annotation


def _figures(info: FieldInfo) -> str:
    """Return default and bounds as ` [default: 16; 1 to 1024]`, or nothing."""
    parts = []
    # None defaults are put into words by the description; a switch is off.
    if info.default is not None and info.default is not False:
        parts.append(f"default: {'on' if info.default is True else info.default}")
    bounds = {key: getattr(item, key) for item in info.metadata for key in ("ge", "gt", "le", "lt") if hasattr(item, key)}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is not None and high is not None:
        above, below = ("above " if "gt" in bounds else ""), ("below " if "lt" in bounds else "")
        parts.append(f"{above}{low} to {below}{high}")
    elif low is not None and low > 1:  # that a count is not negative goes without saying
        parts.append(f"above {low}" if "gt" in bounds else f"at least {low}")
    return f" [{'; '.join(parts)}]" if parts else ""


def _extra(info: FieldInfo) -> Mapping[str, Any]:
    return info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}


def _decoded(model: type[Settings] | None, name: str, value: Any) -> Any:
    if model is None or not _extra(dict(fields(model))[name]).get("escapes"):
        return value
    if isinstance(value, tuple):
        return tuple(decode_escapes(item) for item in value)
    return decode_escapes(value) if isinstance(value, str) else value


def _out(writes: str | None, unless: str) -> Iterator[Option]:
    if writes is not None:
        text = f"folder to write [default: {writes}]" if writes else "folder to write (must be new, or see --force)"
        text += f"; not needed with --{unless}" if unless else ""
        yield Option(
            ["out", "-o", "--out"],
            type=click.Path(path_type=Path),
            **({"default": Path(writes)} if writes else {"required": not unless}),
            metavar="DIR",
            help=text,
            heading="Output",
        )


def _common() -> Iterator[Option]:
    yield Option(
        ["--config"], type=click.Path(path_type=Path), metavar="FILE.yaml", help="settings as YAML; flags overrule it", heading=_COMMON
    )
    yield Option(["as_json", "--json"], is_flag=True, help="one JSON document on stdout", heading=_COMMON)
    yield Option(["--quiet"], is_flag=True, help="no progress on stderr", heading=_COMMON)
    yield Option(["--debug"], is_flag=True, expose_value=False, help="show the traceback of an error", heading=_COMMON)


def _dedented(text: str) -> str:
    import inspect

    return inspect.cleandoc(text)
