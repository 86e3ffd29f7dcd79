"""The coverage contract: every PeftType of the reference has fixtures, or a listed reason why not."""

from __future__ import annotations

import json

from ..reference import store
from ..reference.methods import methods


def problems() -> list[str]:
    data = json.loads((store.folder() / "coverage.json").read_text())
    recorded = {p.data["peft_type"] for p in store.packs().values()}
    described = {m.peft_type for m in methods().values()}
    reasons = data["not_covered"]
    found = [f"{t}: neither fixtures nor a reason" for t in data["types"] if t not in recorded and t not in reasons]
    found += [f"{t}: has fixtures, and a reason why not" for t in sorted(recorded & set(reasons))]
    found += [f"{t}: is no PeftType of {data['reference']}" for t in sorted((recorded | set(reasons)) -
                                                                          set(data["types"]))]
    found += [f"{t}: has a method file and no fixtures; record it" for t in sorted(described - recorded)]
    found += [f"{t}: the reason is empty" for t, why in reasons.items() if not why.strip()]
    return found


def main() -> int:
    data, bad = json.loads((store.folder() / "coverage.json").read_text()), problems()
    print("\n".join(bad) if bad else "the coverage contract holds")
    covered = len(data["types"]) - len(data["not_covered"])
    print(f"{covered} of {len(data['types'])} PeftTypes of {data['reference']} have fixtures")
    return 1 if bad else 0
