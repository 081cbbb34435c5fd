"""What can be done with trained adapters? Merged into their base, one or several; and foretold what a quantizer would leave of them.

`merge` is the verb; the modules below it are its steps.
"""

from slmops.adapters.merging import merge

__all__ = ["merge"]
