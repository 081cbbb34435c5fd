"""How does one package in memory answer with many adapters, a request at a time?

    package = Package("runs/package")
    "".join(package.generate("play some jazz", adapter="intent"))
    "".join(package.generate("play some jazz", adapter={"intent": 0.7, "slots": 0.3}))
    "".join(package.generate("Once upon a time"))                       # the base, exactly

The base is loaded once, an adapter when it is first asked for; the least recently used one goes when too many are
loaded. Every request has a new generator, so that no request sees another's adapter or cache. What onnxruntime does not
check is checked before it sees an adapter: hashes, names, shapes, types and the base that it belongs to.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np

from slmops import artifact, environment
from slmops.artifact import Artifact
from slmops.data import Interface, Tokenizer
from slmops.errors import BadArtifact, InvalidInput, RunFailed
from slmops.graph.lora import ADAPTER
from slmops.runtime import adapter_files, operators
from slmops.runtime.engines import engine_of, open_export, weights_bytes
from slmops.runtime.genai_runner import GenaiRunner
from slmops.runtime.runner import ExportRunner, Sampling
from slmops.runtime.sessions import Sessions

Selection = str | Mapping[str, float] | None
"""An adapter by name, several with their weights, or None: the base."""
_MOST_LOADED = 32


def adapter_names(found: Artifact) -> tuple[str, ...]:
    """Return the names of a package's adapters; none for an export."""
    return tuple(found.manifest.facts.get("adapters", {}))


def adapter_facts(found: Artifact, name: str) -> dict[str, Any]:
    """Return what the manifest says of an adapter.

    Raises:
        InvalidInput: the package has no adapter of that name.
    """
    known = found.manifest.facts.get("adapters", {})
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none; `slmops pack` puts them in"
        raise InvalidInput(f"{found.path} has no adapter {name}", has)
    return known[name]


def weights_of(found: Artifact, selection: Selection) -> dict[str, float]:
    """Return the adapters that a selection names, each with its weight; empty for the base.

    Raises:
        InvalidInput: the package has no such adapter, or a weight is no finite number.
    """
    weights = {selection: 1.0} if isinstance(selection, str) else dict(selection or {})
    for name, weight in weights.items():
        adapter_facts(found, name)
        if not math.isfinite(weight):
            raise InvalidInput(f"adapter: the weight of {name} is {weight}", "give a number, such as 0.7")
    return weights


def interface_with(found: Artifact, selection: Selection) -> Interface:
    """Return how text goes in and out of a package with an adapter on; of several, as the first one says."""
    names = list(weights_of(found, selection))
    content = adapter_facts(found, names[0])["interface"] if names else found.manifest.interface
    return Interface.model_validate(content)


class Package:
    """A package in memory.

    Args:
        folder: of `slmops pack`, or an export, which has no adapters.
        threads: of the operators; None: by the size of the weights.
        most_loaded: adapters kept in memory; the least recently used one goes.
        prepacking, portable: of onnxruntime: see `Sessions`.

    Raises:
        BadArtifact: the package is incomplete or changed.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        threads: int | None = None,
        most_loaded: int = _MOST_LOADED,
        prepacking: bool = True,
        portable: bool = False,
    ) -> None:
        found = artifact.load(folder, kinds=("package", "export"))
        artifact.check(found)
        self._open(found, threads, most_loaded, prepacking=prepacking, portable=portable)

    @classmethod
    def of_parts(cls, folder: Path, interface: Mapping[str, Any] | None, facts: Mapping[str, Any], *, prepacking: bool = True) -> Package:
        """Return a package that is still being written and has no manifest yet, as any program would run it."""
        manifest = artifact.Manifest(
            kind="package", created="", version="", command="", interface=dict(interface) if interface else None, facts=dict(facts)
        )
        package = cls.__new__(cls)
        package._open(Artifact(folder, manifest), None, _MOST_LOADED, prepacking=prepacking, portable=True)
        return package

    def _open(self, found: Artifact, threads: int | None, most_loaded: int, *, prepacking: bool, portable: bool) -> None:
        self.found, self.folder = found, found.path
        self.threads = threads or environment.threads_for(weights_bytes(self.folder))
        self.tokenizer = Tokenizer.load(self.folder)
        engine = engine_of(self.folder)
        self._is_genai = engine is None or engine.name == "genai"
        if self._is_genai:
            self._sessions = Sessions(self.folder, self.threads, prepacking=prepacking, portable=portable)
        sessions = self._sessions if self._is_genai else None  # no reference to the package, which would then be freed late
        self._library = _Library(found, most_loaded, fast=lambda: sessions is not None and sessions.fast)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return adapter_names(self.found)

    def interface(self, adapter: Selection = None) -> Interface:
        """Return how text goes in and out: an adapter's own templates and stop tokens; of several, the first one's."""
        return interface_with(self.found, adapter)

    def engine_runner(self, adapter: Selection = None) -> ExportRunner:
        """Return a runner on the engine that the package is for; only onnxruntime-genai's has adapters: see `runner`."""
        weights_of(self.found, adapter)
        return self.runner(adapter) if self._is_genai else self._alone

    @cached_property
    def _alone(self) -> ExportRunner:
        return open_export(self.folder, self.threads)

    def runner(self, adapter: Selection = None) -> GenaiRunner:
        """Return a runner of the base with an adapter on, by onnxruntime-genai; runners share all sessions.

        Raises:
            InvalidInput: no adapter of that name.
            BadArtifact: its file does not fit the graph.
        """
        weights = weights_of(self.found, adapter)
        active = _Adapter(self._library, weights) if weights else None
        return GenaiRunner(self.folder, self.threads, sessions=self._sessions, adapter=active)

    def generate(
        self, prompt: str, *, adapter: Selection = None, max_new_tokens: int = 128, sampling: Sampling | None = None, raw: bool = False
    ) -> Iterator[str]:
        """Yield the answer to a prompt, piece by piece.

        Args:
            prompt: put into the adapter's template (or the package's), unless `raw`.
            adapter: one by name, several by weight, or None for the base.
            max_new_tokens: longest answer.
            sampling: how tokens are chosen; None: greedily.
            raw: the prompt is given to the model as it is.
        """
        from slmops.runtime.generation import answer

        return answer(
            self.engine_runner(adapter),
            self.tokenizer,
            self.interface(adapter),
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            raw=raw,
        )

    def load(self, adapter: Selection) -> None:
        """Load an adapter into the runtime before it is first asked for."""
        weights = weights_of(self.found, adapter)
        if weights:
            self._library.loaded(_Adapter(self._library, weights), self._sessions.model(self._sessions.filename(adapted=True)))

    def close(self) -> None:
        """Free everything."""
        self._library.close()
        if self._is_genai:
            self._sessions.close()
        elif (runner := self.__dict__.pop("_alone", None)) is not None:
            runner.close()


