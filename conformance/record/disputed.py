"""What the reference and the papers' formulas disagree about: `python -m conformance disputed`."""

from __future__ import annotations

import json

from ..reference import store


def entries() -> list[dict]:
    """Disputed cases, cases whose golden is the formula, and disputes that no case can hold."""
    found = []
    for case in store.all_cases():
        if case.data.get("disputed"):
            found.append({"where": case.id, "what": case.disputed["what"], "evidence": case.disputed["evidence"],
                          "golden": "either answer passes"})
        elif case.golden == "formula":
            found.append({"where": case.id, "what": case.note, "evidence": ["its own checks, listed as a known issue"],
                          "golden": "the formula"})
    return found + json.loads((store.folder() / "disputed.json").read_text())["without_a_case"]


def main() -> int:
    for e in entries():
        print(f"{e['where']} (golden: {e['golden']})\n    {e['what']}")
        print("".join(f"    - {line}\n" for line in e["evidence"]))
    return 0
