"""What runs a workflow in Olive's process? `python -P -m slmops.olive_backend.run_process WORK`, in the user's folder.

It tells its parent through files in WORK: `result.json`, written last, or `error.json`, an error of slmops as its JSON.
Exit code 4: Olive ended without a model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from slmops import environment
from slmops.errors import InvalidInput, SlmopsError

NO_MODEL = 4


def main(work: Path) -> int:
    """Check the workflow that `request.json` names, and run it unless only the check was asked for."""
    environment.collect_seldom()
    from slmops.olive_backend.package_config import package_config
    from slmops.olive_backend.validation import validate

    request = json.loads((work / "request.json").read_text(encoding="utf-8"))
    try:
        workflow = validate(request["workflow"])
        if request["check"]:
            _write(work / "result.json", {"passes": named_passes(workflow), "peak_memory_bytes": environment.peak_memory_bytes()})
            return 0
        require_model(workflow)
        from olive.workflows import run

        # Olive changes the mapping that it is given.
        output: Any = run(json.loads(json.dumps(workflow)), package_config=package_config(), tempdir=str(work / "tmp"))
    except Exception as error:  # noqa: BLE001  (sorted into ours and Olive's, and raised again)
        ours = own_error(error)
        if ours is not None:
            _write(work / "error.json", ours.document())
        raise
    if output is None or not output.has_output_model():
        return NO_MODEL
    _write(work / "result.json", outcome(output, workflow))
    return 0


def require_model(workflow: dict[str, Any]) -> None:
    """Refuse a Hugging Face model that is no folder: Olive would ask the hub for it.

    Raises:
        InvalidInput: there is no such folder.
    """
    model = workflow["input_model"]
    path = (model.get("config") or model).get("model_path")
    if str(model["type"]).lower() == "hfmodel" and isinstance(path, str) and not Path(path).is_dir():
        raise InvalidInput(f"input_model: no such folder: {path}", "give the folder of a Hugging Face model; nothing is downloaded")


def named_passes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each pass as `name` and `type`."""
    entries = [(name, run) for name, entry in workflow["passes"].items() for run in (entry if isinstance(entry, list) else [entry])]
    return [{"name": name, "type": run["type"]} for name, run in entries]


def own_error(error: BaseException | None) -> SlmopsError | None:
    """Return the error of slmops that lies at the bottom of an exception of Olive's, or None."""
    while error is not None:
        if isinstance(error, SlmopsError):
            return error
        error = error.__cause__
    return None


def outcome(output: Any, workflow: dict[str, Any]) -> dict[str, Any]:
    """Return what an Olive run made, of its `WorkflowOutput`."""
    best = output.get_best_candidate()
    runs = [node for node in output.footprint.nodes.values() if node.from_pass]
    types = {each["type"].lower(): each["type"] for each in named_passes(workflow)}  # Olive's are in lower case
    return {
        "model_type": best.model_type,
        "model_path": best.model_config.get("model_path"),
        "adapter_path": best.model_config.get("adapter_path"),
        "metrics": _figures(best.metrics_value),
        "passes": named_passes(workflow),
        "runs": [
            {
                "type": types.get(node.from_pass, node.from_pass),
                "seconds": round(node.end_time - node.start_time, 3),
                "config": {name: value for name, value in (node.pass_run_config or {}).items() if value is not None},
                "made": bool(node.model_config_data and not node.model_config_data.get("is_pruned")),
                "best": node.model_id == best.model_id,
                "metrics": _figures(node.metrics.value.to_json() if node.metrics and node.metrics.value else None),
            }
            for node in runs
        ],
        "peak_memory_bytes": environment.peak_memory_bytes(),
    }


def _figures(metrics: dict[str, Any] | None) -> dict[str, float]:
    return {name: entry["value"] for name, entry in (metrics or {}).items()}


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, default=str), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
