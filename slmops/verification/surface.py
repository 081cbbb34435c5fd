"""Is everything around the weights as it was in training: files, tokenizer, templates, stop tokens?"""

from __future__ import annotations

from slmops import artifact
from slmops.data import Tokenizer, encode_prompt, row_format_of
from slmops.data.templates import value_text
from slmops.runtime.openvino_folder import differing_texts, has_tokenizer
from slmops.verification.stages import Stage
from slmops.verification.subject import Subject, has_answers
from slmops.verification.texts import PROBES

_ROWS = 200


def check_files(found: artifact.Artifact | None, edited: str | None) -> Stage:
    """Compare every file of the package with its hash.

    Args:
        found: the package's artefact; None for a folder without a manifest.
        edited: what is wrong with the manifest itself, if anything.
    """
    if edited is not None:
        return Stage("files", "fail", edited, {"changed": [artifact.MANIFEST]}, {"changed": 0})
    if found is None:
        return Stage("files", "skipped", "the folder has no manifest of slmops: nothing says what its files should be")
    problems = artifact.changed_files(found)
    figures = {"files": len(found.manifest.files), "changed": problems}
    if problems:
        return Stage("files", "fail", f"{'; '.join(problems)}: copy the package again, or export it again", figures, {"changed": 0})
    return Stage("files", "pass", f"{len(found.manifest.files)} files are as they were written", figures, {"changed": 0})


def check_tokenizer(subject: Subject) -> Stage:
    """Encode probes and the user's own rows with the package's tokenizer and with the baseline's."""
    ours, theirs = subject.tokenizer, Tokenizer.load(subject.package)
    texts = [*PROBES, *(value_text(value) for row in subject.rows[:_ROWS] for value in row.values() if isinstance(value, str))]
    differing = [text for text in texts if ours.encode(text) != theirs.encode(text) or _decodings_differ(ours, theirs, text)]
    # A package for OpenVINO may bring its tokenizer as an IR too, for hosts in C++ and JavaScript.
    by_ir = differing_texts(subject.package, ours, texts) if has_tokenizer(subject.package) else []
    differing += [text for text in by_ir if text not in differing]
    figures = {"texts": len(texts), "differing": len(differing), "vocabulary": theirs.vocabulary_size}
    bars = {"differing": 0}
    if ours.vocabulary_size != theirs.vocabulary_size:
        text = f"the package's tokenizer has {theirs.vocabulary_size} tokens, and the baseline's {ours.vocabulary_size}"
        return Stage("tokenizer", "fail", f"{text}: export again from the right model", figures, bars)
    if differing:
        text = f"{len(differing)} of {len(texts)} texts become other tokens in the package, such as {differing[0][:40]!r}"
        return Stage("tokenizer", "fail", f"{text}: export again from the right model", figures, bars)
    return Stage("tokenizer", "pass", f"{len(texts)} texts become the same tokens", figures, bars)


def check_template(subject: Subject) -> Stage:
    """Compare templates and BOS rule, and the prompts that they make of the rows."""
    ours, theirs = subject.baseline_interface, subject.interface
    names = ("prompt_template", "completion_template", "chat_template", "bos_token_id")
    changed = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    own = Tokenizer.load(subject.package).chat_template
    if subject.tokenizer.chat_template != own and "chat_template" not in changed:
        changed.append("chat_template")  # the file that other programs read
    figures: dict[str, object] = {"changed": changed, "prompts": 0}
    if changed:
        shown = "; ".join(f"{name} is {getattr(theirs, name)!r}, and the baseline's {getattr(ours, name)!r}" for name in changed)
        text = f"{shown[:300]}: the model would be asked another question than it was trained on"
        return Stage("template", "fail", text, figures, {"changed": 0})
    if has_answers(subject):
        row_format = row_format_of(subject.rows, ours)
        rows = subject.rows[:_ROWS]
        tokenizer = Tokenizer.load(subject.package)
        differing = sum(
            encode_prompt(r, subject.tokenizer, ours, row_format) != encode_prompt(r, tokenizer, theirs, row_format) for r in rows
        )
        figures["prompts"] = len(rows)
        if differing:
            return Stage(
                "template", "fail", f"{differing} of {len(rows)} prompts become other tokens in the package", figures, {"changed": 0}
            )
    stated = (
        "templates and BOS rule are the baseline's"
        if subject.found is not None
        else "the folder states no templates: it is asked by the baseline's"
    )
    return Stage("template", "pass", f"{stated}; {figures['prompts']} prompts are the same", figures, {"changed": 0})


def check_stop_tokens(subject: Subject) -> Stage:
    """Compare what training appended, what the manifest says and what the runtime will stop at."""
    trained, stated = tuple(subject.baseline_interface.stop_token_ids), tuple(subject.interface.stop_token_ids)
    runtime = subject.stored.stop_tokens
    figures = {"trained": list(trained), "manifest": list(stated), "runtime": list(runtime)}
    name = subject.tokenizer.token
    if subject.found is not None and set(stated) != set(trained):
        text = f"the package stops at {_names(stated, name)}, and the model was trained to stop at {_names(trained, name)}"
    elif not _ends_alike(subject, set(runtime), set(trained)):
        text = (
            f"{subject.stored.config_file} stops at {_names(runtime, name)}, and the model was trained to stop at {_names(trained, name)}"
        )
    else:
        return Stage("stop_tokens", "pass", f"training, manifest and runtime stop at {_names(trained, name)}", figures, {"differing": 0})
    return Stage("stop_tokens", "fail", f"{text}: answers would run on or break off; export again", figures, {"differing": 0})


def _ends_alike(subject: Subject, runtime: set[int], trained: set[int]) -> bool:
    """Tell whether the runtime stops where training did; a package's runtime stops at what its adapters share, and slmops at the rest."""
    if not subject.adapters:
        return runtime == trained
    return bool(runtime) and (subject.adapter is None or runtime <= trained)


def _decodings_differ(ours: Tokenizer, theirs: Tokenizer, text: str) -> bool:
    ids = ours.encode(text)
    return ours.decode(ids) != theirs.decode(ids)


def _names(ids: tuple[int, ...], name: object) -> str:
    return " or ".join(f"{name(i)} ({i})" for i in ids) or "nothing"  # type: ignore[operator]
