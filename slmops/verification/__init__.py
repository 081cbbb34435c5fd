"""Does a package behave as its model did in PyTorch? `verify` is the verb; each stage of it is a module."""

from slmops.verification.proof import Verification, verify
from slmops.verification.stages import Stage

__all__ = ["Stage", "Verification", "verify"]
