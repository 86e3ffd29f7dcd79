"""A page for each method, made from its file, its cases in the suite, and what training on the digits gave."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minipeft.core import registry
from minipeft.core.config import CONFIGS

from . import html, notation, pictures, small, source
from .method_files import FUNCTIONS, MethodFile, code, count, forms, methods, names_in, path_of
from .page import Page
from .training import Trained

FIXTURES = source.ROOT / "fixtures"
KINDS = {
    "delta": "W′ = W + ΔW", "transform": "W′ = f(W)", "activation": "around the layer", "routed": "by the input",
    "replacement": "another layer", "prompt": "virtual tokens", "whole module": "whole modules",
}
USUAL = {"in": 768, "out": 768, "dim": 768, "token_dim": 768, "hidden_size": 768, "num_layers": 12}  # as in BERT's base
SYMBOLS = {  # of all methods, and what stands for them in a formula
    r"\bW\b": "$W$: the frozen weight, (out, in)", r"\bW'": "$W'$: the weight of the adapted layer",
    r"\bx\b": "$x$: the input, (..., in)", r"\bb\b": "$b$: the bias, (out,)", r"\by\b": "$y$: the output, (..., out)",
    r" \* ": "$u * v$: entry by entry", r" \(x\) ": "$U (x) V$: the Kronecker product",
    r"\bdiag\(": "$diag(v)$: v on the diagonal",
    r"\|": "$|v|$: the norm",
}


def pages(on_digits: list[Trained], on_texts: list[Trained]) -> list[Page]:
    """All pages; what training gave is of all methods."""
    made = []
    for method in methods():
        words = f"{method.peft_type.value} {method.kind} {method.cls.__name__}"
        made.append(Page(path_of(method), method.name, body(method, on_digits, on_texts), method.kind, title(method),
                         words, scripts=("calculator.js",)))
    return made


def title(method: MethodFile) -> str:
    """What the name stands for: the first line of the docstring after the dash."""
    text = re.split(r" [-–] ", " ".join(method.doc.split("\n\n")[0].split()), maxsplit=1)[-1]
    return re.split(r"\. (?=[A-Z])|\. https|,? https", text)[0].rstrip(".")


def body(method: MethodFile, on_digits: list[Trained], on_texts: list[Trained]) -> str:
    parts = [
        f"<h1>{html.escape(method.name)}</h1>", f'<p class="lead">{html.escape(title(method))}</p>',
        facts(method), section("formula", "The formula", formula(method)),
        section("count", "What is trained", counted(method) + tensors(method)),
        section("seen", "After training", seen(method, on_digits, on_texts)),
        section("code", "The code", annotated(method)),
        section("config", "Its configuration", fields(method)),
        section("peft", "Where PEFT decides, and where it is disputed", deviations(method)),
        section("suite", "In the suite", suite(method)),
    ]
    return "\n".join(parts)


def section(anchor: str, heading: str, content: str) -> str:
    if not content:
        return ""
    return f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{heading}</h2>\n{content}</section>'


def facts(method: MethodFile) -> str:
    kind = f"{method.kind}: {KINDS[method.kind]}"
    merges = "yes" if method.merges else "no"
    head = " ".join(method.doc.split("\n\n")[0].split())
    reference = head.partition(" - ")[2]
    reference = reference[len(title(method)):].lstrip(". ") or reference
    rows = [("kind", f'<a href="law.html#kinds">{html.escape(kind)}</a>'), ("adapts", html.escape(method.layers)),
            ("merges", merges), ("<code>peft_type</code>", f"<code>{method.peft_type.value}</code>"),
            ("asked for by", f"<code>{html.escape(asked(method))}</code>"),
            ("file", f'<a href="{source.address(sys.modules[method.cls.__module__])}">'
                     f"<code>{method.cls.__module__.replace('.', '/')}.py</code></a>"),
            ("paper", html.prose(reference))]
    return '<dl class="facts">' + "".join(f"<div><dt>{a}</dt><dd>{b}</dd></div>" for a, b in rows) + "</dl>"


def asked(method: MethodFile) -> str:
    """What a user writes to get it."""
    config = CONFIGS[method.peft_type].__name__
    field = getattr(method.cls, "asked_by", None)
    return f"{config}({field}=...)" if field else f"{config}(...)"


# --------------------------------------------------------------------------------------------------- the docstring
def formula(method: MethodFile) -> str:
    """The docstring's formulas and shapes, and its paragraphs."""
    made = []
    paragraphs = method.doc.rstrip().split("\n\n")[1:]
    for paragraph in paragraphs:
        lines = paragraph.strip("\n").split("\n")
        if lines[0].startswith("    "):
            lines = without_count(lines)
            if lines:
                made.append(formulas([line.strip() for line in lines]))
            if len(made) == 1:
                made.append(legend(method.formula))
        elif lines[0].startswith("- "):
            items = re.split(r"\n?^- ", paragraph.strip("\n"), flags=re.M)[1:]
            made.append("<ul>" + "".join(f"<li>{html.line(' '.join(item.split()))}</li>" for item in items) + "</ul>")
        else:
            made.append(f"<p>{html.line(' '.join(paragraph.split()))}</p>")
    return "\n".join(made)


