"""Which mistake explains a wrong answer: the seeded fault that answers just as wrongly.

Every seeded fault of a method is an implementation that is wrong in one known way. Where one of them gives, in the
same check of the same case, the numbers that the implementation under test gave, its description is the likely cause.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator

from ..drivers.oracle import Oracle
from ..reference.compare import Failure, distance
from ..reference.faults import all_faults, other_keys
from ..reference.method import Fault
from ..reference.methods import methods
from .runner import Result, Task, masked, run_one

PROBES = 16  # failing results of one method that all faults are tried on; the others only on those found
CONVENTIONS = ("names", "keys", "count")  # what a wrong formula leaves right
SLOW = ("gradients",)  # finite differences: tried where nothing cheaper tells, on few results
SLOW_PROBES = 2
DRAWN = ("laws",)  # numbers differ: the adapter's tensors follow from what the implementation drew


def name_causes(tasks: list[Task], results: list[Result]) -> None:
    """Set `cause` of what failed, where a seeded fault explains it."""
    call = {t.id: t for t in tasks}
    failed = [r for r in results if r.outcome in ("fail", "error") and r.raised]
    found: list = []  # general faults that explained a method, tried first on the next
    for method in dict.fromkeys(r.method for r in failed):
        if method in methods():
            own = [r for r in failed if r.method == method]
            found = Search(methods()[method], results, own, call).explain(found)


class Search:
    """The causes of one method's failing results."""

    def __init__(self, method, results: list[Result], failed: list[Result], call: dict[str, Task]):
        self.method, self.call, self.failed = method, call, failed
        self.passed = [r for r in results if r.method == method.name and r.outcome == "pass"]
        # In another dtype the same check of the same case fails for the same reason: one of them is looked at.
        chosen: dict = {}
        for r in sorted(failed, key=lambda r: (r.dtype != "float32", r.dtype != "float64")):
            chosen.setdefault((r.case, r.check), r)
        self.left = sorted(chosen.values(), key=lambda r: (r.check in SLOW, r.check in DRAWN))
        self.answers: dict = {}

    def explain(self, likely: list) -> list:
        """Set the causes; gives the general faults among them. `likely`: those found for another method."""
        named = [fault for fault in likely if self.assign(fault)]
        wrong = {r.case for r in self.left if r.check not in SLOW}  # where slow checks have nothing to add
        left = {False: PROBES, True: SLOW_PROBES}
        for probe in list(self.left):
            slow = probe.check in SLOW
            if probe.cause or probe.check in DRAWN or not left[slow] or (slow and probe.case in wrong):
                continue
            left[slow] -= 1
            equal = [fault for fault in self.candidates(probe) if self.same(fault, probe)]
            if equal:
                named.append(max(equal, key=lambda fault: self.fits(fault, probe)))
                self.assign(named[-1])
        causes = {(r.case, r.check): r for r in self.failed if r.cause}
        for r in self.failed:
            if not r.cause and (other := causes.get((r.case, r.check))):
                r.cause, r.link = other.cause, other.link
        return [fault for fault in named if fault not in self.method.faults]

    def candidates(self, result: Result) -> Iterator:
        """The faults that may show in a result."""
        for fault in self.method.faults:
            formula = not fault.gradient_only and result.check not in (*CONVENTIONS, *SLOW, "reject")
            if formula or result.check in fault.caught_by:
                yield fault
        for method, fault in all_faults():  # bookkeeping around any formula is told of LoRA
            if method.name in ("lora", self.method.name) and fault not in method.faults:
                if result.check in fault.caught_by:
                    yield fault
        if result.check == "keys":
            yield from renamed(result.raised)

    def assign(self, fault) -> bool:
        """Name a fault as the cause of all results that it explains, and then of those like them; was there any?"""
        own = [r for r in self.left if r.check not in SLOW and self.same(fault, r)]
        cases = {r.case for r in own}
        own += [r for r in self.left if r.check in SLOW and (r.case in cases if own else self.same(fault, r))]
        if not any(fault in self.method.faults or r.check in fault.caught_by for r in own):
            return False
        for r in own + [r for r in self.left if r not in own and r.check not in SLOW and self.alike(fault, r)]:
            name = f"{self.method.name}/{fault.id}" if fault in self.method.faults else fault.id
            r.cause, r.link = f"{name}: {fault.what}", r.link or fault.link
            self.left.remove(r)
        return True

    def fits(self, fault, probe: Result) -> tuple[int, bool, int]:
        """How well a fault that explains one result fits the others of its case, is meant for it, and fits all."""
        passed = sum(self.answer(fault, r) is not None for r in self.passed if related(r, probe))
        explained = [related(r, probe) for r in self.left if r.check not in SLOW + DRAWN and self.same(fault, r)]
        meant = probe.case.removeprefix(f"{self.method.name}/") in fault.cases
        return sum(explained) - passed, meant, len(explained)

    def answer(self, fault, result: Result) -> Exception | None:
        """What an implementation with this fault raises in the same check."""
        key = (fault.id, fault.what, result.id)
        if key not in self.answers:
            self.answers[key] = run_one(Oracle(fault), self.call[result.id]).raised
        return self.answers[key]

    def same(self, fault, result: Result) -> bool:
        """Whether the fault gives the same wrong answer."""
        mine, theirs = result.raised, self.answer(fault, result)
        if mine is None or theirs is None:
            return False
        if not isinstance(mine, Failure) or not isinstance(theirs, Failure):
            return not isinstance(mine, Failure) and same_misfit(mine, theirs)
        if mine.values is None or theirs.values is None:
            return (mine.message, mine.got) == (theirs.message, theirs.got)
        return mine.what == theirs.what and distance(mine.values, theirs.values, result.dtype, mine.floor) <= 1

    def alike(self, fault, result: Result) -> bool:
        """Weaker, for faults that are named already: it refuses, too, in words of its own, or breaks the same law."""
        mine, theirs = result.raised, self.answer(fault, result)
        if isinstance(mine, Failure) or isinstance(theirs, Failure):
            return result.check in (*DRAWN, "reject") and masked(str(mine)) == masked(str(theirs))
        return theirs is not None


