"""Reports side by side: what the page says, that it needs no network, and what is no report."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from conformance import commands
from conformance.reference import store
from conformance.run import cli
from conformance.run.reporting import side_by_side

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Elements in balance, what they would load, and the ids that links lead to."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.loads: list = []
        self.ids: set = set()
        self.links: set = set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in VOID else [tag]
        given = dict(attrs)
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "data")] + [tag] * (tag in ("link", "iframe"))
        self.ids |= {given["id"]} if "id" in given else set()
        self.links |= {given["href"]} if "href" in given else set()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Three reports: all right, one fault in an older release of the same, and one that claims little."""
    folder = tmp_path_factory.mktemp("reports")
    path = folder / "right.jsonl"
    cli.main(
        [
            "--impl",
            "oracle",
            "--in-process",
            "--profile",
            "core",
            "--methods",
            "ia3,vera",
            "--checks",
            "keys,forward",
            f"--json={path}",
        ]
    )
    head, *lines = map(json.loads, path.read_text().splitlines())

    def write(name, version, change):
        info = {**head["implementation"], "name": name, "version": version}
        body = [change(dict(line)) for line in lines]
        file = folder / f"{name}-{version}.jsonl"
        file.write_text("\n".join(map(json.dumps, [{**head, "implementation": info}, *body])) + "\n")
        return file

    def wrong(line):
        if (line["method"], line["check"]) == ("ia3", "forward"):
            line |= {
                "outcome": "fail",
                "message": "output: <b>at</b> [0]",
                "by": 9.0,
                "link": "javascript:alert(1)",
                "cause": "ia3/added: l is added",
            }
        return line

    def little(line):
        return line if line["method"] == "vera" else {**line, "outcome": "unsupported"}

    return [write("lib", "0.10.0", lambda line: line), write("other", "1", little), write("lib", "0.9.1", wrong)]


def test_releases_stand_in_their_order(reports):
    assert [r.title for r in side_by_side.load(reports)] == ["lib 0.9.1", "lib 0.10.0", "other 1"]


def test_page(reports, tmp_path, capsys):
    path = tmp_path / "page.html"
    assert commands.main(["compare", *map(str, reports), "--html", str(path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"ia3 .*FAIL", shown) and "lib 0.9.1 -> 0.10.0, mended: ia3 " in shown
    text = path.read_text()
    page = Page(text)
    assert page.loads == [] and "@import" not in text and "url(" not in text, "it stands on its own"
    assert "prefers-color-scheme: dark" in text
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids == {"ia3", "vera"}
    assert all(link.startswith(("#", "https://")) for link in page.links)
    assert "Likely mistake: l is added" in text and "output: &lt;b&gt;at" in text and "<b>at" not in text
    assert "mended" in text and "broken</td>" not in text
    for title in ("lib 0.9.1", "lib 0.10.0", "other 1"):
        assert f'<th scope="row">{title}</th>' in text


def test_the_page_in_docs_stands_on_its_own():
    path = store.folder().parent / "docs" / "implementations.html"
    if not path.exists():
        pytest.skip("no checkout")
    text = path.read_text()
    page = Page(text)
    assert page.loads == [] and "@import" not in text and "url(" not in text
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert len(text) < 2**21, "keep it small"


def test_counts_are_of_what_is_claimed(reports):
    older, newer, other = side_by_side.load(reports)
    cell = side_by_side.cell(other, "ia3", other.of("ia3"), "#ia3")
    assert 'class="unsupported"' in cell and "&ndash;" in cell
    counts = Counter(r.outcome for r in older.of("ia3"))
    assert counts["fail"] == counts["pass"]
    assert f"{counts['pass']} / {len(older.of('ia3'))}" in side_by_side.cell(older, "ia3", older.of("ia3"), "#ia3")
    assert {k: len(v) for k, v in side_by_side.changes(newer, older).items()} == {
        "mended": 0,
        "broken": counts["fail"],
        "new": 0,
        "gone": 0,
    }
    assert len(side_by_side.changes(newer, other)["gone"]) == len(newer.of("ia3"))


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "cannot be read"),
        ("", "no report"),
        ("{}\n", "no report"),
        ("[1, 2]\n", "no report"),
        (
            '{"implementation": {"name": "a", "version": "1"}, "profile": "core", "results": 2}\n',
            "cut off: it holds 0 of 2",
        ),
        (
            '{"implementation": {"name": "a", "version": "1"}, "profile": "core", "results": 1}\n{"case": "x"}\n',
            "no report",
        ),
    ],
)
def test_what_is_no_report(text, said, tmp_path, capsys):
    path = tmp_path / "report.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as error:
        commands.main(["compare", str(path)])
    assert error.value.code == 2 and said in capsys.readouterr().err