def legend(formula: str) -> str:
    """The symbols of a formula that are the same for all methods."""
    said = [meaning for pattern, meaning in SYMBOLS.items() if re.search(pattern, formula)]
    set_ = [re.sub(r"\$(.+?)\$", lambda m: html.math(m[1]), meaning) for meaning in said]
    return f'<p class="quiet">{"; ".join(set_)}.</p>' if set_ else ""


def without_count(lines: list[str]) -> list[str]:
    """The lines without those of the count, which has a place of its own."""
    kept, inside = [], False
    for line in lines:
        inside = line.startswith("    parameters  ") or (inside and line.startswith("     ") and line.strip() != "")
        if not inside:
            kept.append(line)
    return kept


def formulas(lines: list[str]) -> str:
    """Lines of formulas, each with its notes beside it."""
    drawn = [line for line in lines if line.count("|") >= 6]
    latex = notation.matrix([re.split(r"\s{3,}(?=h = )", line)[0] for line in drawn])
    rows: list[list[str]] = []
    for line in lines:
        if line in drawn and latex:
            if line is drawn[0]:
                note = re.split(r"\|\s{3,}(?=[^|]*$)", line)
                rows.append([html.mathml(latex, " ".join(drawn), True), html.line(note[1]) if len(note) > 1 else ""])
            continue
        columns = re.split(r"\s{2,}", line)
        if len(columns) > 1 and columns[1].startswith("="):
            columns[:2] = [" ".join(columns[:2])]
        main, notes = columns[0], columns[1:]
        first = list(notation.pieces(main))
        alone = all(kind == "math" for kind, _ in first)
        if (alone and (notes or "=" in main)) or (notes and len(main) < 60):
            shown = html.math(main.rstrip(","), block=True) if alone else html.line(main)
            rows.append([shown, " &emsp; ".join(html.line(note) for note in notes)])
        else:
            rows.append(["", " &emsp; ".join(html.line(column) for column in columns)])
    cells = "".join(f'<div class="eq">{a}</div><div class="note">{b}</div>' for a, b in joined(rows))
    long = any(len(re.split(r"\s{2,}", line)[0]) > 56 for line in lines)
    return f'<div class="formulas{" long" if long else ""}">{cells}</div>'


def joined(rows: list[list[str]]) -> Iterator[tuple[str, str]]:
    """Rows, those without a formula joined to the notes of the one before."""
    held: list[str] | None = None
    for equation, note in rows:
        if not equation and held:
            held[1] += f"<br>{note}"
        else:
            if held:
                yield held[0], held[1]
            held = [equation, note]
    if held:
        yield held[0], held[1]


