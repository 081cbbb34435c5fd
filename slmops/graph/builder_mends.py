"""What does onnxruntime-genai's model builder get wrong, model family by family, and how is it put right?

Loaded into the builder's process, which shares nothing with slmops. Each was seen as a difference from PyTorch on a tiny model
(onnxruntime-genai 0.18, transformers 5.23; `benchmarks/families.py`), and a test sees it again without its mend:

- a model whose every layer has a sliding window (Mistral, Phi3) says no `layer_types`, and the builder drops the window: right
  up to its length, NMSE 0.9 beyond;
- Gemma scales its embeddings by the square root of their width, the builder by two decimals of it: NMSE 2e-8;
- a Llama whose RoPE is scaled linearly gets an unscaled one: NMSE 0.2;
- Gemma 3 has a RoPE for each kind of layer, in a nested table that the builder does not read (KeyError);
- the layers of SmolLM3 without RoPE get one from an input that the graph does not have (KeyError);
- Phi and Nemotron name the epsilon of their norms otherwise than Llama, and get 1e-6: NMSE 3e-7;
- any linear layer with as many outputs as the vocabulary has tokens is taken for the head.
"""

from __future__ import annotations

import math
from typing import Any


def mend() -> None:
    """Replace the methods of the builder's classes that are wrong; its modules must be importable."""
    from builders.base import Model  # type: ignore[import-not-found]
    from builders.gemma import Gemma3Model, GemmaModel  # type: ignore[import-not-found]
    from builders.llama import LlamaModel  # type: ignore[import-not-found]
    from builders.smollm import SmolLM3Model  # type: ignore[import-not-found]

    _mend_config(Model)
    _mend_head(Model)
    _mend_llama(Model, LlamaModel)
    _mend_gemma(GemmaModel)
    _mend_gemma3(Model, Gemma3Model)
    _mend_smollm3(SmolLM3Model)


def _mend_config(model: Any) -> None:
    make_config_init = model.make_config_init

    def read(self: Any, config: Any) -> None:
        make_config_init(self, config)
        if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
            config.layer_types = ["sliding_attention"] * config.num_hidden_layers
        if not hasattr(config, "rms_norm_eps"):
            for name in ("layer_norm_eps", "norm_eps"):
                if hasattr(config, name):
                    config.rms_norm_eps = getattr(config, name)

    model.make_config_init = read


def _mend_head(model: Any) -> None:
    has_lm_head = model.has_lm_head

    def is_head(self: Any, module: Any) -> bool:
        head = getattr(self.weights, "lm_head", None)
        return module is head if head is not None else has_lm_head(self, module)

    model.has_lm_head = is_head


def _mend_llama(base: Any, model: Any) -> None:
    make_rope_init = model.make_rope_init

    def read(self: Any, config: Any) -> None:
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        (make_rope_init if kind == "llama3" else base.make_rope_init)(self, config)

    model.make_rope_init = read


def _mend_gemma(model: Any) -> None:
    make_embedding = model.make_embedding

    def scaled(self: Any, embedding: Any) -> None:
        self.embed_attrs["scale"] = math.sqrt(self.hidden_size)
        make_embedding(self, embedding)

    model.make_embedding = scaled


def _mend_gemma3(base: Any, model: Any) -> None:
    make_rope_init, make_caches = base.make_rope_init, base.make_rotary_embedding_caches

    def read_both(self: Any, config: Any) -> None:
        tables = config.rope_parameters
        if "full_attention" in tables:
            config.rope_local_base_freq = tables["sliding_attention"]["rope_theta"]
            config.rope_parameters = dict(tables["full_attention"])
            self.rope_attrs["theta"] = config.rope_parameters["rope_theta"]
        make_rope_init(self, config)

    def unscaled_where_local(self: Any, **names: Any) -> Any:
        if names.get("cos_cache_name") == "cos_cache_local":
            self.rope_attrs["rescale_factors"] = 1  # linear scaling is of the global layers alone
        return make_caches(self, **names)

    model.make_rope_init = read_both
    base.make_rotary_embedding_caches = unscaled_where_local


def _mend_smollm3(model: Any) -> None:
    make_attention = model.make_attention

    def rotated_where_it_is(self: Any, layer_id: int, attention: Any, root_input: str, **options: Any) -> None:
        self.attention_attrs["rope"] = bool(self.no_rope_layers[layer_id])  # 1: the layer has RoPE
        make_attention(self, layer_id, attention, root_input, **options)
        self.attention_attrs["rope"] = True

    model.make_attention = rotated_where_it_is
