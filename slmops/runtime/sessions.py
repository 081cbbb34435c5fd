"""Which sessions does a folder have in memory? Each graph is loaded when it is first needed, once for all adapters.

A package has its base twice: `model.onnx` takes no adapters and is the fastest, `model_adapters.onnx` takes them as
inputs, or `model_adapters_fast.onnx` where this machine has our operator. Whoever uses only one of them loads only that one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slmops import environment, progress
from slmops.errors import BadArtifact
from slmops.graph.rewriting import ADAPTED, FAST, MAIN
from slmops.runtime import operators
from slmops.runtime.decoder import Decoder
from slmops.runtime.providers import provider_of, register_with_genai, require_provider


class ActiveAdapter(Protocol):
    """An adapter that is on while a runner runs."""

    def tensors(self, *, packed: bool) -> Mapping[str, np.ndarray]:
        """Return its tensors by a graph's inputs, or as the one input of a graph for our operator."""
        ...

    def activate(self, generator: Any, model: Any) -> None:
        """Turn it on for a new generator of onnxruntime-genai, before its prompt."""
        ...


class Sessions:
    """The sessions of one folder.

    Args:
        folder: holds `genai_config.json`, the graphs and their data.
        threads: of the operators.
        prepacking: onnxruntime lays weights out anew when it loads them, for its kernels: worth it for more than a few tokens.
        portable: adapters run by onnxruntime's own operators, as in any other program that opens the folder.

    Raises:
        BadArtifact: there is no config that can be used.
        Unavailable: the provider that the folder is made for is not here.
    """

    def __init__(self, folder: Path, threads: int, *, prepacking: bool = True, portable: bool = False) -> None:
        self._may_be_fast = not portable
        self.folder, self.threads, self.prepacking = folder, threads, prepacking
        self._decoders: dict[str, Decoder] = {}
        self._models: dict[str, Any] = {}
        try:
            self.config: dict[str, Any] = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
            self.max_length_tokens = int(self.config["search"].get("max_length") or self.config["model"]["context_length"])
            self.vocabulary = int(self.config["model"]["vocab_size"])
            self.configured: str = self.config["model"]["decoder"]["filename"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadArtifact(f"{folder} has no genai_config.json that can be used: {error!r}", "export the model again") from error
        self._target = provider_of(self.config)
        if self._target is not None:
            require_provider(self._target, folder)

    @cached_property
    def fast(self) -> bool:
        """Whether adapters run by our operator: the package has a graph for it, and this machine the operator."""
        if not self._may_be_fast or self.configured != ADAPTED or not (self.folder / FAST).is_file():
            return False
        name = operators.library_name()
        # onnxruntime-genai looks for a bare name in these two folders first: what somebody put there is not loaded.
        return name is not None and not any((place / name).exists() for place in (self.folder, Path.cwd()))

    def filename(self, *, adapted: bool) -> str:
        """Return the graph to run: the one that the config names, or a package's own for the base alone, or for our operator."""
        has_base = self.configured == ADAPTED and (self.folder / MAIN).is_file()
        if has_base and not adapted:
            return MAIN
        return FAST if adapted and self.fast else self.configured

    def decoder(self, filename: str) -> Decoder:
        """Return onnxruntime's session of a graph."""
        if filename not in self._decoders:
            self._decoders[filename] = Decoder(self.folder, self.config, filename, self.threads)
        return self._decoders[filename]

    def model(self, filename: str) -> Any:
        """Return a graph as onnxruntime-genai loads it.

        Raises:
            BadArtifact: it cannot be loaded.
        """
        if filename not in self._models:
            og = environment.require("onnxruntime_genai", "to run a package")
            register_with_genai(self._target)
            config = og.Config(str(self.folder))
            options: dict[str, Any] = {"intra_op_num_threads": self.threads}
            if not self.prepacking:
                options["session.disable_prepacking"] = "1"
            if filename == FAST:
                options["custom_ops_library"] = operators.library_name()
            config.overlay(json.dumps({"model": {"decoder": {"filename": filename, "session_options": options}}}))
            try:
                self._models[filename] = og.Model(config)
            except RuntimeError as error:
                if filename == FAST:
                    self.__dict__["fast"] = False
                    progress.say(f"adapters run on onnxruntime's own operators: {str(error).splitlines()[0][:200]}")
                    return self.model(self.configured)
                reason = str(error).splitlines()[0][:300]
                raise BadArtifact(f"onnxruntime-genai cannot load {self.folder}: {reason}", "export the model again") from error
        return self._models[filename]

    def close(self) -> None:
        """Free them."""
        self._decoders.clear()
        self._models.clear()
