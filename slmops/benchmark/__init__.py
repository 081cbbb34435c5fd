"""How fast, how large and how exact is a package, beside the PyTorch model that it came from? The verb is `bench`."""

from slmops.benchmark.benching import bench
from slmops.benchmark.figures import Benchmark, Figures

__all__ = ["Benchmark", "Figures", "bench"]
