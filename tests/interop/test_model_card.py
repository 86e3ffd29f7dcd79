"""The model card, beside PyYAML: what stands in a README.md is kept, and what is added is read as what it says."""

import re
import warnings

import pytest
from torch import nn

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: there is nothing to read the card with")
OURS = {"base_model", "library_name", "pipeline_tag", "tags"}
BASE = "org/base-model"
LINES = [
    "",
    "license: mit",
    "license: mit # ours",
    "tags: [text-generation, other]",
    "tags: [lora, 'text-generation', \"other\",] # three",
    "tags: []",
    "tags:",
    "tags: # none yet",
    "tags:\n- lora\nlanguage:\n- en",
    "tags:\n  - lora\n  - text-generation # a comment\n\n  # another: comment\nlicense: mit",
    "tags:\n- lora\n\n# a comment: here\nmodel-index:\n- name: x\n  results:\n  - task:\n      type: t",
    "# first\n\nlicense: mit\n# last",
    "base_model: other/model\ntags:\n- other",
    "base_model: 'other/model'   # before\nlibrary_name: transformers",
    "base_model:\nlibrary_name:\ntags:\n- other",
    "base_model:\n- other/model\n- org/base-model\nbase_model_relation: adapter",
    "base_model: [org/base-model, other/model]",
    "library_name: \"transformers\"\npipeline_tag: feature-extraction",
    "defaults: &d {a: 1}\nmore: *d\ntags:\n- other",
    "description: |\n  tags: not this\n\n  - nor this\n # nor this\nlicense: mit",
    "description: >-\n  library_name: not this\ntitle: \"a: b\\\n  c\"\nwidget:\n- text: 'it''s'\n- text: \"[\"",
    "nested:\n  tags:\n  - inner\n  base_model: inner\ndatasets: {a: [1, 2], b: {c: d}}",
    "multi: [a,\n  b,\n  c]\nplain: one\n  two",
    "title: Überschrift – 模型",
    "a key with spaces: x\nversion: 1.0\ndate: 2026-11-28\nflag: yes\nnothing: null",
]
NOT_OURS_TO_CHANGE = [
    "tags: &t [a, b]\nsame: *t",
    "tags:\n- &a one\n- two",
    "tags:\n- name: one",
    "tags:\n- - one",
    "tags: {a: b}",
    "tags: one, two",
    "tags: ['a, b', c]",
    "tags: [a, 'b]', \"c\\n\"]",
    "tags: [a,\n  b]",
    "tags: |\n  one",
    "tags: !!set {a}",
    "tags:\n- 'it''s'",
    "tags:\n- >-\n  a",
    "base_model: *b",
    "base_model:\n- other/model",
    "library_name: !!str transformers",
    "library_name: one\n  two",
    "'tags': [a]",
    "tags : [a]",
    "? tags\n: [a]",
    "{tags: [a]}",
    "- a\n- b",
    "title: \"one\ntags: two\"",
    "title: [one,\ntags: two]",
    "tags: [a]\ntags: [b]",
    "%YAML 1.2",
    "no colon here",
    "\ttags: x",
]


def adapted(lib, name=BASE, **changes):
    model = nn.Sequential(nn.Linear(2, 2))
    model.name_or_path = name
    vars(model).update(changes)
    return lib.get_peft_model(model, lib.LoraConfig(target_modules=["0"], r=1))


def updated(lib, tmp_path, content, **changes):
    """What the card is after a save over `content`, and how often that warned about the card."""
    card = tmp_path / "README.md"
    if content is not None:
        card.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted(lib, **changes).create_or_update_model_card(str(tmp_path))
    return card.read_bytes(), sum("model card" in str(w.message) for w in caught)


