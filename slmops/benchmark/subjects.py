"""What is measured, against what, on which ids? All of it from the package's lineage, unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from slmops import artifact
from slmops.artifact import Artifact
from slmops.benchmark.accuracy import Task, task_of
from slmops.data import Interface, Tokenizer, load_splits, row_format_of
from slmops.data.encoding import with_bos
from slmops.errors import BadArtifact, InvalidInput, Unavailable
from slmops.evaluation.neutral import neutral_text
from slmops.runtime import hugging_face
from slmops.runtime.engines import model_bytes
from slmops.runtime.loading import interface_of, kind_of, parse_selection
from slmops.runtime.package import interface_with


def check(folder: Path) -> Artifact | None:
    """Return a folder's artefact, its files checked once, before any of the processes loads them.

    Raises:
        BadArtifact: not a model, incomplete or changed.
    """
    kind = kind_of(folder)
    found = artifact.find(folder)
    if found is not None:
        artifact.check(found)
    if kind == "model":
        artifact.require_model(folder)
    return found


def find_baseline(package: Path, found: Artifact | None, given: str | None, adapter: Sequence[str] = ()) -> tuple[Path | None, list[str]]:
    """Return what to compare with (None: nothing), and warnings.

    Of a package with an adapter on it is the PEFT folder that was packed; a weighted sum of adapters has no such thing.

    Raises:
        InvalidInput: nobody says which model the package was exported from.
        BadArtifact: that model is gone or has changed.
        Unavailable: it is asked for, and PyTorch is not installed.
    """
    has_torch = find_spec("torch") is not None
    if given is not None:
        if given.lower() == "none":
            return None, []
        if kind_of(Path(given)) != "export" and not has_torch:
            raise Unavailable(
                f"the baseline {given} needs PyTorch, which is not installed",
                "measure alone with --baseline none, or pip install 'slmops[train]'",
            )
        return Path(given), []
    if kind_of(package) != "export":
        return None, [f"{package} is itself a PyTorch model: measured alone (compare it with --baseline MODEL)"]
    if not has_torch:
        return None, ["PyTorch is not installed here: measured alone, without the baseline"]
    selection = parse_selection(adapter)
    if selection and list(selection.values()) != [1.0]:
        return None, ["adapters in a weighted sum have no PyTorch model beside them: measured alone"]
    role = f"adapter {next(iter(selection))}" if selection else "baseline"
    recorded = found.manifest.input(role) if found is not None else None
    place = found.find(role) if found is not None else None
    hint = "name it with --baseline MODEL, or measure alone with --baseline none"
    if recorded is None:
        raise InvalidInput(f"nothing says which PyTorch model {package} was exported from", hint)
    if place is None:
        raise BadArtifact(f"the model that {package} was exported from is no longer at {recorded.path}", hint)
    if not recorded.matches(place):
        raise BadArtifact(f"{place} is not what {package} was exported from: it was changed since", hint)
    return place, []


def size_bytes(folder: Path) -> int:
    """Return the size on disk of a model's graphs and weights; of an adapter, of its base and itself."""
    kind = kind_of(folder)
    if kind == "export":
        return model_bytes(folder)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return weights + size_bytes(_base_of(folder)) if kind == "adapter" else weights


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the candidate's tokenizer, which makes the ids of both sides; an adapter's may lie with its base."""
    has_one = (folder / "tokenizer.json").is_file() or kind_of(folder) != "adapter"
    return Tokenizer.load(folder if has_one else _base_of(folder))


def read_interface(folders: Sequence[Path], limit: int, adapter: Sequence[str] = ()) -> Interface:
    """Return the interface that the candidate brings, or else the baseline, or else what can be told of the candidate.

    Args:
        folders: the candidate, and the baseline where there is one.
        limit: tokens that every side can take.
        adapter: of a package: what is on.
    """
    artifacts = [artifact.find(folder) for folder in folders]
    if adapter and artifacts[0] is not None:
        interface = interface_with(artifacts[0], parse_selection(adapter))
        return interface.model_copy(update={"max_length_tokens": min(interface.max_length_tokens, limit)})
    brings = next((i for i, found in enumerate(artifacts) if found is not None and found.manifest.interface is not None), 0)
    interface = interface_of(folders[brings], artifacts[brings])
    return interface.model_copy(update={"max_length_tokens": min(interface.max_length_tokens, limit)})


def read_task(data: str, metric: str | None, max_rows: int | None, tokenizer: Tokenizer, interface: Interface) -> Task:
    """Return the rows to measure accuracy on; of a prepared dataset, its validation rows.

    Without a metric, plain text is measured by perplexity, and rows with answers by exact match.
    """
    train, held_out, templates = load_splits(data)
    rows = (held_out or train)[:max_rows]
    if interface.completion_template is None and templates.completion_template is not None:
        interface = interface.model_copy(update=templates._asdict())
    chosen = metric or ("perplexity" if row_format_of(rows, interface) == "text" else "exact_match")
    return task_of(rows, chosen, tokenizer, interface)


def timed_prompt(
    task: Task | None, tokenizer: Tokenizer, interface: Interface, *, prompt_tokens: int, new_tokens: int
) -> tuple[list[int], int, list[str]]:
    """Return the ids of the timed prompt, the tokens to generate, and warnings.

    The ids are those of the task's prompts, one after the other, or of the neutral text, repeated to the length.
    """
    limit, warnings = interface.max_length_tokens, []
    if prompt_tokens + new_tokens > limit:
        asked = f"{prompt_tokens} prompt and {new_tokens} new tokens"
        new_tokens = min(new_tokens, max(2, limit // 2))
        prompt_tokens = limit - new_tokens if prompt_tokens + new_tokens > limit else prompt_tokens
        warnings.append(f"{asked} do not fit a length of {limit}: timed with {prompt_tokens} and {new_tokens}")
    ids = [i for row in task.ids for i in row if i != interface.bos_token_id] if task else tokenizer.encode(neutral_text())
    ids = ids * (1 + prompt_tokens // len(ids))
    return with_bos(ids[:prompt_tokens], interface)[:prompt_tokens], new_tokens, warnings


def _base_of(adapter: Path) -> Path:
    return hugging_face.find_base(adapter, artifact.find(adapter), hugging_face.read_adapter_config(adapter))