# ------------------------------------------------------------------------------------------------------ the count
def counted(method: MethodFile) -> str:
    """The closed form of the count, and a calculator for each of its forms."""
    made = []
    for number, (terms, given) in enumerate(forms(count(method.doc) or "")):
        each = " + ".join(term for term, once in terms if not once)
        once = " + ".join(term for term, once in terms if once)
        names = list(dict.fromkeys(name for term, _ in terms for name in names_in(term)))
        config = small.configuration(method.peft_type, method.cls, given)
        values = {**example_values(config), **USUAL} | {k: int(v) for k, v in given.items() if v.isdecimal()}
        if (result := total(terms, values)) <= 0:
            raise ValueError(f"{method.name}: the count would be {result}, with {values}")
        label = "with " * bool(given) + ", ".join(f"<code>{html.escape(f'{k}={v}')}</code>" for k, v in given.items())
        inputs = "".join(
            f'<label><span>{html.escape(name)}</span><input name="{name}" type="number" min="0" step="any" '
            f'value="{shown_number(values[name])}"></label>' for name in names)
        layers = "" if method.kind == "prompt" or not each else (
            '<label><span>adapted layers</span><input name="__layers" type="number" min="1" value="1"></label>')
        said = []
        if each:
            said.append(html.math(each))
        if once:
            said.append(html.math(once) + " once for the whole model")
        where = "" if method.kind == "prompt" or not each else " for each adapted layer"
        made.append(
            f'<form class="calculator" data-each="{html.escape(code(each))}" data-once="{html.escape(code(once))}" '
            f'aria-label="parameters, form {number + 1}"><p>{(", and ".join(said))}{where} {label}</p>'
            f'<div class="inputs">{inputs}{layers}</div><p class="result">= <output aria-live="polite">'
            f"{result:,.0f}</output> trained parameters</p></form>")
    return "".join(made)


def example_values(config: Any) -> dict[str, Any]:
    """Values to begin with: what the field of a configuration is by default, or on the small model."""
    defaults = usual(type(config))
    found = {}
    for name, value in small.values(config).items():
        default = defaults.get(name)
        value = small.VALUES.get(name) if value is None else value
        sized = isinstance(default, (int, float)) and not isinstance(default, bool) and default > 0
        found[name] = default if sized else len(value) if isinstance(value, (dict, list)) else value
    return found


def total(terms: list[tuple[str, bool]], values: dict[str, Any]) -> float:
    numbers = {**FUNCTIONS, **values, "len": lambda n: n, "n_in": values["in"]}
    return sum(eval(code(term), dict(numbers)) for term, _ in terms)


def shown_number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def tensors(method: MethodFile) -> str:
    """The tensors that it puts into the small model, as they are called there."""
    stated = forms(count(method.doc) or "")
    config = small.configuration(method.peft_type, method.cls, stated[0][1])
    with tempfile.TemporaryDirectory() as folder:
        model = small.adapted(method.peft_type, config, 1, Path(folder))
        names = model.named_parameters()
        rows = []
        for name, parameter in names:
            if ".base_layer." in name or not (parameter.requires_grad or "default" in name):
                continue
            trained = "trained" if parameter.requires_grad else "frozen"
            shown = name.removeprefix("base_model.model.")
            rows.append([f"<code>{html.escape(shown)}</code>", str(tuple(parameter.shape)), trained,
                         f"{parameter.numel():,}"])
    rest = len(rows) - 8
    layer = f"a layer with {small.IN} inputs and {small.OUT} outputs"
    what = "the prompt's module" if method.kind == "prompt" else layer
    given = ", ".join(f"{k}={sorted(v) if isinstance(v, set) else v!r}" for k, v in nondefault(config).items())
    more = f"<p class='quiet'>and {rest} more.</p>" if rest > 0 else ""
    target = small.TARGETS.get((getattr(method.cls, "bases", None) or ("",))[0])
    what = f"a module of width {small.OUT}" if target in ("norm", "words") else what
    made = html.table(["tensor", "shape", "", "numbers"], rows[:8], "tensors", f"Its tensors on {what}")
    return made + more + f"<p class='quiet'>Made with <code>{html.escape(given)}</code>.</p>"


