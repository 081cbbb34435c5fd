"""The commands that make something: `data inspect`, `data prepare`, `finetune`, `merge`, `export`, `pack`."""

from __future__ import annotations

from typing import Any

import click

import slmops
from slmops.cli.options import Call, command
from slmops.config import ExportSettings, FinetuneSettings, InspectSettings, MergeSettings, PackSettings, PrepareSettings


@command(
    "data inspect",
    InspectSettings,
    examples=(
        "slmops data inspect train.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct",
        r"slmops data inspect train.csv --prompt-template '{text}\nIntent:' --completion-template ' {intent}'",
    ),
)
@click.argument("data")
def inspect(data: str, call: Call) -> Any:
    """Look at a dataset.

    DATA is a .jsonl, .json, .csv, .parquet or .txt file, a folder of them, or a Hugging Face dataset id. Shows which
    format was found, some rows token by token with what the loss counts, the lengths, and warnings: over-long rows,
    duplicates, empty fields, overlap with the validation rows.
    """
    return slmops.inspect_data(data, config=call.config, **call.overrides)


@command(
    "data prepare",
    PrepareSettings,
    writes="",
    examples=("slmops data prepare raw.csv -o runs/data", "slmops finetune MODEL runs/data -o runs/a"),
)
@click.argument("data")
def prepare(data: str, call: Call) -> Any:
    """Prepare a dataset.

    Drops duplicates and empty rows of DATA, sets validation rows aside, and writes both with a manifest. `finetune`
    takes the folder as its DATA.
    """
    return slmops.prepare_data(data, config=call.config, **call.overrides)


@command(
    "finetune",
    FinetuneSettings,
    writes="",
    examples=(
        "slmops finetune HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl -o runs/adapter",
        r"slmops finetune MODEL train.csv -o runs/intent --prompt-template '{text}\nIntent:' --completion-template ' {intent}'",
        "slmops finetune MODEL train.jsonl -o runs/adapter --config finetune.yaml --lora-rank 32",
        "slmops finetune MODEL train.jsonl -o runs/adapter --quantized-base runs/model-int4",
        "slmops finetune MODEL train.jsonl -o runs/adapter --evaluations 20 --patience 3 --report-to tensorboard",
        "slmops finetune MODEL train.jsonl -o runs/adapter --processes 2",
        "slmops finetune MODEL train.jsonl -o runs/adapter --resume",
        "slmops finetune MODEL train.jsonl -o runs/model --method full",
        "slmops finetune MODEL train.jsonl -o runs/prompt --method prompt --virtual-tokens 32",
        "slmops finetune MODEL handbook/ -o runs/domain --objective pretrain --retain old.txt --replay older.txt",
        "slmops finetune MODEL -o runs/both --objective multitask --task intent=intents.jsonl --task slots=slots.jsonl",
        "slmops finetune MODEL pairs.jsonl -o runs/preferred --objective dpo",
    ),
)
@click.argument("model")
@click.argument("data", required=False)
def finetune(model: str, data: str | None, call: Call) -> Any:
    r"""Train an adapter, or the whole model.

    MODEL is a Hugging Face folder or hub id. DATA is a .jsonl, .json, .csv, .parquet or .txt file, a folder of them, or
    a dataset id; its format is found by its columns (prompt and completion, alpaca, chat messages, text) unless
    templates are given. In a template, {field} takes a column, {{ and }} are braces, \n, \t and \\ are decoded.

    --objective says what is learned: answers (sft), plain text (pretrain), several tasks (multitask: each with --task
    NAME=FILE, and no DATA), or preferences between answers (dpo, reward: columns prompt, chosen, rejected, or templates).
    --loss FILE.py:CLASS is a loss of your own. --retain measures what old data costs, --replay mixes old data in.
    --method says what is trained: lora unless told otherwise, full for the whole model. Each method has settings of its own,
    and another's are refused; docs/methods.md has what each learned, at what price. Which of merge, pack and export are
    open to what it makes stands in the result, and `slmops show` prints it.

    With --quantized-base the frozen base is an export of MODEL, dequantized: the weights that the device will have. The
    adapter belongs to them from then on; evaluate and bench load it on them.
    """
    return slmops.finetune(model, data, config=call.config, **call.overrides)


@command(
    "merge",
    MergeSettings,
    writes="",
    unless="plan",
    examples=(
        "slmops merge runs/intent -o runs/merged",
        "slmops merge runs/intent runs/slots -o runs/both --data intent=intents.jsonl --data slots=slots.jsonl",
        "slmops merge runs/intent runs/slots -o runs/blend --weights 0.7,0.3 --strategy ties_svd --density 0.5 --into adapter",
        "slmops merge runs/intent --plan --precision int4",
    ),
)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True)
def merge(adapters: tuple[str, ...], call: Call) -> Any:
    """Merge adapters.

    ADAPTER is a folder that `finetune` wrote, or any PEFT folder; NAME=FOLDER gives it another name than the folder's. The
    base is found through its manifest; templates and stop tokens go along. Adapters of another base are refused.

    Several LoRA adapters become one first: `cat`, the default, is exactly the sum of what each does to the weights, times
    its weight (the mean, unless --weights says otherwise); every other strategy of PEFT loses something for something else, and how much is reported. With --data,
    each adapter's task is scored before and after: what the merge costs it stands in the regret table.

    --plan writes nothing: it tells how much of the fine-tune a quantizer would leave, layer by layer, and whether to merge
    it, to keep layers in a higher precision, or to keep it as a runtime adapter.
    """
    return slmops.merge(list(adapters), config=call.config, **call.overrides)


@command(
    "export",
    ExportSettings,
    writes="",
    examples=(
        "slmops export runs/merged -o runs/int4",
        "slmops export runs/merged -o runs/packages --device cpu --precision int4,int8",
        "slmops export runs/merged -o runs/webgpu --device gpu --provider webgpu",
    ),
)
@click.argument("model")
def export(model: str, call: Call) -> Any:
    """Export a model.

    MODEL is a merged model, any Hugging Face folder, or an adapter folder (merged first). The recipe is chosen from the
    model's shape and printed; the graph that was written is checked against it. Several precisions share one build: each
    is a whole export in a folder of its own, OUT/int4 and OUT/int8.
    """
    return slmops.exports(model, config=call.config, **call.overrides)


@command(
    "pack",
    PackSettings,
    examples=(
        "slmops pack MODEL --adapter intent=runs/intent --adapter slots=runs/slots -o runs/package",
        "slmops pack runs/package --adapter style=runs/style",
        "slmops pack runs/package --remove slots",
    ),
)
@click.argument("source")
def pack(source: str, call: Call) -> Any:
    """Pack adapters.

    SOURCE is the base model that the adapters were trained on, an export of it, or a package to change in place. The
    base is exported once; adapters stay small files of their own, in float, and are switched per request: `slmops generate PACKAGE PROMPT
    --adapter NAME`. What cannot be switched at run time (DoRA, biases, an adapted embedding ...) is refused with the way out.
    """
    return slmops.pack(source, config=call.config, **call.overrides)