def parts(content):
    _, front, body = re.split(r"^---\r?\n", content.decode(), maxsplit=2, flags=re.M)
    return yaml.safe_load(front) or {}, front, body


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("front", LINES)
def test_existing_metadata_is_kept(front, newline, lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft writes the metadata anew")
    body = "# Mine\n\ntext: with\n---\n### Framework versions\n\n- PEFT 0.1\n  \n"
    content = f"---\n{front}\n---\n{body}".replace("\n", newline).encode()
    before, old_front, old_body = parts(content)
    result, warned = updated(lib, tmp_path, content)
    now, new_front, new_body = parts(result)
    assert not warned
    assert {k: v for k, v in now.items() if k not in OURS} == {k: v for k, v in before.items() if k not in OURS}
    assert now["library_name"] == "peft"
    assert now["base_model"] == BASE or (BASE in now["base_model"] and now["base_model"] == before["base_model"])
    had = list(before.get("tags") or [])
    assert now["tags"][: len(had)] == had
    assert sorted(now["tags"]) == sorted({*had, "lora", f"base_model:adapter:{BASE}"})
    lines = [line for line in old_front.splitlines(True) if not re.match("base_model:|library_name:|tags:", line)]
    rest = iter(new_front.splitlines(True))
    assert all(line in rest for line in lines), "every other line is there, byte for byte and in order"
    assert new_body == old_body.replace(f"versions{newline * 2}", f"versions{newline * 2}- PEFT 0.21.2{newline}")
    assert updated(lib, tmp_path, None) == (result, 0), "a second save changes nothing"


@pytest.mark.parametrize("front", NOT_OURS_TO_CHANGE)
def test_what_is_not_understood_is_left(front, lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft writes the metadata anew")
    content = f"---\n{front}\n---\n# Mine\n".encode()
    assert updated(lib, tmp_path, content) == (content, 1)


BROKEN = [
    b"---\ntags:\n- a\n", b"---\n", b"\n---\ntags: [a]\n---\n", b"\xef\xbb\xbf---\ntags: [a]\n---\n",
    b"--- # x\na: b\n---\n", b"---\na: b\n----\n", b"---\na: b\n--- # end\n", b"\xff\xfe#\x00",
    "# Grüße\n".encode("latin-1"),
]  # fmt: skip


@pytest.mark.parametrize("content", BROKEN)
def test_broken_cards_are_left(content, lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("peft raises an error")
    assert updated(lib, tmp_path, content) == (content, 1)


BODIES = ["# Mine\n", "# Mine", "# Mine\r\ntext\r\n", "a\n---\nb\n", "# Mine  \n\n\n", "see ### Framework versions\n",
          "### Framework versions", "### Framework versions\n- PEFT 0.1", "### Framework versions\r\n\r\n- other\r\n"]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("front", ["", "---\n---\n"])
def test_text_is_kept(front, body, lib, tmp_path, is_ref):
    if is_ref:
        pytest.skip("peft splits the text into lines and joins them again")
    newline = "\r\n" if "\r\n" in body and not front else "\n"
    result, warned = updated(lib, tmp_path, (front + body).encode())
    now, _, text = parts(result)
    assert not warned and now["library_name"] == "peft"
    without = text.replace(f"- PEFT 0.21.2{newline}", "", 1)
    assert without != text and without.startswith(body)
    assert without[len(body) :].split() in ([], ["###", "Framework", "versions"])
    assert updated(lib, tmp_path, None) == (result, 0)


VALUES = [
    "lora", "a/b", "yes", "No", "on", "OFF", "y", "N", "true", "False", "null", "~", "", " ", "1.0", "1", "1e3",
    "0x1f", "0o7", "1_000", "12:30:45", ".inf", ".nan", "2026-11-28", "2026-11-28 10:00:00", "a: b", "a:b", "a:",
    ":a", "a #b", "a#b", "#a", "- a", "-", "-a", "? a", "?", "&a", "*a", "!a", "!!str a", "%a", "@a", "`a`", "|",
    ">", "[a]", "{a}", "a, b", "a]", "'", '"', "it's", '"a"', "C:\\models\\a: b", "\\n", "a\nb", "\n", "a\r\nb",
    "\t", "a\tb", " a", "a ", "---", "...", "<<", "=", "a\u2028b", "a\x85b", "a\xa0b", "a\x7fb", "\x00", "\ufeffa",
    "ü", "模型", "🤗 model", "\U000e0001", "a.b", "_a", "a+b", "A" * 300,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_values_are_quoted_where_needed(value, lib, tmp_path, is_ref):
    if is_ref:
        pytest.skip("its writer is another one")
    for content in (None, b"---\ntags: [a]\nbase_model: b\n---\n# Mine\n"):
        folder = tmp_path / str(content is None)
        folder.mkdir()
        result, warned = updated(lib, folder, content, name=value or None, model_tags=[value])
        now, front, _ = parts(result)
        assert not warned
        assert value in now["tags"]
        assert not value or f"base_model:adapter:{value}" in now["tags"]
        assert now.get("base_model") == (value or (None if content is None else "b"))
        assert yaml.compose(front).tag == "tag:yaml.org,2002:map"


def test_as_the_hub_reads_it(lib, ref, tmp_path):
    """huggingface_hub's own reader finds in our card the metadata that peft writes, and peft keeps them."""
    hub = pytest.importorskip("huggingface_hub")
    found = {}
    for module in (lib, ref):
        folder = tmp_path / module.__name__
        adapted(module).save_pretrained(str(folder))
        found[module] = hub.ModelCard.load(folder / "README.md").data.to_dict()
    assert found[lib]["library_name"] == found[ref]["library_name"] == "peft"
    assert set(found[lib]["tags"]) >= set(found[ref]["tags"])
    adapted(ref).save_pretrained(str(tmp_path / lib.__name__))
    assert hub.ModelCard.load(tmp_path / lib.__name__ / "README.md").data.to_dict()["library_name"] == "peft"