class _Adapter:
    """One selection of adapters, as a runner turns it on."""

    def __init__(self, library: _Library, weights: dict[str, float]) -> None:
        self.library, self.weights = library, weights
        self.key = "+".join(f"{name}={weight!r}" for name, weight in weights.items())

    def tensors(self, *, packed: bool) -> Mapping[str, np.ndarray]:
        """Return its tensors: see `ActiveAdapter`."""
        return self.library.packed(self.weights) if packed else self.library.tensors(self.weights)

    def activate(self, generator: Any, model: Any) -> None:
        """Turn it on: see `ActiveAdapter`."""
        generator.set_active_adapter(self.library.loaded(self, model), self.key)


class _Library:
    """The adapters of a package: their files, and those that onnxruntime-genai has loaded, in the order of their use."""

    def __init__(self, found: Artifact, most_loaded: int, fast: Callable[[], bool]) -> None:
        self.found, self.most_loaded, self._fast = found, max(1, most_loaded), fast
        self._order: OrderedDict[str, Path] = OrderedDict()
        self._sums = itertools.count()
        self._runtime: Any = None
        self._scratch: TemporaryDirectory[str] | None = None

    def loaded(self, adapter: _Adapter, model: Any) -> Any:
        """Return the runtime's adapters with this one among them."""
        if self._runtime is None:
            self._runtime = environment.require("onnxruntime_genai", "to run a package").Adapters(model)
        if adapter.key not in self._order:
            file = self._file(adapter)
            self._make_room()
            self._runtime.load(str(file), adapter.key)
            self._order[adapter.key] = file
        self._order.move_to_end(adapter.key)
        return self._runtime

    def tensors(self, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Return the weighted sum of adapters by the graph's inputs, checked; where our operator runs them, rounded as it reads them.

        Raises:
            BadArtifact: one was made for another base, or does not fit the graph.
        """
        whole = self._sum(weights)
        return operators.rounded(whole) if self._fast() else whole

    def packed(self, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Return the weighted sum of adapters as our operator reads it, checked."""
        return {ADAPTER: operators.packed(self._sum(weights), self.found.manifest.facts["fast_layers"])}

    def close(self) -> None:
        self._order.clear()
        self._runtime = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _sum(self, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        parts = [(weight, self._read(name)) for name, weight in weights.items()]
        return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else adapter_files.combine(parts)

    def _read(self, name: str) -> dict[str, np.ndarray]:
        details = adapter_facts(self.found, name)
        if details["base"] != self.found.manifest.facts["base"]:
            hint = f"pack it again, or take it out with slmops pack {self.found.path} --remove {name}"
            raise BadArtifact(f"the adapter {name} was made for another base than this package's", hint)
        tensors = adapter_files.read_adapter(self.found.path / details["file"])
        wrong = adapter_files.problems(tensors, adapter_files.widths(self.found.manifest.facts["slots"]))
        if wrong:
            raise BadArtifact(f"the adapter {name} does not fit the graph: {'; '.join(wrong[:3])}", "pack it again")
        return tensors

    def _file(self, adapter: _Adapter) -> Path:
        """Return a file for the runtime: an adapter's own once it is checked, or one that is written once: a sum's, or our operator's."""
        tensors = adapter.tensors(packed=self._fast())
        (name, weight), *more = adapter.weights.items()
        if not more and weight == 1 and not self._fast():
            return self.found.path / adapter_facts(self.found, name)["file"]
        try:
            self._scratch = self._scratch or TemporaryDirectory(prefix="slmops-adapters-")
            path = Path(self._scratch.name) / f"{next(self._sums)}{adapter_files.SUFFIX}"
            adapter_files.write_adapter(path, tensors)
        except (OSError, RuntimeError) as error:
            hint = "name another folder with the environment variable TMPDIR, or free some space"
            raise RunFailed(f"the adapter {adapter.key} cannot be laid out in {gettempdir()}: {error}", hint) from error
        return path

    def _make_room(self) -> None:
        """Unload what was not used for longest, until one more fits; what a generator still holds stays."""
        for key in list(self._order):
            if len(self._order) < self.most_loaded:
                return
            try:
                self._runtime.unload(key)
            except RuntimeError:
                continue
            file = self._order.pop(key)
            if self._scratch is not None and file.parent == Path(self._scratch.name):
                file.unlink()  # until now the runtime had it mapped
