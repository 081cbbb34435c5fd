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
            ("compiler", document.get("compiler") or ""),
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
    _targets(page, document.get("targets") or [])
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


def _targets(page: Page, targets: list[Mapping[str, Any]]) -> None:
    """Write the targets, a line each device, provider and level, with the precisions that share it; then what runs them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    runtimes: dict[str, str] = {}
    for target in targets:
        device, provider = str(target.get("device")), str(target.get("provider"))
        name = device if device == provider else f"{device} {provider}"
        here = ["yes" if target.get(key) else "no" for key in ("builds_here", "executes_here")]
        groups.setdefault((name, *here, str(target.get("level", ""))), []).append(str(target.get("precision")))
        extra = f" (slmops[{target['extra']}])" if target.get("extra") else ""
        lacks = f"; lacks {target['lacks']}" if target.get("lacks") else ""
        runtimes[name] = f"{target.get('runtime_package')}{extra}{lacks}"
    rows = [(name, " ".join(precisions), *rest) for (name, *rest), precisions in groups.items()]
    page.table(("target", "precisions", "builds here", "runs here", "slmops took it to"), rows, status=3)
    page.text()
    page.facts([(f"{name} is run by", runtime) for name, runtime in runtimes.items()])
    page.text("how and where each was checked: docs/targets.md, and --json")


def _torch(torch: Mapping[str, Any] | None) -> str:
    if not torch:
        return "not installed (needed to train and export, not to run a package)"
    if "error" in torch:
        return f"does not work: {torch['error']}"
    gpus = ", ".join(torch.get("gpus") or ()) or "no GPU"
    return f"{torch.get('version')}, {'CUDA ' + torch['cuda_build'] if torch.get('cuda_build') else 'CPU build'}, {gpus}"
