"""How does `doctor` report what it found?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmops.cli.display.figures import size
from slmops.cli.display.layout import Page


def diagnosis(page: Page, document: Mapping[str, Any]) -> None:
    """Write machine, libraries, providers, targets, and each problem with what to do about it."""
    machine = document.get("machine") or {}
    bandwidth = document.get("bandwidth_bytes_per_second")
    memory = (
        f"{size(machine.get('memory_bytes'))}, {size(document.get('memory_available_bytes'))} free" if machine.get("memory_bytes") else ""
    )
    page.facts(
        [
            ("processor", f"{machine.get('processor', '')}, {machine.get('cores')} cores"),
            ("features", " ".join(machine.get("features") or ())),
            ("memory", memory),
            ("bandwidth", f"{size(bandwidth)}/s read, measured" if bandwidth else ""),
            ("disk here", f"{size(document.get('disk_free_bytes'))} free"),
            ("system", f"{machine.get('system', '')}, Python {machine.get('python', '')}"),
            ("torch", _torch(document.get("torch"))),
            ("telemetry", "off, of every dependency" if (document.get("telemetry") or {}).get("off") else "ON"),
        ]
    )
    page.text()
    packages = document.get("packages") or []
    page.table(
        ("library", "installed", "tested", "status"),
        [(item["name"], item.get("installed") or "", item.get("tested") or "", item.get("status") or "") for item in packages],
        status=3,
    )
    page.text()
    providers = [(item["name"], "ok" if item.get("works") else "no", item.get("detail") or "") for item in document.get("providers") or []]
    page.table(("provider", "works", "how it was tried"), providers, status=1)
    page.text()
    page.table(
        ("target", "built here", "runs here", "slmops tested it", "note"), [_target(t) for t in document.get("targets") or []], status=2
    )
    page.text()
    _problems(page, document.get("problems") or [])


def _problems(page: Page, problems: list[Mapping[str, Any]]) -> None:
    if not problems:
        page.heading("no problems found", "bold green")
    for item in problems:
        page.heading(
            f"{item.get('severity', 'warning')}: {item.get('problem')}", "bold red" if item.get("severity") == "error" else "yellow"
        )
        page.text(f"  fix: {item.get('fix')}")


def _target(target: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"{target.get('device')} {target.get('precision')}"
    here = ["yes" if target.get(key) else "no" for key in ("builds_here", "executes_here")]
    return (name, *here, str(target.get("level", "")), str(target.get("lacks") or ""))


def _torch(torch: Mapping[str, Any] | None) -> str:
    if not torch:
        return "not installed (needed to train and export, not to run a package)"
    if "error" in torch:
        return f"does not work: {torch['error']}"
    gpus = ", ".join(torch.get("gpus") or ()) or "no GPU"
    return f"{torch.get('version')}, {'CUDA ' + torch['cuda_build'] if torch.get('cuda_build') else 'CPU build'}, {gpus}"
