"""The table of methods in README.md, generated from the method files: `python -m tests.methods_table` writes it."""

from pathlib import Path

from book.method_files import count, described, forms

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def cell(stated):
    """A count as the table shows it."""
    shown = []
    for terms, fields in forms(stated):
        parts = ", and ".join(f"`{term}`{' in all' * once}" for term, once in terms)
        shown.append(parts + " with " * bool(fields) + ", ".join(f"`{name}={value}`" for name, value in fields.items()))
    return ", or ".join(shown)


def rows():
    """One row for each method file: name, kind, formula, parameters, layers, merges, paper."""
    found = []
    for m in described():
        formula = "`" + m.formula.replace("|", "\\|") + "`"
        paper = f"[paper]({m.paper})" if m.paper else ""
        merges = "yes" if m.merges else "no"
        found.append((m.name, m.peft_type.value, m.kind, formula, cell(count(m.doc) or "?"), m.layers, merges, paper))
    return sorted(found, key=lambda row: row[0].lower())


def table():
    """The table as Markdown."""
    head = ("method", "`peft_type`", "kind", "formula", "parameters", "adapts", "merges", "paper")
    lines = [head, ["---"] * len(head), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(text):
    """The README's text with the table brought up to date."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
