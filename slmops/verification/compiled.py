"""Do graphs that were compiled for an NPU compute what they did before, and does decoding go on as the prompt's graph would?

What is asked here is the machine at hand. Without an NPU it is a stand-in: it shows that the compiler, 16-bit floats and the
fixed cache change nothing that counts, and says nothing of a device's speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from slmops.data import Encoded
from slmops.runtime.static_runner import StaticRunner
from slmops.verification.comparison import compare

# Of the comparison with the CPU: an emulated NPU takes seconds a row.
_ROWS = 8


def figures(runner: StaticRunner, sequences: Sequence[Encoded]) -> dict[str, Any]:
    """Compare the compiled graphs with the plain ones on onnxruntime's CPU provider, on a few rows.

    Returns:
        `ran_on`, and `beside_cpu`: rows, the largest difference of a logit, top-1 agreement and mean KL.
    """
    if runner.way == "plain":
        return {"ran_on": runner.ran_on}
    chosen = sequences[:: -(-len(sequences) // _ROWS)]
    plain = StaticRunner(runner.folder, runner.threads, way="plain")
    found = compare(plain, runner, chosen, label="compiled beside the CPU")
    plain.close()
    beside = {"rows": len(chosen), "largest_difference": found.largest, "top1": found.top1.document(), "kl": found.mean_kl.document()}
    return {"ran_on": runner.ran_on, "beside_cpu": beside}


def decode_differences(runner: StaticRunner, answers: Sequence[Any]) -> int:
    """Count answers of the decode graph, a token a run, that the prompt's graph, which sees all tokens at once, would not give.

    Tokens are compared one by one after the answer's own beginning; a near-tie between the two graphs' sums is no difference.
    """
    wrong = 0
    for answer in answers:
        tokens = list(runner.stream(answer.prompt_ids, max_new_tokens=_LONGEST, stop_token_ids=()))
        logits = next(runner.logits([[*answer.prompt_ids, *tokens]]))[len(answer.prompt_ids) - 1 : -1]
        chosen = logits[np.arange(len(tokens)), tokens]
        wrong += bool((logits.max(-1) - chosen > _TIE).any())
    return wrong


# Two graphs sum in another order, in 16 bits: a logit of 25 has steps of 0.016, and what it is made of was rounded as coarsely.
_TIE = 0.2
_LONGEST = 6