def nondefault(config: Any) -> dict[str, Any]:
    """What of a configuration was set."""
    defaults = usual(type(config))
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
             if f.init and f.name not in ("peft_type", "peft_version", "adapters", "task_type")}
    return {name: value for name, value in given.items() if value != defaults[name] and len(repr(value)) < 70}


def usual(config: type) -> dict[str, Any]:
    """The defaults of a configuration's fields."""
    return {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(config)}


# ---------------------------------------------------------------------------------------------------------- digits
def seen(method: MethodFile, on_digits: list[Trained], on_texts: list[Trained]) -> str:
    """What training on the digits and on sentences gave, and what it did to a weight."""
    rows = [row for row in on_digits if row.module == method.cls.__module__]
    made = [results(rows, on_digits, "Digits 5 to 9 read by a network that had learned 0 to 4")]
    if told := [row for row in on_texts if row.module == method.cls.__module__]:
        made.append(results(told, on_texts, "Which library a sentence documents, told by MiniLM"))
    for row in rows:
        if row.W is not None and row.merged_W is not None:
            made.append(f"<figure>{pictures.weights(row.W, row.merged_W, row.layer)}<figcaption>{caption(row)}"
                        "</figcaption></figure>")
        elif row.T is not None:
            text = (f"<b>{html.escape(row.name)}.</b> No merged weight exists. What it learned: "
                    f"<code>{html.escape(short_name(row.tensor))}</code>, "
                    f"{row.T.shape[0]} × {row.T.shape[1]}.")
            picture = pictures.tensor(row.T, short_name(row.tensor))
            made.append(f"<figure>{picture}<figcaption>{text}</figcaption></figure>")
    return "".join(made) + '<p><a href="choosing.html">All methods side by side</a></p>'


def results(rows: list[Trained], of: list[Trained], what: str) -> str:
    """The rows of one experiment, each with its place among all."""
    order = sorted(of, key=lambda row: -row.after)
    lines = [[html.escape(row.name), f"{row.parameters:,}", f"{row.before:.1%}", f"{row.after:.1%}",
              f"{order.index(row) + 1} of {len(order)}", f"{1e3 * row.step:.1f} ms", f"{row.memory / 1024:,.0f} KiB"]
             for row in rows]
    head = ["", "trained", "before", "after", "place", "a step", "held while training"]
    return html.table(head, lines, "numbers", what)


def short_name(name: str) -> str:
    return re.sub(r"^(base_model\.)?(model\.)?|\.default", "", name)


def caption(row: Trained) -> str:
    assert row.W is not None and row.merged_W is not None
    rank, full, size = pictures.facts(row.W, row.merged_W)
    shape = " × ".join(map(str, row.W.shape))
    most = f"<b>{html.escape(row.name)}.</b> What it changed most: <code>{html.escape(row.layer)}</code> ({shape})."
    much = f" The change has rank {rank} of {full}, and {size:.0%} of the norm of W."
    return most + much * (min(row.W.shape) > 1)


# ------------------------------------------------------------------------------------------------------------ code
def files(method: MethodFile) -> list[str]:
    """The modules that are the method's, its own first; those of a variant are not those of LoRA."""
    own = method.cls.__module__
    model = registry.MODELS.get(method.peft_type.value)
    return [own, model] if model and not getattr(method.cls, "asked_by", None) else [own]


