"""What does a checkpoint hold? All that the next optimizer step depends on, so that a resumed run is the unbroken run, bit for bit.

    weights.safetensors      the trainable parameters, and what an adaptive method has learned about their importance
    optimizer.safetensors    the optimizer's state, tensor by tensor; its groups and numbers are in state.json
    best/                    what had the lowest validation loss so far, where it was measured
    random-0.safetensors     the state of torch's generators, a file for each process; python's and numpy's in random-0.json
    state.json               the schedule, and the loss that has been summed up since it was last logged
    trainer_state.json       transformers' own: step, epoch, history

No pickle: transformers' own checkpoints are `torch.save`d, and nothing of them is needed here. A float is written to JSON with
all its digits (`repr`), so it comes back as the same number.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from slmops import artifact
from slmops.errors import BadArtifact

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
# What AdaLoRA's allocator knows of each weight (peft 0.21, tuners/adalora/layer.py, RankAllocator).
_ALLOCATOR = "rankallocator"
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def write_weights(model: Any, folder: Path) -> None:
    """Write the trainable parameters of a model, by name."""
    from safetensors.torch import save_file

    tensors = {name: weight.detach().cpu().contiguous() for name, weight in _trainable(model).items()}
    for kind, known in _importance(model).items():
        tensors |= {f"{_ALLOCATOR}.{kind}.{name}": value.detach().cpu().contiguous() for name, value in known.items()}
    save_file(tensors, folder / WEIGHTS)


def read_weights(model: Any, folder: Path) -> None:
    """Put the trainable parameters of a checkpoint into a model.

    Raises:
        BadArtifact: they are not those of this model.
    """
    import torch
    from safetensors.torch import load_file

    stored = load_file(folder / WEIGHTS)
    trainable = _trainable(model)
    if set(trainable) != {name for name in stored if not name.startswith(f"{_ALLOCATOR}.")}:
        raise BadArtifact(f"{folder} is a checkpoint of another model", "start the run without --resume")
    with torch.no_grad():
        for name, weight in trainable.items():
            weight.copy_(stored[name])
    for kind, known in _importance(model).items():
        start = f"{_ALLOCATOR}.{kind}."
        known |= {name.removeprefix(start): value for name, value in stored.items() if name.startswith(start)}


def write_optimizer(optimizer: Any, scheduler: Any, extra: dict[str, Any], folder: Path) -> None:
    """Write the optimizer's state, the schedule's and `extra` numbers."""
    import torch
    from safetensors.torch import save_file

    held = optimizer.state_dict()
    tensors: dict[str, Any] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in held["state"].items():
        for key, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                numbers.setdefault(str(index), {})[key] = value
    save_file(tensors, folder / OPTIMIZER)
    document = {"groups": held["param_groups"], "numbers": numbers, "schedule": scheduler.state_dict(), **extra}
    artifact.write_json(folder / STATE, document)


def read_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Put a checkpoint's state into the optimizer and the schedule."""
    from safetensors.torch import load_file

    document = read_state(folder)
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in document["numbers"].items()}
    for name, tensor in load_file(folder / OPTIMIZER).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": document["groups"]})
    scheduler.load_state_dict(document["schedule"])


def read_state(folder: Path) -> dict[str, Any]:
    """Return the numbers of a checkpoint."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def write_random(folder: Path, process: int) -> None:
    """Write the state of every generator of this process."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    generators = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.random.get_rng_state()
    save_file(generators, folder / f"random-{process}.safetensors")
    legacy: Any = np.random.get_state()
    known = {"python": random.getstate(), "numpy": [legacy[0], legacy[1].tolist(), *legacy[2:]]}
    artifact.write_json(folder / f"random-{process}.json", known)


def read_random(folder: Path, process: int) -> None:
    """Put every generator of this process into the state that a checkpoint holds.

    Raises:
        BadArtifact: the checkpoint is of a run with fewer processes.
    """
    import numpy as np
    import torch
    from safetensors.torch import load_file

    path = folder / f"random-{process}.json"
    if not path.is_file():
        raise BadArtifact(f"{folder} has no state of process {process}", "resume with the number of processes that it began with")
    known = json.loads(path.read_text(encoding="utf-8"))
    version, words, gauss = known["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = known["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    generators = load_file(folder / f"random-{process}.safetensors")
    torch.random.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(generators["cuda"])


def flush(folder: Path) -> None:
    """See that the files of a folder are on the disk before it gets the name of a whole checkpoint."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def rank_patterns(model: Any) -> dict[str, Any]:
    """Return what an adaptive method has decided so far, by adapter (PEFT's `rank_pattern`)."""
    return {name: config.rank_pattern for name, config in _configs(model).items() if getattr(config, "rank_pattern", None)}


def restore_rank_patterns(model: Any, patterns: dict[str, Any]) -> None:
    """Let an adaptive method go on from what it had decided."""
    for name, config in _configs(model).items():
        if name in patterns:
            config.rank_pattern = patterns[name]


def _trainable(model: Any) -> dict[str, Any]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _importance(model: Any) -> dict[str, dict[str, Any]]:
    allocator = getattr(getattr(model, "base_model", None), _ALLOCATOR, None)
    return {kind: getattr(allocator, kind) for kind in _IMPORTANCE if hasattr(allocator, kind)}


def _configs(model: Any) -> dict[str, Any]:
    return getattr(model, "peft_config", None) or {}
