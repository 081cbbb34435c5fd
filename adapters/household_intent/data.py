"""Write this recipe's rows and the tiny base that it is trained on: `python adapters/household_intent/data.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from slmops import demo


def main() -> None:
    """Write `data/train.jsonl`, `data/test.jsonl` and `base/` under OUT."""
    torch.set_num_threads(1)  # more of them wait for each other at every layer of a model this small
    out = Path(sys.argv[1])
    written = demo.write_data(out / "data")
    demo.write_base(written.stories, out=out / "base", force=True)


if __name__ == "__main__":
    main()