def related(result: Result, other: Result) -> bool:
    """Of the same case, and quick to try; whatever is refused is one case."""
    alone = result.case if result.check != "reject" else result.check
    return result.check not in SLOW + DRAWN and alone == (other.case if other.check != "reject" else other.check)


def same_misfit(mine: Exception, theirs: Exception) -> bool:
    """Whether two errors are of products whose sizes do not fit, and name the same sizes, whatever the words."""
    products = re.compile("matmul|multipl|dot|operand|contract|align")
    sizes = [set(re.findall(r"\d+", str(e))) if products.search(str(e)) else set() for e in (mine, theirs)]
    return bool(sizes[1]) and sizes[1] - {"0", "1"} <= sizes[0]


def renamed(error: Exception | None) -> Iterator[Fault]:
    """The fault of calling parts of the saved keys otherwise, if that is all that is wrong with them."""
    if not isinstance(error, Failure) or not error.message.startswith("saved keys"):
        return
    want, got = ast.literal_eval(error.expected), ast.literal_eval(error.got)
    old, new = ({part for key in keys for part in key.split(".")} for keys in (want, got))
    lacking, extra = sorted(old - new), sorted(new - old)
    if len(lacking) == len(extra) <= 3:
        for order in itertools.permutations(extra):
            pairs = list(zip(lacking, order))
            said = dict(pairs)
            if sorted(".".join(said.get(part, part) for part in key.split(".")) for key in want) == got:
                what = " and ".join(f"{b} for {a}" for a, b in pairs)
                yield Fault("keys-renamed", f"saved keys say {what}", other_keys(*pairs), ("keys",))
                return
