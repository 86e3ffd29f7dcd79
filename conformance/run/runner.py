"""Runs checks against a driver and says how each ended."""

from __future__ import annotations

import fnmatch
import json
import operator
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..driver import OPERATIONS, Driver, Hung, Rejected, Unsupported
from ..reference.compare import Failure

OUTCOMES = ("pass", "fail", "error", "unsupported", "known-issue", "not run")


@dataclass
class Result:
    method: str
    case: str
    check: str
    dtype: str
    outcome: str
    message: str = ""
    expected: str = ""
    got: str = ""
    by: float | None = None  # in tolerances
    link: str = ""
    seconds: float = 0.0
    cause: str = ""  # the seeded fault that gives the same wrong answer; see causes.py
    raised: Exception | None = field(default=None, repr=False, compare=False)

    @property
    def id(self):
        return f"{self.case}:{self.check}:{self.dtype}"

    def as_dict(self):
        return {k: v for k, v in vars(self).items() if v not in ("", None) and k != "raised"}


@dataclass(frozen=True)
class Task:
    """One check of one case in one dtype; `call(driver)` raises where something is wrong."""

    method: str
    case: str
    check: str
    dtype: str
    call: Callable[[Driver], None]

    @property
    def id(self):
        return f"{self.case}:{self.check}:{self.dtype}"


def clean(text, most: int = 2000) -> str:
    """What an implementation said, as text that no report stumbles over: printable, and not too long."""
    text = str(text).strip()
    text = text if len(text) <= most else text[: most // 2] + " ... " + text[-most // 2 :]
    return "".join(c if c.isprintable() else " " if c in "\n\t" else ascii(c)[1:-1] for c in text)


def masked(text: str) -> str:
    """A message without its numbers, and tensors without the layer that they belong to."""
    text = re.sub(r", config \{.*", "", text)
    text = re.sub(r"[\w.]+\.(?=\w+\.(weight|bias)\b)|\w+(?=\.(weight|bias)\b)", "", text)
    return re.sub(r"\[[#, ]*\]", "[#]", re.sub(r"-?\d[\d.e+-]*|\bnan\b|\binf\b", "#", text))


class Watched:
    """A driver, and whether anything was asked of it but what it says of itself."""

    def __init__(self, driver: Driver):
        self.driver, self.asked = driver, False

    def __getattr__(self, name):
        self.asked = self.asked or (name in OPERATIONS and name != "info")
        return getattr(self.driver, name)


def run_one(driver: Driver, task: Task, seconds: float = 30.0) -> Result:
    result = Result(task.method, task.case, task.check, task.dtype, "pass")
    begun = time.perf_counter()
    try:
        with driver._within(seconds):
            there = driver._passes(task.id)
        if there != "":  # what does not pass there is done again from here: that answer is trusted, and its values seen
            watched = Watched(driver)
            with driver._within(seconds):
                task.call(watched)  # type: ignore[arg-type]
            if not watched.asked:
                raise Unsupported("nothing of it concerns this driver")
            if there is not None:
                raise Failure(f"passes when it is done again; the first time: {there}")
    except Failure as e:
        result.raised, result.outcome, result.message = e, "fail", e.message
        result.expected, result.got, result.by = clean(e.expected), clean(e.got), e.by
    except Unsupported as e:
        result.outcome, result.message = "unsupported", str(e)
    except Rejected as e:
        result.raised, result.outcome, result.message = e, "fail", f"refused: {e}"
    except Hung as e:
        result.outcome, result.message = "error", f"hung: {e}"
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        result.raised, result.outcome = e, "error"
        result.message = f"crashed: {type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})"
    if result.raised is not None:
        result.raised.__traceback__ = result.raised.__context__ = None  # frames hold models
    result.message = clean(result.message)
    result.seconds = round(time.perf_counter() - begun, 4)
    return result


def known_issues(name: str, version: str) -> list[dict]:
    """The listed issues of an implementation; each needs a link and its evidence."""
    found = json.loads((Path(__file__).parent / "known_issues.json").read_text())["issues"]
    return [i for i in found if i["implementation"] == name and in_range(version, i["versions"])]


def in_range(version: str, wanted: str) -> bool:
    """Whether a version is that one, or within a range: `>= 0.17, <= 0.21.2`. What follows the numbers is ignored."""
    compare = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt, "": operator.eq}

    def numbers(text):
        return [int(n) for n in re.match(r"[\d.]*", text)[0].split(".") if n]  # type: ignore[index]

    parts = [re.fullmatch(r"\s*([<>]=?|)\s*(\d[\w.]*)\s*", part) for part in wanted.split(",")]
    return all(compare[part[1]](numbers(version), numbers(part[2])) for part in parts)  # type: ignore[index]


def apply_known(result: Result, issues: Iterable[dict]) -> Result:
    for issue in issues:
        if any(fnmatch.fnmatchcase(result.id, pattern) for pattern in issue["results"]):
            if result.outcome in ("fail", "error"):
                result.outcome, result.link = "known-issue", issue["link"]
                result.message = f"{issue['what']} | {result.message}"
            elif result.outcome == "pass" and not issue.get("sometimes"):
                result.outcome, result.link = "fail", issue["link"]
                result.message = f"listed as a known issue, and passes: {issue['what']}"
            break
    return result


def run(driver: Driver, tasks: list[Task], issues=(), seconds=30.0, on_result=lambda result: None) -> list[Result]:
    results = []
    for task in tasks:
        result = apply_known(run_one(driver, task, seconds), issues)
        results.append(result)
        on_result(result)
    return results


def verdict(results: list[Result]) -> tuple[bool, Counter]:
    """Did the run succeed: nothing failed, and something ran."""
    counts = Counter(r.outcome for r in results)
    ran = counts["pass"] + counts["fail"] + counts["error"] + counts["known-issue"]
    return counts["pass"] > 0 and ran > 0 and not counts["fail"] and not counts["error"], counts
