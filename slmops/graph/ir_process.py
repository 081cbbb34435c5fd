"""Write an OpenVINO IR of a model, alone in a process: `python -P -m slmops.graph.ir_process REQUEST.json`.

optimum-intel traces the PyTorch model, nncf compresses the weights, openvino-tokenizers writes the tokenizer as an IR. In a
process of its own, because optimum-intel changes classes of transformers and its memory comes back only when it ends.
`import slmops` before the others is what keeps them from sending telemetry.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from slmops import environment  # `import slmops` switches telemetry off
from slmops.graph.ir import MODEL

_PURPOSE = "to build an OpenVINO export"


def main() -> None:
    """Write what the request asks for: see `slmops.graph.ir_building`."""
    environment.collect_seldom()
    nncf, openvino = (environment.require(name, _PURPOSE) for name in ("nncf", "openvino"))
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(request["out"])
    with TemporaryDirectory(dir=out.parent, prefix=".ir-") as scratch:
        _trace(request["model"], scratch)
        ir = openvino.Core().read_model(Path(scratch) / MODEL)
        for asked in request["passes"]:
            ir = nncf.compress_weights(
                ir,
                mode=nncf.CompressWeightsMode(asked["mode"]),
                **({"group_size": asked["group_size"]} if "group_size" in asked else {}),
                **({"backup_mode": nncf.BackupMode(asked["backup"])} if "backup" in asked else {}),
                ignored_scope=nncf.IgnoredScope(patterns=asked["leave"], validate=False),
            )
        for path, value in request["info"]:
            ir.set_rt_info(value, path)
        openvino.save_model(ir, out / MODEL, compress_to_fp16=request["half"])
        del ir  # it reads its weights from the scratch folder
    _write_tokenizer(request["model"], out)


def _trace(model: str, out: str) -> None:
    """Write the float32 IR: a stateful decoder, whose keys and values are variables of a request."""
    exporters, intel = (environment.require(name, _PURPOSE) for name in ("optimum.exporters.openvino", "optimum.intel"))
    exporters.main_export(
        model,
        output=out,
        task="text-generation-with-past",
        library_name="transformers",
        ov_config=intel.OVConfig(dtype="fp32"),  # without one, models above a billion parameters are compressed to 8 bits unasked
        model_loading_kwargs={"dtype": "float32"},
        local_files_only=True,
        stateful=True,
    )


def _write_tokenizer(model: str, out: Path) -> None:
    """Write the tokenizer as IRs, for hosts in C++ and JavaScript; leave it out where it cannot be converted."""
    names = ("openvino", "openvino_tokenizers", "transformers")
    openvino, tokenizers, transformers = (environment.require(name, _PURPOSE) for name in names)
    try:
        converted = tokenizers.convert_tokenizer(transformers.AutoTokenizer.from_pretrained(model), with_detokenizer=True)
    except Exception as error:  # whatever a tokenizer of another kind raises there: the IR of the model is whole without
        (out / "tokenizer_error.txt").write_text(str(error) or repr(error), encoding="utf-8")
        return
    for ir, name in zip(converted, ("openvino_tokenizer.xml", "openvino_detokenizer.xml"), strict=True):
        openvino.save_model(ir, out / name, compress_to_fp16=False)


if __name__ == "__main__":
    main()
