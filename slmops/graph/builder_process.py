"""Run onnxruntime-genai's model builder, alone in a process: `python -P builder_process.py REQUEST.json`.

The builder imports top-level names (`builders`, `quantization`, `loaders`) from its own folder, so it may share neither
a process nor a working directory with anything else. Nothing of slmops is imported here.

A float graph is built without its matrices. The builder keeps a copy of every fused projection until the graph is
written, 1.9 times the model's size at the end, and writes 4 bytes a weight that are read once and thrown away. Here each
matrix is looked up as soon as it is made: where it is, number by number, parameters of the model's files stacked, its
place in the graph holds no data and `sources.json` says which they are. Whatever else it is goes to the data file at once.
"""

import gc
import json
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

_SMALL = 1 << 10
"""Numbers in a tensor that stays inside the graph's file."""


def main() -> None:
    """Build what the request asks for."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    package = find_spec("onnxruntime_genai")
    assert package is not None and package.origin is not None
    sys.path.insert(0, str(Path(package.origin).parent / "models"))
    gc.disable()  # an eighth of this process's time would be spent on looking, again and again, at what these libraries define
    import builder  # type: ignore[import-not-found]  # noqa: PLC0415

    gc.freeze()
    gc.enable()
    _load("builder_mends").mend()
    arguments = ("", request["model"], request["out"], request["precision"], request["provider"], request["cache"])
    if request["sources"]:
        _Naming(Path(request["model"]), Path(request["out"])).install()
    options = builder.parse_extra_options(*arguments, [f"{key}={value}" for key, value in request["options"].items()])
    builder.create_model(*arguments, **options)


def _load(name: str) -> Any:
    """Return a module that lies beside this file: its folder has names that the builder uses too, and is no place to import from."""
    spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Naming:
    """Takes the place of three methods of the builder's `Model`: how it loads weights, keeps them, and writes the graph."""

    def __init__(self, model: Path, out: Path) -> None:
        self.model, self.out = model, out
        self.known: dict[tuple[int, bytes], list[tuple[str, Any]]] = {}
        """(name, weight) of the model's matrices by what their first row begins with."""
        self.sources: dict[str, dict[str, Any]] = {}

    def install(self) -> None:
        """Replace the methods (onnxruntime-genai 0.18; a test sees that they are there)."""
        from builders.base import Model  # type: ignore[import-not-found]

        load, make = Model.load_weights, Model.make_initializer
        naming = self

        def load_weights(self: Any, input_path: str) -> Any:
            return naming.loaded(load(self, input_path))

        def make_initializer(self: Any, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False) -> None:
            kept = None if raw else naming.kept(tensor, name, to)
            make(self, tensor if kept is None else kept, name, to=to if kept is None else None, raw=raw)

        def save_model(self: Any, out_dir: str) -> None:
            naming.save(self)

        Model.load_weights, Model.make_initializer, Model.save_model = load_weights, make_initializer, save_model

    def loaded(self, model: Any) -> Any:
        """Remember the model's matrices; read its vectors anew in float32: sums such as Gemma's 1 + w are made of them."""
        from safetensors import safe_open

        parameters = dict(model.named_parameters(remove_duplicate=False))
        for file in sorted(self.model.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    weight = parameters.get(name)
                    if weight is None or tuple(stored.get_slice(name).get_shape()) != tuple(weight.shape):
                        continue
                    if weight.dim() == 1:
                        weight.data = stored.get_tensor(name).float()
                    elif weight.dim() == 2:
                        self.known.setdefault(_beginning(weight), []).append((name, weight.detach()))
        return model

    def kept(self, tensor: Any, name: str, to: Any) -> Any:
        """Return what the graph holds in place of a tensor; None where it holds the tensor itself."""
        import onnx_ir
        import torch
        from onnx_ir.tensor_adapters import from_torch_dtype

        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return None
        tensor = tensor.detach()
        dtype = to if to is not None else from_torch_dtype(tensor.dtype)
        transposed = tensor.dim() == 2 and not tensor.is_contiguous()
        names = self.stacked(tensor.T if transposed else tensor) if tensor.dim() == 2 else []
        if names:
            self.sources[name] = {"parameters": names, "transposed": transposed}
            return onnx_ir.ExternalTensor("sources", 0, 0, dtype, shape=onnx_ir.Shape(tensor.shape), name=name)
        return self.written(tensor, name, dtype) if tensor.numel() >= _SMALL else None

    def stacked(self, matrix: Any) -> list[str]:
        """Return the parameters that a matrix (outputs, inputs) is the stack of; nothing where it is none."""
        import torch

        names, row = [], 0
        while row < len(matrix):
            for name, weight in self.known.get(_beginning(matrix[row:]), ()):
                same = weight.data_ptr() == matrix.data_ptr() and weight.shape == matrix.shape
                if same or torch.equal(matrix[row : row + len(weight)], weight):
                    names.append(name)
                    row += len(weight)
                    break
            else:
                return []
        return names

    def written(self, tensor: Any, name: str, dtype: Any) -> Any:
        """Append a tensor to the data file."""
        import onnx_ir
        from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

        with (self.out / "model.onnx.data").open("ab") as stream:
            offset = stream.tell()
            stream.write(TorchTensor(tensor.to(to_torch_dtype(dtype)).contiguous(), name=name).tobytes())
            length = stream.tell() - offset
        return onnx_ir.ExternalTensor(
            "model.onnx.data", offset, length, dtype, shape=onnx_ir.Shape(tensor.shape), name=name, base_dir=self.out
        )

    def save(self, made: Any) -> None:
        """Write the graph, with the places of its tensors, and where those without data come from."""
        import onnx_ir

        made.model.graph.sort()
        made.stamp_build_metadata(made.model)
        onnx_ir.save(made.model, self.out / made.filename)
        (self.out / "sources.json").write_text(json.dumps(self.sources), encoding="utf-8")


def _beginning(matrix: Any) -> tuple[int, bytes]:
    """Return what a matrix is looked up by: its width, and its first numbers in float32."""
    return matrix.shape[1], matrix[0, :32].float().contiguous().numpy().tobytes()


if __name__ == "__main__":
    main()