def annotated(method: MethodFile) -> str:
    """The file from its first class on, each part beside what is said of it."""
    module = sys.modules[method.cls.__module__]
    text = inspect.getsource(module)
    lines = text.split("\n")
    made = []
    address = source.page_of(Path(module.__file__ or ""))
    for ranges, note in parts(ast.parse(text), module):
        kept = textwrap.dedent("\n".join("\n".join(lines[first - 1:last]) for first, last in ranges)).strip("\n")
        first = ranges[0][0]
        link = f'<a class="line-link" href="{address}#L{first}" aria-label="in the file, line {first}">{first}</a>'
        made.append(f'<div class="part"><div class="about">{note}{link}</div>{html.code(kept.rstrip())}</div>')
    return f'<div class="annotated">{"".join(made)}</div>'


Range = tuple[int, int]


def parts(tree: ast.Module, module: Any) -> Iterator[tuple[list[Range], str]]:
    """(lines, note) of each function and class of a file but its configurations; a docstring goes into the note."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield part(node, ast.get_docstring(node) or "")
        elif isinstance(node, ast.ClassDef) and not is_config(node):
            cls = getattr(module, node.name)
            yield part(node, ast.get_docstring(node) or inherited(cls))
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield part(member, ast.get_docstring(member) or inherited(cls, member.name))


def part(node: ast.FunctionDef | ast.ClassDef, said: str) -> tuple[list[Range], str]:
    """The lines of a function, or of a class up to its first method, without the docstring; the note beside them."""
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    end = node.end_lineno or start
    if isinstance(node, ast.ClassDef):
        methods: list[Any] = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        end = min([end, *(d.lineno - 1 for n in methods for d in (n, *n.decorator_list))])
    ranges = [(start, end)]
    if ast.get_docstring(node):
        ranges = [(start, node.body[0].lineno - 1), ((node.body[0].end_lineno or 0) + 1, end)]
    text = " ".join(said.split("\n\n")[0].split())
    return ranges, f"<p>{html.line(text)}</p>" if text else ""


def is_config(node: ast.ClassDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "dataclass" for d in node.decorator_list)


HOOKS = {"pre": "What is done to the layer's input.", "post": "What is done to its output."}  # say nothing themselves


def inherited(cls: type, name: str = "") -> str:
    """What the class that it derives from says of itself, or of one of its methods."""
    for base in cls.__mro__[1:]:
        found: Any = vars(base).get(name) if name else base
        found = getattr(found, "__func__", getattr(found, "fget", found))
        if base.__module__.startswith("minipeft") and getattr(found, "__doc__", None):
            return str(inspect.cleandoc(found.__doc__)) if name else f"{base.__name__}: {base.__doc__}"
    return HOOKS.get(name, "")


# --------------------------------------------------------------------------------------------- config, PEFT, suite
def fields(method: MethodFile) -> str:
    """The configuration's fields with their defaults, and the comments beside them."""
    config = CONFIGS[method.peft_type]
    text = inspect.getsource(config)
    said = html.comments(textwrap.dedent(text))
    where = {}
    tree = ast.parse(textwrap.dedent(text)).body[0]
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            where[node.target.id] = (ast.unparse(node.annotation), said.get(node.lineno, ""))
    rows = []
    for name, value in usual(config).items():
        if name in where:
            kind, note = where[name]
            rows.append([f"<code>{name}</code>", f"<code>{html.escape(kind)}</code>",
                         f"<code>{html.escape(repr(value))}</code>", html.line(note)])
    doc = " ".join((config.__doc__ or "").split("\n\n")[0].split())
    made_table = html.table(["field", "type", "default", ""], rows, "fields", f"Fields of {config.__name__}")
    folded = made_table if len(rows) < 12 else f"<details><summary>{len(rows)} fields</summary>{made_table}</details>"
    return f"<p>{html.line(doc)}</p>{folded}"


