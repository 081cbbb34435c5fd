"""Which token ends an answer? Checked against the model, not assumed.

The tokenizer, `config.json`, `generation_config.json` and the chat template each name one, and they can disagree. An
adapter cannot teach a model to end with a token that it has never seen, because the embedding is frozen: such a model
never stops. So the choice looks at the weights too, and says why it fell.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.data.tokenizer import Tokenizer
from slmops.data.untrained import judge
from slmops.errors import InvalidInput

_SENTINEL = "zqxanswerxqz"


@dataclass(frozen=True)
class StopChoice:
    """The stop tokens, the first being the one to train with; why; and what the user should know."""

    ids: tuple[int, ...]
    reason: str
    warnings: tuple[str, ...] = ()


def choose_stop_tokens(folder: Path, tokenizer: Tokenizer, *, stop_token: str | None, chat_template: str | None) -> StopChoice:
    """Choose the tokens that end an answer.

    Args:
        folder: the model, or an export of it.
        tokenizer: its tokenizer.
        stop_token: the user's choice, as text or id; it wins.
        chat_template: the template that the rows go through; None where they go through none.

    Raises:
        InvalidInput: `stop_token` is no single token, or no source names a stop token.
    """
    declared = declared_stop_tokens(folder, tokenizer)
    end_of_turn = end_of_turn_token(tokenizer, chat_template) if chat_template else None
    if stop_token is not None:
        return _explicit(folder, tokenizer, stop_token)
    candidates = list(dict.fromkeys(i for ids in declared.values() for i in ids))
    if end_of_turn is not None:
        return _for_chat(folder, tokenizer, end_of_turn, candidates)
    if not candidates:
        raise InvalidInput(
            f"no stop token: neither the tokenizer nor config.json nor generation_config.json of {folder} names one",
            "name one that the model has seen with --stop-token, such as --stop-token '</s>' or --stop-token 2",
        )
    return _by_agreement(folder, tokenizer, declared, candidates)


def declared_stop_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, tuple[int, ...]]:
    """Return what each source says ends a text: source -> ids; sources that say nothing are left out."""
    sources: dict[str, Any] = {
        "generation_config.json": read_json(folder / "generation_config.json").get("eos_token_id"),
        "config.json": _config_value(folder, "eos_token_id"),
        "genai_config.json": read_json(folder / "genai_config.json").get("model", {}).get("eos_token_id"),
        "the tokenizer": tokenizer.eos_token_id,
    }
    found = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in sources.items() if value is not None}
    return {name: tuple(int(i) for i in ids) for name, ids in found.items() if ids}


def end_of_turn_token(tokenizer: Tokenizer, chat_template: str) -> int | None:
    """Return the added token that the template writes right after what the assistant says, or None."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _SENTINEL}]
    text = tokenizer.render_chat(messages, template=chat_template)
    tail = text[text.rfind(_SENTINEL) + len(_SENTINEL) :] if _SENTINEL in text else ""
    ids = tokenizer.encode(tail.lstrip())
    return ids[0] if ids and ids[0] in tokenizer.added else None


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one where the file is missing.

    Raises:
        InvalidInput: the file is broken.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}", "copy it again from the model") from None
    return content if isinstance(content, dict) else {}


def _config_value(folder: Path, name: str) -> Any:
    config = read_json(folder / "config.json")
    return config.get(name, config.get("text_config", {}).get(name))


def _explicit(folder: Path, tokenizer: Tokenizer, stop_token: str) -> StopChoice:
    token_id = tokenizer.id(stop_token)
    if token_id is None and stop_token.isdecimal():
        token_id = int(stop_token)
        if token_id >= tokenizer.vocabulary_size:
            raise InvalidInput(
                f"--stop-token {stop_token}: the vocabulary has {tokenizer.vocabulary_size} tokens", "give an id below that, or its text"
            )
    if token_id is None:
        ids = tokenizer.encode(stop_token)
        if len(ids) != 1:
            shown = ", ".join(tokenizer.token(i) for i in ids[:6])
            raise InvalidInput(
                f"--stop-token {stop_token!r} is {len(ids)} tokens here ({shown}), and one is needed",
                "give a special token of this tokenizer, or an id",
            )
        token_id = ids[0]
    evidence = judge(folder, tokenizer, [token_id])[token_id]
    warnings = (_never_seen_warning(tokenizer, token_id, evidence.reason),) if evidence.seen == "never" else ()
    return StopChoice((token_id,), f"{_name(tokenizer, token_id)}: given with --stop-token", warnings)


