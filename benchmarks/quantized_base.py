r"""What does it buy to train an adapter on the very weights that ship (`finetune --quantized-base`)?

For each seed two adapters are trained, one on the float model and one on a coarse int4 export of it, and three models
answer the same rows in PyTorch: the fine-tune in float, its adapter put on the coarse weights, and the adapter that
learned on them. Points lost are against the first, paired row by row, averaged over the seeds.

    python benchmarks/quantized_base.py MODEL TRAIN TEST --work DIR --prompt-template '{text}\nIntent:' --completion-template ' {intent}'

The base is an int4 export, made coarser on purpose where `--every N` says so: of the 16 steps of a layer's grid only
every Nth stays (2: what 3 bits could hold), in the layers that `--coarse` names. It is still an int4 graph that runs
and passes its own checks. Folders in DIR are used again, so a long run may be cut into pieces: `--seeds 0` first, all
of them last. Prints a table, and one JSON line for programs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import slmops
from slmops import artifact, environment, errors, evaluation, results
from slmops.config import decode_escapes
from slmops.data import Tokenizer, encode_rows, read_rows
from slmops.graph import linears, quantization, rewriting
from slmops.runtime import hugging_face, loading, quantized_base
from slmops.runtime.loading import Loaded
from slmops.runtime.torch_runner import TorchRunner

ROWS = ("float base", "float adapter on the coarse base", "trained on the coarse base")


def main() -> None:
    options = _options()
    base = options.work / "coarse"
    if not (base / artifact.MANIFEST).is_file():
        make_coarse(options.model, base, options)
    package = quantized_base.find_quantized_base(base, options.model)
    rows = read_rows(options.test)
    correct: dict[str, list[list[float]]] = {name: [] for name in ROWS}
    losses: dict[str, list[float]] = {name: [] for name in ROWS}
    for seed in options.seeds:
        on_float, on_coarse = (train(options, seed, where) for where in (None, base))
        for name, adapter, weights in zip(ROWS, (on_float, on_float, on_coarse), (None, package, package), strict=True):
            hits, loss = measure(options.model, adapter, weights, rows)
            correct[name].append(hits)
            losses[name].append(loss)
    show(options, package, correct, losses)


def make_coarse(model: Path, out: Path, options: argparse.Namespace) -> None:
    """Export a model in int4, and keep only every Nth step of the grids of the layers named."""
    made = slmops.export(model, out=out, precision="int4", block_size=options.block_size, force=True)
    if options.every == 1:
        return
    graph = linears.load_graph(out / rewriting.FULL)
    for linear in linears.linears(graph):
        if linear.name.rsplit(".", 1)[-1] in options.coarse:
            _coarsen(graph, linear, options.every)
    with TemporaryDirectory(prefix="slmops-coarse-", dir=options.work) as scratch:  # the graph still reads from the file that it replaces
        rewriting.save_twins(graph, Path(scratch))
        for file in Path(scratch).iterdir():
            file.replace(out / file.name)
    artifact.seal(out, warnings=[*made.manifest.warnings, f"only every {options.every}. step of the grid: {', '.join(options.coarse)}"])


def _coarsen(graph: Any, linear: linears.Linear, every: int) -> None:
    """Round a layer's codes to every Nth step from its zero point, in place; scales and zero points stay."""
    import onnx_ir

    matrix = linears.quantized(graph, linear)
    zero = matrix.zero_points.astype(np.int64)[..., None]
    top = 2**matrix.scheme.bits - 1
    steps = np.rint((matrix.codes.astype(np.int64) - zero) / every).astype(np.int64)
    codes = zero + every * np.clip(steps, -(zero // every), (top - zero) // every)
    packed = quantization.pack(replace(matrix, codes=codes.astype(np.uint8)))[0]
    graph.graph.initializers[linear.tensors[0]].const_value = onnx_ir.tensor(np.ascontiguousarray(packed), name=linear.tensors[0])


def train(options: argparse.Namespace, seed: int, package: Path | None) -> Path:
    """Return the adapter of a seed, trained on the float model or on a package's weights; one that is there is used again."""
    out = options.work / f"{'coarse' if package else 'float'}-{seed}"
    if not (out / artifact.MANIFEST).is_file():
        settings = {
            "prompt_template": decode_escapes(options.prompt_template),
            "completion_template": decode_escapes(options.completion_template),
            "epochs": options.epochs,
            "learning_rate": options.learning_rate,
            "lora_rank": options.lora_rank,
        }
        slmops.finetune(options.model, options.train, out=out, seed=seed, quantized_base=package, **settings)
    return out


def measure(
    model: Path, adapter: Path, package: quantized_base.QuantizedBase | None, rows: list[dict[str, Any]]
) -> tuple[list[float], float]:
    """Return whether each row is answered exactly, and the mean loss in nats a supervised token, of an adapter on a base."""
    from peft import PeftModel

    found = artifact.load(adapter)
    network: Any = quantized_base.load_dequantized(model, package) if package else hugging_face.load_model(model)
    network = PeftModel.from_pretrained(network, adapter).eval()
    hugging_face.refuse_misfits(network, adapter)
    runner = TorchRunner(network, model, environment.threads_for(4 * hugging_face.parameter_count(model)))
    interface = loading.interface_of(adapter, found)
    loaded = Loaded(runner, Tokenizer.load(model), interface, found, "adapter")
    longest = evaluation.longest_answer_tokens(evaluation.questions_of(rows, loaded.tokenizer, interface))
    answers = evaluation.answer_rows(loaded, rows, max_new_tokens=longest, batch_size=128)
    losses = evaluation.token_losses(loaded, encode_rows(rows, loaded.tokenizer, interface))
    return [float(answer.correct) for answer in answers], sum(loss.nats for loss in losses) / sum(loss.tokens for loss in losses)


def show(
    options: argparse.Namespace,
    package: quantized_base.QuantizedBase,
    correct: dict[str, list[list[float]]],
    losses: dict[str, list[float]],
) -> None:
    means = {name: np.mean(values, axis=0) for name, values in correct.items()}
    document: dict[str, Any] = {"model": str(options.model), "seeds": options.seeds, "rows": len(means[ROWS[0]])}
    document |= {"recipe": package.facts["recipe"], "every": options.every, "coarse": options.coarse, "figures": {}}
    print(f"{options.model}: {len(means[ROWS[0]])} rows, seeds {', '.join(map(str, options.seeds))}, {environment.machine().processor}\n")
    print("| | exact match, seed by seed | mean | points lost, paired | nats a token |\n| --- | --- | ---: | ---: | ---: |")
    for name in ROWS:
        each, loss = [float(np.mean(values)) for values in correct[name]], float(np.mean(losses[name]))
        figures: dict[str, Any] = {"exact_match": each, "nats": loss}
        lost = ""
        if name != ROWS[0]:
            paired = results.paired_difference((100 * means[ROWS[0]]).tolist(), (100 * means[name]).tolist())
            figures["points_lost"] = paired.document()
            lost = f"{paired.value:.2f} [{paired.low:.2f}, {paired.high:.2f}]"
        print(f"| {name} | {', '.join(f'{value:.4f}' for value in each)} | {np.mean(each):.4f} | {lost} | {loss:.4f} |")
        document["figures"][name] = figures
    print()
    print(json.dumps(document))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("train", help="rows to learn")
    parser.add_argument("test", help="rows to measure on")
    parser.add_argument("--work", type=Path, required=True, help="where the base and the adapters are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompt-template", required=True)
    parser.add_argument("--completion-template", required=True)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--block-size", type=int, help="of the base (default: the recipe's)")
    parser.add_argument("--every", type=int, default=2, help="steps of the grid that stay (1: all)")
    parser.add_argument(
        "--coarse", nargs="+", default=["lm_head"], help="layers whose grid is made coarser (lm_head: and the embedding tied to it)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except errors.SlmopsError as error:
        sys.exit(f"error: {error.message}\nhint: {error.hint}")
