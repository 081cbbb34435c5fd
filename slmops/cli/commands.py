"""Which commands are there, under which heading, and where is each defined? The table that `slmops --help` prints."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import click


@dataclass(frozen=True)
class Entry:
    """One command: where `--help` lists it, its line there, and the `module:attribute` that defines it."""

    heading: str
    summary: str
    place: str


COMMANDS = {
    "quickstart": Entry("Start", "The whole road on a built-in demo, offline, in under 3 minutes.", "starting:quickstart"),
    "doctor": Entry("Start", "Check this machine: versions, providers, memory, and what to do about problems.", "starting:doctor"),
    "data": Entry("Build", "Look at a dataset, or clean and split it.", "commands:data"),
    "finetune": Entry("Build", "Train an adapter, or the whole model, from a data file.", "building:finetune"),
    "merge": Entry("Build", "Merge adapters into their base model, or several into one.", "building:merge"),
    "export": Entry("Build", "Turn a model into a quantized ONNX package.", "building:export"),
    "pack": Entry("Build", "Put several adapters on one quantized base, switched at run time.", "building:pack"),
    "verify": Entry("Prove", "Prove that a package behaves as its PyTorch model does; exit 5 when not.", "proving:verify"),
    "evaluate": Entry("Prove", "Measure a model or package on a task, with 95 % intervals.", "proving:evaluate"),
    "bench": Entry("Prove", "Measure speed, memory, size and accuracy against PyTorch.", "proving:bench"),
    "generate": Entry("Use", "Generate text with a package, streamed.", "using:generate"),
    "run": Entry("Use", "Run a whole pipeline from one YAML file; unchanged steps are skipped.", "using:run"),
    "olive": Entry("Use", "Run workflows of Olive's, with slmops's passes in them.", "commands:olive"),
    "show": Entry("Use", "Show what a folder holds and where it came from.", "using:show"),
}

DATA_COMMANDS = {
    "inspect": Entry("Commands", "Show rows as they would be trained on, token by token.", "building:inspect"),
    "prepare": Entry("Commands", "Write a cleaned, split and fingerprinted dataset.", "building:prepare"),
}

OLIVE_COMMANDS = {
    "run": Entry("Commands", "Run a workflow of Olive's; a key that Olive would drop is an error before anything runs.", "workflows:run"),
}

GROUPS = {"data": DATA_COMMANDS, "olive": OLIVE_COMMANDS}
"""Commands that stand under another: `slmops data inspect`."""


def entry_of(path: str) -> Entry:
    """Return the entry of a command by its name, with its group where it has one: "export", "data inspect"."""
    group, _, name = path.rpartition(" ")
    return GROUPS[group][name] if group else COMMANDS[name]


class LazyGroup(click.Group):
    """A group that knows its commands by name and summary, and imports one only when it is called."""

    def __init__(self, *args: object, entries: dict[str, Entry], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        self.entries = entries

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or None."""
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.place.partition(":")
        return getattr(import_module(f"slmops.cli.{module}"), attribute)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the one that was probably meant."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, self.entries, n=1)
            ctx.fail(f"no such command: {name}" + (f" (did you mean {near[0]}?)" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table, heading by heading, without importing any command."""
        for heading in dict.fromkeys(entry.heading for entry in self.entries.values()):
            rows = [(name, entry.summary) for name, entry in self.entries.items() if entry.heading == heading]
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=14)


_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_INTRODUCTION = """Fine-tune a small language model, ship it as quantized ONNX, and prove that the fine-tune survived.

\b
  slmops quickstart                                see the whole road on a demo
  slmops finetune MODEL DATA -o runs/adapter       train
  slmops merge runs/adapter -o runs/merged         merge
  slmops export runs/merged -o runs/int4           quantize and export
  slmops pack MODEL --adapter a=runs/a -o PKG      or keep adapters apart, on one base
  slmops verify runs/int4                          prove
  slmops bench runs/int4                           measure

Every command takes --json (one document on stdout), --config FILE.yaml, --quiet and --debug.
"""


def _version(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        from slmops import __version__

        click.echo(f"slmops {__version__}")
        ctx.exit()


root = LazyGroup("slmops", entries=COMMANDS, help=_INTRODUCTION, context_settings=_CONTEXT)
root.params = [
    click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."),
    # Read by `slmops.cli.entry` from the command line itself, so that it also holds for errors in parsing.
    click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error."),
]

data = LazyGroup("data", entries=DATA_COMMANDS, help=COMMANDS["data"].summary, context_settings=_CONTEXT)
olive = LazyGroup("olive", entries=OLIVE_COMMANDS, help=COMMANDS["olive"].summary, context_settings=_CONTEXT)
