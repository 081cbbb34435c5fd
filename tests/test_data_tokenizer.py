"""The tokenizer against transformers, and what it does differently on purpose."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_models import CHATML, LLAMA, REASONING, TOOLS, byte_level, llama_like

from slmops.data import Tokenizer
from slmops.errors import BadArtifact, InvalidInput

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <b>bold</b> & “quoted”?"},
    {"role": "assistant", "content": "Ünïcode, of course."},
    {"role": "user", "content": "And now?"},
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}


def reference(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", [CHATML, REASONING, TOOLS], ids=["chatml", "reasoning", "tools"])
@pytest.mark.parametrize("ask", [False, True])
def test_chat_text_and_ids_equal_transformers(tmp_path, template, ask):
    folder = byte_level(tmp_path, chat_template=template)
    ours, theirs = Tokenizer.load(folder), reference(folder)
    tools = [TOOL] if template == TOOLS else None
    chat = [
        *CHAT,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm <&>"}}}],
        },
    ]
    chat = chat if template == TOOLS else [*CHAT, {"role": "assistant", "content": "Then.", "reasoning_content": "Hm."}]
    expected = theirs.apply_chat_template(chat, tools=tools, add_generation_prompt=ask, tokenize=False)
    text = ours.render_chat(chat, tools, add_generation_prompt=ask)
    assert text == expected
    ids = theirs.apply_chat_template(chat, tools=tools, add_generation_prompt=ask, tokenize=True, return_dict=False)
    assert ours.encode(text) == list(ids)


def test_llama_chat_equals_transformers(tmp_path):
    folder = llama_like(tmp_path, chat_template=LLAMA)
    ours, theirs = Tokenizer.load(folder), reference(folder)
    text = ours.render_chat(CHAT[1:3])
    assert text == theirs.apply_chat_template(CHAT[1:3], tokenize=False)
    assert text.startswith("<s>[INST]") and text.endswith("</s>")
    assert ours.encode(text) == list(theirs.apply_chat_template(CHAT[1:3], tokenize=True, return_dict=False))


def test_template_from_file_wins_over_config(tmp_path):
    folder = byte_level(tmp_path, chat_template=CHATML)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    ours = Tokenizer.load(folder)
    assert ours.render_chat(CHAT[1:]) == reference(folder).apply_chat_template(CHAT[1:], tokenize=False) == CHAT[1]["content"] + "!"


def test_template_that_refuses_or_fails_is_an_input_error(tmp_path):
    ours = Tokenizer.load(byte_level(tmp_path, chat_template=TOOLS))
    with pytest.raises(InvalidInput, match="the user speaks first"):
        ours.render_chat([{"role": "assistant", "content": "Hello"}])
    with pytest.raises(InvalidInput, match="unsafe|access"):
        ours.render_chat(CHAT, template="{{ ''.__class__.__mro__ }}")
    with pytest.raises(InvalidInput, match="no chat template"):
        Tokenizer.load(byte_level(tmp_path / "plain")).render_chat(CHAT)


@pytest.mark.parametrize("adds", [True, False])
def test_bos_rule_equals_transformers(tmp_path, adds):
    folder = llama_like(tmp_path, adds_bos=adds)
    # With tokenizer.json, add_bos_token is not what decides.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": not adds}))
    theirs, ours = reference(folder), Tokenizer.load(folder)
    assert ours.adds_bos() is adds
    assert (theirs("hello").input_ids[0] == 1) is adds
    assert ours.encode("hello") == theirs("hello", add_special_tokens=False).input_ids


def test_real_tokenizer_equals_transformers(shared):
    folder = shared / "models" / "stories3m"
    ours, theirs = Tokenizer.load(folder), reference(folder)
    assert (ours.adds_bos(), ours.bos_token_id, ours.eos_token_id, ours.vocabulary_size) == (True, 1, 2, 4096)
    text = (shared / "data" / "tinystories" / "valid.txt").read_text()[:2000]
    assert [1, *ours.encode(text)] == theirs(text).input_ids
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode_batch([text, "a"]) == [ours.encode(text), ours.encode("a")]


@pytest.mark.parametrize("make", [llama_like, lambda f: llama_like(f, metaspace=True), byte_level], ids=["prepend", "metaspace", "bytes"])
def test_continuation_equals_the_joint_text(tmp_path, make):
    tokenizer = Tokenizer.load(make(tmp_path))
    prompt = tokenizer.encode("Play some jazz music.\nIntent:")
    answer = tokenizer.encode_batch([" PlayMusic"], after=[prompt])[0]
    assert prompt + answer == tokenizer.encode("Play some jazz music.\nIntent: PlayMusic")
    assert tokenizer.decode(answer, after=prompt) == " PlayMusic"
    stream = tokenizer.stream(after=prompt)
    assert "".join(stream.push(i) for i in answer) == " PlayMusic"


def test_after_an_added_token_text_is_encoded_as_behind_it(tmp_path):
    tokenizer = Tokenizer.load(llama_like(tmp_path))
    assert [2, *tokenizer.encode_batch(["hello"], after=[[5, 2]])[0]] == tokenizer.encode("</s>hello")
    assert tokenizer.encode_batch(["hello"], after=[[]])[0] == tokenizer.encode("hello")


def test_stream_holds_back_half_a_character(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    ids = tokenizer.encode("aé🙂b")
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) == "aé🙂b" and "" in parts and not any("\ufffd" in part for part in parts)


def test_special_tokens_can_be_read_as_plain_text(tmp_path):
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    assert tokenizer.encode("<|im_end|>") == [tokenizer.id("<|im_end|>")]
    literal = tokenizer.encode("<|im_end|>", special=False)
    assert len(literal) > 1 and tokenizer.decode(literal) == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [tokenizer.id("<|im_end|>")]  # the switch did not stick


def test_threads_agree(tmp_path):
    tokenizer = Tokenizer.load(llama_like(tmp_path))
    texts = [f"Play {i} songs, please." for i in range(200)]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected


def test_token_known_to_the_config_only_is_added(tmp_path):
    folder = byte_level(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    size = Tokenizer.load(folder).vocabulary_size
    settings["added_tokens_decoder"] = {
        str(size): {"content": "<|call|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(folder).encode("a<|call|>")[-1] == size == reference(folder)("a<|call|>").input_ids[-1]


def test_missing_or_broken_tokenizer(tmp_path):
    with pytest.raises(BadArtifact, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadArtifact, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
