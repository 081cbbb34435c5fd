"""What of slmops can a workflow of Olive's use? The passes `SlmopsExport` and `SlmopsPack`, and `SlmopsEvaluator`.

Olive imports the passes by the names that `slmops.olive_backend.package_config` gives it, and the evaluator through a
workflow's `user_script`; nothing of slmops does.
"""
