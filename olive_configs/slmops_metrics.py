"""Makes the evaluator type `SlmopsEvaluator` known to Olive: the `user_script` of `search_cpu.json`.

The class stands in slmops, not here: Olive imports a user script several times, and refuses a class that it meets twice
(evaluator/registry.py:35).
"""

from slmops.olive_passes.evaluator import SlmopsEvaluator

__all__ = ["SlmopsEvaluator"]