def deviations(method: MethodFile) -> str:
    """The comments that begin with `PEFT:`, and the disputed cases."""
    items = []
    for name in files(method):
        module = importlib.import_module(name)
        text = inspect.getsource(module)
        lines = text.split("\n")
        for number, comment in sorted(html.comments(text).items()):
            if comment.startswith("PEFT:"):
                statement = lines[number - 1].split("#")[0].strip() or lines[number].strip()
                place = f"{source.page_of(Path(module.__file__ or ''))}#L{number}"
                link = f'<a href="{place}"><code>{html.escape(statement)}</code></a>'
                items.append(f"<li>PEFT: {html.line(comment[5:].strip())}<br>{link}</li>")
    disputed = [f"<li>Disputed: {html.prose(what)} <span class='quiet'>({html.escape(where)})</span></li>"
                for where, what in disputes(method)]
    if not items and not disputed:
        return "<p>Nothing is marked: paper, PEFT and this file say the same.</p>"
    return f'<ul class="deviations">{"".join(items + disputed)}</ul>'


def suite_name(method: MethodFile) -> str:
    name = method.cls.__module__.rpartition(".")[2]
    return name if (FIXTURES / "methods" / f"{name}.json").exists() else ""


def cases(method: MethodFile) -> list[dict[str, Any]]:
    name = suite_name(method)
    return json.loads((FIXTURES / "methods" / f"{name}.json").read_text())["cases"] if name else []


def disputes(method: MethodFile) -> list[tuple[str, str]]:
    found: dict[str, list[str]] = {}
    for case in cases(method):
        if case.get("disputed"):
            found.setdefault(case["disputed"]["what"], []).append(case["id"])
    name = suite_name(method)
    listed = json.loads((FIXTURES / "disputed.json").read_text())["without_a_case"]
    more = [(row["where"], row["what"]) for row in listed if name and row["where"].split(",")[0] == name]
    return [(", ".join(ids), what) for what, ids in found.items()] + more


def suite(method: MethodFile) -> str:
    """Its formula in NumPy, its cases and its seeded faults."""
    name = suite_name(method)
    if not name:
        return "<p>It has no cases of its own in <code>conformance/</code>; the tests compare it with peft itself.</p>"
    module = importlib.import_module(f"conformance.reference.methods.{name}")
    made = ["<p>The suite's own formula, in NumPy, written apart from the file above. The golden data agree.</p>"]
    m = module.METHOD
    function = m.formula or m.run or m.route or m.prompt.formula
    made.append(html.code(inspect.getsource(function).rstrip()))
    rows = [[f'<code id="case-{html.escape(case["id"].replace("/", "-"))}">{html.escape(case["id"])}</code>',
             html.escape(case["base_name"]), config_of(case)] for case in cases(method)]
    made.append(f"<details><summary>{len(rows)} recorded cases</summary>"
                + html.table(["case", "base model", "configuration"], rows, "cases", f"Cases of {name}") + "</details>")
    faults = [[f"<code>{html.escape(f.id)}</code>", html.line(f.what),
               f'<a href="{html.escape(f.link)}">a real one</a>' if f.link else ""] for f in module.METHOD.faults]
    if faults:
        made.append(f"<details><summary>{len(faults)} seeded faults, all of which the cases catch</summary>"
                    + html.table(["fault", "what is wrong", ""], faults, "cases", f"Faults of {name}") + "</details>")
    one = cases(method)[0]["id"]
    made.append(f"<p>Run them with {html.code(f'python -m conformance --impl minipeft --methods {name}', 'console')}"
                f"One alone, as Python: {html.code(f'python -m conformance explain {one}:forward', 'console')}</p>")
    return "".join(made)


def config_of(case: dict[str, Any]) -> str:
    given = {k: v for k, v in case["config"].items() if k not in ("peft_type", "target_modules")}
    text = ", ".join(f"{k}={v!r}" for k, v in given.items())
    return f"<code>{html.escape(text if len(text) < 160 else text[:157] + '...')}</code>"
