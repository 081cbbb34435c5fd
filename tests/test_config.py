"""Settings: who wins, what is refused, and that all problems are told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops import config
from slmops.config import ExportSettings, FinetuneSettings, VerifySettings, decode_escapes, flat, load, read_yaml
from slmops.errors import InvalidInput


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_flag_beats_yaml_beats_default(tmp_path: Path):
    path = written(tmp_path, "lora_rank: 8\nepochs: 3\n")
    settings = load(FinetuneSettings, path, lora_rank=4, epochs=None)
    assert (settings.method.lora_rank, settings.optimizer.epochs, settings.optimizer.batch_size) == (4, 3.0, 8)


def test_a_mapping_serves_as_a_file():
    assert load(ExportSettings, {"precision": "int8"}).precision == "int8"


def test_a_flag_that_says_false_beats_yaml_that_says_true(tmp_path: Path):
    assert load(ExportSettings, written(tmp_path, "force: true"), force=False).force is False


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("2.5e-4", 2.5e-4), ("0.001", 1e-3), (".5e-1", 0.05)])
def test_yaml_numbers_are_numbers(tmp_path: Path, text: str, value: float):
    assert load(FinetuneSettings, written(tmp_path, f"learning_rate: {text}")).optimizer.learning_rate == value


def test_all_problems_at_once_each_with_its_field(tmp_path: Path):
    path = written(tmp_path, "lora_rank: 0\nlearning_rate: fast\nlora_rnk: 3\nepochs: -1\n")
    with pytest.raises(InvalidInput) as caught:
        load(FinetuneSettings, path)
    message = caught.value.message
    assert str(path) in message
    for part in ("lora_rank: must be greater", "learning_rate: must be a valid number", "epochs: must be greater"):
        assert part in message
    assert "lora_rnk: unknown setting (did you mean lora_rank?)" in message
    assert caught.value.exit_code == 2


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path):
    with pytest.raises(InvalidInput, match="key given twice: seed.*line 1"):
        read_yaml(written(tmp_path, "seed: 1\nseed: 2\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[1, 2]", "holds a list"), ("a: [", "not valid YAML"), ("just words", "holds a str"), ("a: !!python/object:x {}", "not valid")],
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, expected: str):
    with pytest.raises(InvalidInput, match=expected):
        read_yaml(written(tmp_path, text))


def test_an_empty_file_is_no_settings_and_a_missing_one_an_error(tmp_path: Path):
    assert read_yaml(written(tmp_path, "# nothing yet\n")) == {}
    with pytest.raises(InvalidInput, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize("model", [getattr(config, name) for name in config.__all__ if name.endswith("Settings") and name != "Settings"])
def test_what_a_manifest_keeps_can_be_read_again(model: type[config.Settings]):
    settings = load(model) if model.__name__ not in ("DataSettings",) else model()
    assert load(model, flat(settings)) == settings


def test_a_choice_names_what_is_allowed():
    with pytest.raises(InvalidInput, match="precision: must be 'fp32', 'fp16', 'bf16', 'int8' or 'int4'"):
        load(ExportSettings, precision="int5")


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load(VerifySettings).kl_bar = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("given", "decoded"),
    [(r"a\nb", "a\nb"), (r"a\tb", "a\tb"), (r"a\\nb", r"a\nb"), (r"\d\é", r"\d\é"), ("a\nb", "a\nb"), (r"\\\n", "\\\n")],
)
def test_escapes(given: str, decoded: str):
    assert decode_escapes(given) == decoded


def test_templates_in_yaml_are_taken_as_yaml_has_them(tmp_path: Path):
    settings = load(FinetuneSettings, written(tmp_path, "prompt_template: \"{text}\\nIntent:\"\ncompletion_template: ' {intent}\\n'\n"))
    assert settings.data.prompt_template == "{text}\nIntent:"
    assert settings.data.completion_template == " {intent}\\n"