def _for_chat(folder: Path, tokenizer: Tokenizer, end_of_turn: int, candidates: list[int]) -> StopChoice:
    """The token that ends an assistant's turn, and beside it whatever else the model ends with."""
    evidence = judge(folder, tokenizer, [end_of_turn])[end_of_turn]
    warnings = (_never_seen_warning(tokenizer, end_of_turn, evidence.reason),) if evidence.seen == "never" else ()
    others = [i for i in candidates if i != end_of_turn]
    beside = f"; {', '.join(_name(tokenizer, i) for i in others)} end an answer too" if others else ""
    return StopChoice(
        (end_of_turn, *others), f"{_name(tokenizer, end_of_turn)}: ends the assistant's turn in the chat template{beside}", warnings
    )


def _by_agreement(folder: Path, tokenizer: Tokenizer, declared: dict[str, tuple[int, ...]], candidates: list[int]) -> StopChoice:
    common = [i for i in candidates if all(i in ids for ids in declared.values())]
    if common:
        first = tokenizer.eos_token_id if tokenizer.eos_token_id in common else common[0]
        evidence = judge(folder, tokenizer, [first])[first]
        warnings = (_never_seen_warning(tokenizer, first, evidence.reason),) if evidence.seen == "never" else ()
        sources = " and ".join(declared) if len(declared) < 3 else ", ".join(declared)
        verb = "agree on it" if len(declared) > 1 else "names it"
        others = [i for i in candidates if i != first]
        return StopChoice((first, *others), f"{_name(tokenizer, first)}: {sources} {verb}", warnings)
    return _by_evidence(folder, tokenizer, declared, candidates)


def _by_evidence(folder: Path, tokenizer: Tokenizer, declared: dict[str, tuple[int, ...]], candidates: list[int]) -> StopChoice:
    """Sources disagree: take what the model has seen, in the order generation_config, config, tokenizer."""
    evidence = judge(folder, tokenizer, candidates)
    says = "; ".join(f"{name} says {', '.join(_name(tokenizer, i) for i in ids)}" for name, ids in declared.items())
    usable = [i for i in candidates if evidence[i].seen != "never"]
    if not usable:
        first = candidates[0]
        warning = _never_seen_warning(tokenizer, first, evidence[first].reason)
        return StopChoice((first,), f"{_name(tokenizer, first)}: {says}, and the model has seen none of them", (warning,))
    # A token that was seen beats one of which nothing can be told.
    usable.sort(key=lambda i: evidence[i].seen != "seen")
    first, refused = usable[0], [i for i in candidates if i not in usable]
    if refused:
        why = f"the model has never seen {', '.join(_name(tokenizer, i) for i in refused)} ({evidence[refused[0]].reason})"
        return StopChoice(tuple(usable), f"{_name(tokenizer, first)}: {says}, and {why}")
    if evidence[first].seen == "seen" and any(evidence[i].seen == "seen" for i in usable[1:]):
        return StopChoice(tuple(usable), f"{_name(tokenizer, first)}: {says}, and the model has seen both; all of them end an answer")
    doubt = next(evidence[i].reason for i in usable if evidence[i].seen == "unknown")
    warning = f"stop tokens disagree ({says}), and which of them the model knows cannot be told ({doubt}): took {_name(tokenizer, first)}; choose with --stop-token"
    return StopChoice(
        tuple(usable), f"{_name(tokenizer, first)}: {says}; which of them the model knows cannot be told ({doubt})", (warning,)
    )


def _never_seen_warning(tokenizer: Tokenizer, token_id: int, reason: str) -> str:
    return (
        f"the model has never seen its stop token {_name(tokenizer, token_id)} ({reason}): "
        "an adapter cannot learn to end with it; choose another with --stop-token"
    )


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    return f"{tokenizer.token(token_id)} ({token_id})"
