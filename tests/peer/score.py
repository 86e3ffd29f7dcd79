#!/usr/bin/env python
"""Compare a result of run.py with the baseline: of the tests that real peft passes, how many pass?

    python score.py mini.json [--baseline baseline.json.gz] [--json score.json] [--failures 20] [--list]

A full run is held against every test that the baseline passes (a test that is absent counts as not passed);
a run made with --sample, --files, --match or --ids only against those of its own tests which the baseline
passes.  The last line is ``peer suite: P / N (x.x%)``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

from run import file_of, half_of, load_json

HERE = Path(__file__).resolve().parent

# Test files that are about one method (their ids rarely name its config class).
FILE_METHODS = {
    "adamss_asa": "Adamss",
    "adaption_prompt": "AdaptionPrompt",
    "arrow": "Lora",
    "bdlora": "Lora",
    "boft": "BOFT",
    "cartridge": "Cartridge",
    "cpt": "CPT",
    "deft": "Deft",
    "frod": "Frod",
    "incremental_pca": "Lora",
    "lora_conversion": "Lora",
    "lora_ga": "Lora",
    "lora_intruders": "Lora",
    "lora_variants": "Lora",
    "lorafa": "Lora",
    "loraplus": "Lora",
    "multitask_prompt_tuning": "MultitaskPromptTuning",
    "osf": "OSF",
    "poly": "Poly",
    "pvera": "Pvera",
    "randlora": "RandLora",
    "riemannian_lora": "Lora",
    "shadow": "Shadow",
    "shira": "Shira",
    "supertuning": "Supertuning",
    "target_parameters": "Lora",
    "trainable_tokens": "TrainableTokens",
    "unilora": "UniLora",
    "vblora": "VBLoRA",
    "velora": "Velora",
    "vera": "Vera",
    "xlora": "XLora",
}
NOT_METHODS = {"Peft", "TestPeft", "TestCustomModel", "TestLoraNested", "TestBaseTunerGetModel"}


def method_of(test_id: str) -> str:
    """The PEFT method that a test id names (its first config class), else the method of its file."""
    params = test_id.partition("[")[2]
    for name in re.findall(r"([A-Za-z0-9]+)Config\b", params):
        if name not in NOT_METHODS:
            return name
    stem = file_of(test_id).rpartition("/")[2].removeprefix("test_").removesuffix(".py")
    return FILE_METHODS.get(stem, "(no method named)")


def compare(baseline: dict, result: dict) -> dict:
    """{test id: outcome} for the tests that count."""
    wanted = [i for i, o in baseline["outcomes"].items() if o == "passed"]
    got = result["outcomes"]
    if result["meta"].get("restricted"):
        wanted = [i for i in wanted if i in got]
    return {i: got.get(i, "not run") for i in wanted}


def wording(outcome: str, text: str) -> bool:
    """Did the right kind of error or warning come, with other words than the test looks for?"""
    return outcome == "failed" and "Regex pattern did not match" in text


def rows(verdicts: dict, key) -> list:
    groups = defaultdict(Counter)
    for i, o in verdicts.items():
        groups[key(i)][o] += 1
    return [(name, groups[name]) for name in sorted(groups, key=str.lower)]


def show(title: str, data: list) -> str:
    kinds = ["failed", "error", "skipped", "timeout", "crashed", "not collected", "not run", "xfailed", "xpassed"]
    kinds = [k for k in kinds if any(c[k] for _, c in data)]
    width = max(len(title), *(len(n) for n, _ in data)) if data else len(title)
    out = [f"{title:{width}}  {'baseline':>8} {'passed':>8} {'share':>7}  " + "  ".join(kinds)]
    for name, c in data:
        n = sum(c.values())
        cells = "  ".join(f"{c[k] or '':>{len(k)}}" for k in kinds)
        out.append(f"{name:{width}}  {n:>8} {c['passed']:>8} {100 * c['passed'] / n:>6.1f}%  {cells}".rstrip())
    return "\n".join(out)


def reasons(verdicts: dict, result: dict, most: int) -> str:
    missing, texts, example = Counter(), Counter(), {}
    for i, o in verdicts.items():
        if o in ("passed", "not run"):
            continue
        text = result.get("messages", {}).get(i, o)
        match = re.search(r"MissingPeftName: (\S+) is not offered", text)
        if match:
            missing[match.group(1)] += 1
            continue
        lines = [line for line in text.strip().splitlines() if line.strip()] or [o]
        line = lines[-1] if o in ("not collected", "crashed") else lines[0]
        line = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e-?\d+)?", "#", line)[:140]
        texts[line] += 1
        example.setdefault(line, i)
    out = []
    if missing:
        out.append("names that are not offered, and the tests that stop there:")
        out += [f"  {n:>6}  {name}" for name, n in missing.most_common(most)]
    if texts:
        out.append("most frequent other failures:")
        out += [f"  {n:>6}  {line}\n          {example[line]}" for line, n in texts.most_common(most)]
    return "\n".join(out)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("result")
    p.add_argument("--baseline", default=str(HERE / "baseline.json.gz"))
    p.add_argument("--json", help="also write the numbers here")
    p.add_argument("--failures", type=int, default=15, help="how many reasons to list")
    p.add_argument("--list", action="store_true", help="list every test that is lost")
    args = p.parse_args(argv)
    baseline, result = load_json(args.baseline), load_json(args.result)
    verdicts = compare(baseline, result)
    total, passed = len(verdicts), sum(o == "passed" for o in verdicts.values())
    by_file, by_method = rows(verdicts, file_of), rows(verdicts, method_of)
    print(show("file", by_file) + "\n")
    print(show("method", by_method) + "\n")
    text = reasons(verdicts, result, args.failures)
    if text:
        print(text + "\n")
    absent = [m.removeprefix("name ") for m in result.get("missing", []) if m.startswith("name ")]
    if absent:
        print(f"{len(absent)} names were imported and are not offered: {', '.join(absent)}\n")
    for line in result.get("missing", []):
        if line.startswith("module "):
            print("does not import:", line.removeprefix("module "))
    if args.list:
        for i, o in verdicts.items():
            if o != "passed":
                print(o, i)
        print()
    counts = Counter(verdicts.values())
    share = passed / total if total else 0.0
    theirs, ours = baseline["meta"]["versions"], result["meta"].get("versions", {})
    other = [f"{lib} {ours.get(lib)} (baseline: {v})" for lib, v in theirs.items() if ours.get(lib) != v]
    if other:
        print("note: other versions than the baseline's:", ", ".join(other))
    note = ""
    if result["meta"].get("restricted"):
        everything = sum(o == "passed" for o in baseline["outcomes"].values())
        error = 196 * math.sqrt(share * (1 - share) / total) if total else 0.0
        part = f"a part: {total} of the {everything} tests that the baseline passes"
        note = f" ({part}; about +-{error:.1f} points if sampled)"
    print(", ".join(f"{k}: {n}" for k, n in counts.most_common()) + note)
    if args.json:
        data = {
            "passed": passed,
            "total": total,
            "share": share,
            "outcomes": counts,
            "files": dict(by_file),
            "methods": dict(by_method),
        }
        Path(args.json).write_text(json.dumps(data, indent=1))
    words = sum(wording(o, result.get("messages", {}).get(i, "")) for i, o in verdicts.items())
    for half in ("open", "held"):
        mine = [i for i in verdicts if half_of(i) == half]
        good = sum(verdicts[i] == "passed" or wording(verdicts[i], result.get("messages", {}).get(i, "")) for i in mine)
        print(f"{half} half: {good} / {len(mine)} but for the wording ({100 * good / max(len(mine), 1):.1f}%)")
    lenient = 100 * (passed + words) / max(total, 1)
    print(f"peer suite: {passed} / {total} ({100 * share:.1f}%), but for the wording of messages {lenient:.1f}%")


if __name__ == "__main__":
    main()
