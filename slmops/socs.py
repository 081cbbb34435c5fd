"""Which Qualcomm chips can a model be compiled for, and what does the QNN compiler call them?

`soc_model` is the number of a chip in the QNN SDK (enum `QNN_SOC_MODEL_*` of QnnTypes.h; not Android's `soc_id`), `htp_arch`
the version of its Hexagon tensor processor. Both from pytorch/executorch, backends/qualcomm/serialization/qc_schema.py (numbers,
versions) and QnnTypes.h of QAIRT 2.4x (SC8380XP, SC8480XP); names of products as onnxruntime's and Qualcomm's pages give them.
Chips before V73 are left out: a 4-bit model needs what V73 brought (a context for V68 compiles on x86 and does not load on the
device, microsoft/onnxruntime#26686).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from slmops.errors import Unavailable


@dataclass(frozen=True)
class Soc:
    """One chip."""

    name: str
    """As `--soc` takes it."""
    part: str
    """Qualcomm's part number; `--soc` takes it too."""
    soc_model: int
    htp_arch: int
    product: str

    def document(self) -> dict[str, str | int]:
        """Return the JSON form."""
        return {"name": self.name, "part": self.part, "soc_model": self.soc_model, "htp_arch": self.htp_arch, "product": self.product}


SOCS = (
    Soc("snapdragon-x-elite", "sc8380xp", 60, 73, "Snapdragon X Elite and X Plus (laptops)"),
    Soc("snapdragon-x2-elite", "sc8480xp", 88, 81, "Snapdragon X2 Elite (laptops)"),
    Soc("8-gen-2", "sm8550", 43, 73, "Snapdragon 8 Gen 2 (phones)"),
    Soc("8-gen-3", "sm8650", 57, 75, "Snapdragon 8 Gen 3 (phones)"),
    Soc("8-elite", "sm8750", 69, 79, "Snapdragon 8 Elite (phones)"),
    Soc("8-elite-gen-5", "sm8850", 87, 81, "Snapdragon 8 Elite Gen 5 (phones)"),
    Soc("8-gen-5", "sm8845", 97, 81, "Snapdragon 8 Gen 5 (phones)"),
    Soc("qcs9100", "qcs9100", 77, 73, "Dragonwing QCS9100 (industry)"),
    Soc("sa8255", "sa8255", 52, 73, "SA8255 (cars)"),
)
USUAL = SOCS[0]


def find(name: str | None) -> Soc:
    """Return a chip by its name or part number; without one, the usual.

    Raises:
        Unavailable: there is none of that name; the message names those that are near.
    """
    if name is None:
        return USUAL
    wanted = _plain(name)
    for soc in SOCS:
        if wanted in (_plain(soc.name), soc.part):
            return soc
    spelled = {_plain(soc.name): soc.name for soc in SOCS} | {soc.part: soc.name for soc in SOCS}
    close = list(dict.fromkeys(spelled[key] for key in get_close_matches(wanted, spelled, n=3, cutoff=0.5)))
    guess = f"did you mean {' or '.join(close)}? " if close else ""
    known = ", ".join(f"{soc.name} ({soc.part})" if soc.name != soc.part else soc.name for soc in SOCS)
    raise Unavailable(f"soc: slmops does not know a chip named {name!r}", f"{guess}it knows {known}")


def _plain(name: str) -> str:
    """`Snapdragon 8 Gen 3`, `8gen3` and `8-gen-3` are one name."""
    letters = "".join(letter for letter in name.lower() if letter.isalnum())
    return letters.replace("snapdragon8", "8")
