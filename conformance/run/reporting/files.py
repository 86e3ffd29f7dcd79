"""JSON lines, JUnit XML and a badge."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape


def jsonl(path, info, profile, results) -> None:
    """One header line, then one line for each result."""
    lines = [json.dumps({"implementation": info, "profile": profile, "results": len(results)})]
    lines += [json.dumps({"id": r.id, **r.as_dict()}) for r in results]
    Path(path).write_text("\n".join(lines) + "\n")


def junit(path, info, results) -> None:
    suites = ET.Element("testsuites")
    for method in dict.fromkeys(r.method for r in results):
        own = [r for r in results if r.method == method]
        count = {o: str(sum(r.outcome == o for r in own)) for o in ("fail", "error")}
        suite = ET.SubElement(suites, "testsuite", name=f"{info['name']} {method}", tests=str(len(own)),
                              failures=count["fail"], errors=count["error"],
                              skipped=str(sum(r.outcome in ("unsupported", "known-issue") for r in own)),
                              time=f"{sum(r.seconds for r in own):.3f}")
        for r in own:
            case = ET.SubElement(suite, "testcase", classname=r.case.replace("/", "."), name=f"{r.check}-{r.dtype}",
                                 time=f"{r.seconds:.4f}")
            if r.outcome != "pass":
                tag = {"fail": "failure", "error": "error"}.get(r.outcome, "skipped")
                likely = f"likely mistake: {r.cause}\n" if r.cause else ""
                ET.SubElement(case, tag, message=f"{r.outcome}: {r.message}"[:500]).text = likely + (
                    r.expected and f"expected {r.expected}\ngot {r.got}")
    ET.indent(suites)
    ET.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)


def badge(path, info, good, counts) -> None:
    """An SVG in the usual two-part form; the right part says how many checks passed."""
    left = f"PEFT conformance: {info['name']} {info['version']}"
    ran = sum(counts[o] for o in ("pass", "fail", "error", "known-issue"))
    right = f"{counts['pass']} of {ran}" + (f", {counts['known-issue']} known" if counts["known-issue"] else "")
    colour = "#2e7d4f" if good else "#b3362b"
    a, b = 7 * len(left) + 12, 7 * len(right) + 12
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{a + b}" height="20" role="img" '
        f'aria-label="{escape(left)}: {escape(right)}"><rect width="{a}" height="20" fill="#444"/>'
        f'<rect x="{a}" width="{b}" height="20" fill="{colour}"/><g fill="#fff" font-family="Verdana,sans-serif" '
        f'font-size="11" text-anchor="middle"><text x="{a / 2}" y="14">{escape(left)}</text>'
        f'<text x="{a + b / 2}" y="14">{escape(right)}</text></g></svg>\n')
