"""Answer JSON lines with one package: on a Unix socket (`--socket PATH`), or from stdin to stdout.

A request is one line, `{"prompt": ..., "adapter": NAME or {NAME: WEIGHT} or null, "max_new_tokens": 64, "raw": false}`; its answer is one line,
`{"text": ...}` or `{"error": ..., "hint": ...}`. Requests of all connections are answered one after the other.
"""

from __future__ import annotations

import argparse
import json
import socketserver
import sys
import threading
import time
from pathlib import Path
from typing import Any

from slmops.errors import SlmopsError
from slmops.runtime import Package

KNOWN = {"prompt", "adapter", "max_new_tokens", "raw"}


class Host:
    """One package and a lock: the runtime's adapters are shared by all requests."""

    def __init__(self, folder: Path) -> None:
        self.package = Package(folder)
        self.lock = threading.Lock()

    def answer(self, line: str) -> str:
        """Return the answer to one request."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or not isinstance(request.get("prompt"), str) or set(request) - KNOWN:
                raise ValueError(f"a request is an object with `prompt` and, if need be, {', '.join(sorted(KNOWN - {'prompt'}))}")
            with self.lock:
                return json.dumps(self._generate(request), ensure_ascii=False)
        except SlmopsError as error:
            return json.dumps({"error": error.message, "hint": error.hint}, ensure_ascii=False)
        except (ValueError, TypeError) as error:
            return json.dumps({"error": f"not a request: {error}", "hint": 'send {"prompt": "...", "adapter": "NAME"} in one line'})

    def _generate(self, request: dict[str, Any]) -> dict[str, Any]:
        started, adapter = time.perf_counter(), request.get("adapter")
        options = {"max_new_tokens": int(request.get("max_new_tokens", 64)), "raw": bool(request.get("raw", False))}
        text = "".join(self.package.generate(request["prompt"], adapter=adapter, **options))
        return {"text": text, "adapter": adapter, "milliseconds": round(1e3 * (time.perf_counter() - started), 1)}


def serve(host: Host, path: Path) -> None:
    """Serve connections of a Unix socket until the process ends."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write((host.answer(line.decode("utf-8", "replace")) + "\n").encode("utf-8"))

    path.unlink(missing_ok=True)
    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        server.daemon_threads = True
        server.serve_forever()


def main() -> None:
    """Serve a socket, or stdin."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("package", type=Path)
    parser.add_argument("--socket", type=Path, default=None)
    given = parser.parse_args()
    try:
        host = Host(given.package)
    except SlmopsError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    if given.socket is not None:
        serve(host, given.socket)
    for line in sys.stdin:
        print(host.answer(line), flush=True)


if __name__ == "__main__":
    main()
