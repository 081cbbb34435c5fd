"""How good and how large is a candidate of a search? The evaluator `SlmopsEvaluator`, which measures as `slmops evaluate` does.

An evaluator of its own, because Olive 0.13's custom metrics end in a PydanticSerializationError with pydantic 2.14 (evaluator/metric.py:253).
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from olive.evaluator.metric_result import MetricResult, SubMetricResult, joint_metric_key
from olive.evaluator.olive_evaluator import OliveEvaluator
from olive.evaluator.registry import Registry

from slmops.errors import SlmopsError
from slmops.evaluation import evaluate
from slmops.hashes import size_bytes


@Registry.register("SlmopsEvaluator")
class SlmopsEvaluator(OliveEvaluator):
    """Measure `accuracy` (exact_match: the share of right answers to held-out rows) and `size_on_disk` (bytes of the whole folder).

    Args:
        data: file of rows.
        prompt_template: as in `slmops evaluate`; None: the one that travels with the model.
        completion_template: likewise.
        max_rows: use only the first so many.
    """

    def __init__(
        self,
        data: str,
        prompt_template: str | None = None,
        completion_template: str | None = None,
        max_rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.data = data
        self.settings = {"prompt_template": prompt_template, "completion_template": completion_template, "max_rows": max_rows}

    def evaluate(self, model: Any, metrics: list[Any], device: Any = None, execution_providers: Any = None) -> MetricResult:
        """Measure a model of Olive's: the Hugging Face model that goes in, or an export of `SlmopsExport`.

        Raises:
            ValueError: a metric that is none of the two, or whatever slmops refuses.
        """
        place = Path(str(model.model_path))
        folder = place if place.is_dir() else place.parent
        results = {}
        for metric in metrics:
            for part in metric.sub_types:
                value = self._measure(folder, f"{metric.type}-{part.name}")
                results[joint_metric_key(metric.name, part.name)] = SubMetricResult(
                    value=value, priority=part.priority, higher_is_better=part.higher_is_better
                )
        return MetricResult(root=results)

    def _measure(self, folder: Path, metric: str) -> float:
        if metric == "size_on_disk-bytes":
            return size_bytes(folder)
        if metric != "accuracy-exact_match":
            raise ValueError(f"{metric}: SlmopsEvaluator measures accuracy (exact_match) and size_on_disk (bytes)")
        with TemporaryDirectory() as place:
            try:
                found = evaluate(folder, self.data, metric="exact_match", predictions=Path(place) / "answers.jsonl", **self.settings)
            except SlmopsError as error:
                raise ValueError(f"{error.message} ({error.hint})") from error
        return found.metrics["exact_match"].value
