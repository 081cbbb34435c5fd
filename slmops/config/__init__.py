"""Which settings does each verb have, and how are they read? One frozen model a verb; `load` makes it."""

from slmops.config.base import Settings, decode_escapes, fields, flat, load, read_yaml, setting
from slmops.config.finetuning import DataSettings, FinetuneSettings, MethodSettings, OptimizerSettings, RunSettings
from slmops.config.verbs import (
    BenchSettings,
    DemoSettings,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    InspectSettings,
    MergeSettings,
    Metric,
    PackSettings,
    PrepareSettings,
    QuickstartSettings,
    RunPipelineSettings,
    VerifySettings,
)

__all__ = [
    "BenchSettings",
    "DataSettings",
    "DemoSettings",
    "EvaluateSettings",
    "ExportSettings",
    "FinetuneSettings",
    "GenerateSettings",
    "InspectSettings",
    "MergeSettings",
    "MethodSettings",
    "Metric",
    "PackSettings",
    "OptimizerSettings",
    "PrepareSettings",
    "QuickstartSettings",
    "RunPipelineSettings",
    "RunSettings",
    "Settings",
    "VerifySettings",
    "decode_escapes",
    "fields",
    "flat",
    "load",
    "read_yaml",
    "setting",
]
