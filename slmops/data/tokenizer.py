"""How does text become token ids and back, the same in training and on a device without transformers?

`Tokenizer` reads a folder's `tokenizer.json` with the `tokenizers` library alone. Two things differ from a plain wrap:

- Nothing is ever put in front or behind: whether BOS belongs there is the `Interface`'s rule, asked once (`adds_bos`).
- Text that goes on after other text is encoded as its continuation (`encode_batch(after=...)`). SentencePiece-like
  tokenizers put a blank before everything that they encode; an answer encoded on its own would begin with one blank
  too many, which the model would have to learn and the device to decode.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from slmops import environment
from slmops.data.chat import Message, render_template
from slmops.errors import BadArtifact, InvalidInput


class Stream:
    """Turns tokens into text as they come: a character of several tokens appears with its last one."""

    def __init__(self, backend: Any, after: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        # What stands before decides whether the first token's blank is shown.
        self._decoder = DecodeStream(ids=list(after[-16:]), skip_special_tokens=True) if after else DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """Add a token; return the text that it completes, which may be empty."""
        return self._decoder.step(self._backend, int(token_id)) or ""


class Tokenizer:
    """A model's tokenizer. Safe to share between threads."""

    def __init__(self, backend: Any, settings: dict[str, Any] | None = None, chat_templates: dict[str, str] | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`.

        Args:
            backend: the tokenizer.
            settings: the content of `tokenizer_config.json`.
            chat_templates: Jinja sources by name (`default`, `tool_use` ...).
        """
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = {name: _content(value) for name, value in (settings or {}).items() if _names_token(name, value)}
        """`bos_token`, `eos_token` ... -> text, as a chat template may name them."""
        self.chat_templates = chat_templates or {}
        self.added = frozenset(backend.get_added_tokens_decoder())
        """Ids of tokens that are matched in the text before anything else is done to it: special ones and the like."""

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a model, adapter or package folder.

        Raises:
            BadArtifact: the folder has no tokenizer, or a broken one.
            Unavailable: it has one that only transformers can convert, and that is not installed.
        """
        folder = Path(folder)
        environment.require("tokenizers", "to read a tokenizer")
        from tokenizers import Tokenizer as Backend

        path = folder / "tokenizer.json"
        if not path.is_file():
            backend = _convert(folder)
        else:
            try:
                backend = Backend.from_file(str(path))
            except Exception as error:  # the library raises bare Exception for anything wrong with the file
                raise BadArtifact(f"{path} is not a tokenizer: {' '.join(str(error).split())}", "copy it again from the model") from None
        settings = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
        _add_missing(backend, settings)
        return cls(backend, settings, _chat_templates(folder, settings))

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the default chat template, or None."""
        return self.chat_templates.get("default")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, or None."""
        return self._named("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, according to the tokenizer, or None."""
        return self._named("eos_token")

    def token(self, token_id: int) -> str:
        """Return a token's text as the vocabulary has it; an id beyond the vocabulary as `<id>`."""
        return self.backend.id_to_token(int(token_id)) or f"<{token_id}>"

    def id(self, token: str) -> int | None:
        """Return the id of a token given as the vocabulary has it, or None."""
        return self.backend.token_to_id(token)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text, without BOS or anything else added.

        Args:
            text: any text.
            special: special tokens written in it are themselves; otherwise they are plain characters.
        """
        return (self.backend if special else self._literal).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True, after: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
        """Return the ids of many texts at once.

        Args:
            texts: any texts.
            special: as in `encode`.
            after: for each text, the ids that stand before it: it is encoded as their continuation.
        """
        backend = self.backend if special else self._literal
        if after is None:
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return self._continue_batch(texts, [ids[-1] if ids else None for ids in after])

    def decode(self, ids: Sequence[int], *, after: Sequence[int] = (), special: bool = False) -> str:
        """Return the text of ids.

        Args:
            ids: tokens.
            after: ids that stand before them: their text is left out, but the first blank is kept where there is one.
            special: show special tokens too.
        """
        ids, before = [int(i) for i in ids], [int(i) for i in after[-16:]]
        text = self.backend.decode(before + ids, skip_special_tokens=not special)
        return text[len(self.backend.decode(before, skip_special_tokens=not special)) :] if before else text

    def stream(self, after: Sequence[int] = ()) -> Stream:
        """Return a decoder that takes one token at a time."""
        return Stream(self.backend, after)

    def adds_bos(self) -> bool:
        """Tell whether transformers puts BOS in front of a plain text.

        With a `tokenizer.json` its post-processor decides and `add_bos_token` is not read (transformers 5.23,
        `tokenization_utils_base.py`, `_from_pretrained`); without a post-processor nothing is added.
        """
        ids = self.backend.encode("a", add_special_tokens=True).ids
        return bool(ids) and self.bos_token_id is not None and ids[0] == self.bos_token_id

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        *,
        template: str | None = None,
    ) -> str:
        """Return the text of a chat by the model's chat template, or by another one.

        Raises:
            InvalidInput: there is no chat template, or it refuses the chat.
        """
        source = template or (self.chat_templates.get("tool_use") if tools else None) or self.chat_template
        if source is None:
            raise InvalidInput("the tokenizer has no chat template", "give --prompt-template, or use a chat model")
        return render_template(
            source, messages, tools=tools, add_generation_prompt=add_generation_prompt, special_tokens=self.special_tokens
        )

    def _named(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.id(text)

    def _continue_batch(self, texts: Sequence[str], last: Sequence[int | None]) -> list[list[int]]:
        """Encode each text as what follows its last id; see `encode_batch`."""
        result: list[list[int]] = [[]] * len(texts)
        ordinary = [i for i, token in enumerate(last) if token is not None and token not in self.added]
        for i, encoding in zip(
            ordinary, self._continuation.encode_batch_fast([texts[i] for i in ordinary], add_special_tokens=False), strict=True
        ):
            result[i] = encoding.ids
        # After an added token the text is a piece of its own: encode it behind that very token, and drop the token.
        rest = [i for i, token in enumerate(last) if token is None or token in self.added]
        fronts = ["" if (token := last[i]) is None else self.token(token) for i in rest]
        encodings = self.backend.encode_batch_fast(
            [front + texts[i] for i, front in zip(rest, fronts, strict=True)], add_special_tokens=False
        )
        for i, front, encoding in zip(rest, fronts, encodings, strict=True):
            result[i] = encoding.ids[1:] if front and encoding.ids[:1] == [last[i]] else encoding.ids
        return result

    @cached_property
    def _state(self) -> dict[str, Any]:
        return json.loads(self.backend.to_str())

    @cached_property
    def _literal(self) -> Any:
        """The same tokenizer, blind to special tokens. The switch is a state, so that threads need a tokenizer each."""
        copy = type(self.backend).from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _continuation(self) -> Any:
        """The same tokenizer without the blank that it puts before a text."""
        stages = {name: without_prefix(self._state.get(name)) for name in ("normalizer", "pre_tokenizer")}
        if all(stages[name] == self._state.get(name) for name in stages):
            return self.backend
        return type(self.backend).from_str(json.dumps({**self._state, **stages}))


def without_prefix(stage: Any) -> Any:
    """Return a stage of `tokenizer.json` without whatever puts a blank before a text (Prepend, Metaspace, ByteLevel)."""
    if not isinstance(stage, dict):
        return stage
    if stage.get("type") == "Prepend":
        return None
    changed = dict(stage)
    for name in ("normalizers", "pretokenizers"):
        if name in changed:
            changed[name] = [kept for part in changed[name] if (kept := without_prefix(part)) is not None]
    if changed.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    return changed


def _convert(folder: Path) -> Any:
    """Make a fast tokenizer from the older files (`tokenizer.model`, `vocab.json` ...)."""
    if not any(
        (folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
    ):
        raise BadArtifact(f"{folder} has no tokenizer (tokenizer.json)", "copy the tokenizer's files beside the model")
    transformers = environment.require("transformers", "to convert a tokenizer without tokenizer.json")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True).backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadArtifact(f"the tokenizer in {folder} cannot be converted: {reason}", "give a folder with tokenizer.json") from None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadArtifact(f"{path} is not JSON: {error}", "copy it again from the model") from None
    return content if isinstance(content, dict) else {}


def _chat_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Collect the chat templates; files win over tokenizer_config.json."""
    given = settings.get("chat_template") or _read(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):
        found = {str(entry["name"]): str(entry["template"]) for entry in given}
    else:
        found = {"default": str(given)} if given else {}
    main = folder / "chat_template.jinja"
    if main.is_file():
        found = {"default": main.read_text(encoding="utf-8")}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    return found


def _add_missing(backend: Any, settings: dict[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json knows, in the order of their ids, as transformers does."""
    from tokenizers import AddedToken

    listed = settings.get("added_tokens_decoder") or {}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, entry in sorted(((int(key), value) for key, value in listed.items()), key=lambda item: item[0]):
        if entry["content"] not in known:
            backend.add_tokens([AddedToken(**{key: value for key, value in entry.items() if key != "__type"})])


def _names_token(name: str, value: Any) -> bool:
    return name.endswith("_token") and bool(_content(value)) and not isinstance(value, bool)


def _content(value: Any) -> str:
    return value if isinstance(value, str) else str(value.get("content", "")) if isinstance(value, dict) else ""
