"""The model card: a README.md whose front matter says which library, base model and method an adapter is for.

Of a card that is there already only the lines that say so are changed; all others stay byte for byte. A card whose
front matter is more than the small part of YAML that is understood here stays as it is, with a warning.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from ..core.config import PEFT_VERSION
from ..core.errors import PeftWarning

FRAME = "### Framework versions"
PLAIN = re.compile(r"[A-Za-z_/][\w./+-]*(:[\w./+-]+)*", re.ASCII)  # what YAML takes for text without quotes,
OTHER = re.compile(r"y|n|yes|no|on|off|true|false|null", re.IGNORECASE)  # but for these
KEY = re.compile(r"([A-Za-z_](?:[\w .-]*[\w.-])?):(?:[ \t].*)?", re.ASCII)
EMPTY = re.compile(r"[ \t]+#.*|[ \t]*")
FLOW = re.compile(r"[ \t]+\[(.*)\]([ \t]+#.*|[ \t]*)")  # a list on the line of its key
SCALAR = re.compile(  # a value of one line: '' or "" without escapes, or plain text; then maybe a comment
    r"""(?:'(?P<single>[^']*)'|"(?P<double>[^"\\]*)"|(?P<plain>[^\s'"\[\]{}&*!|>%@`#,?:-](?:[^:#]|:(?=\S)|(?<=\S)\#)*?))"""
    r"(?P<rest>[ \t]+\#.*|[ \t]*)"
)


class NotUnderstood(Exception):
    """A part of a card's front matter that only a whole YAML parser could change; the message names it."""


def model_card(model: Any, path: Path) -> str | None:
    """The text of the card of a PeftModel: that of `path`, if it is there, with its metadata brought up to date.

    None when it needs no change, and, with a `PeftWarning`, when the card that is there is not understood.
    """
    try:
        text = path.read_bytes().decode() if path.is_file() else ""
        updated = _updated(text, model)
        return None if updated == text else updated
    except (NotUnderstood, UnicodeDecodeError) as error:
        warnings.warn(f"The model card '{path}' is left as it is, without metadata for PEFT: {error}.", PeftWarning)
        return None


def _updated(text: str, model: Any) -> str:
    base = model.get_base_model()
    method = model.peft_type.value
    tags = set(getattr(base, "model_tags", None) or [])
    if hasattr(base, "config") and hasattr(base.config, "model_type"):
        tags.add("transformers")
    if method == "LORA":
        tags.add("lora")
    name = getattr(base, "__dict__", {}).get("name_or_path")
    causal = any(getattr(c, "task_type", None) == "CAUSAL_LM" for c in model.peft_config.values())
    front, body, newline = _split(text)
    if name:
        tags.add(f"base_model:adapter:{name}")
        front.set("base_model", name)
    front.set("library_name", "peft")
    if causal and "pipeline_tag" not in front.entries:
        front.set("pipeline_tag", "text-generation")
    front.extend("tags", sorted(tags))
    if not body.strip():
        body = newline.join(["# Adapter", "", f"A {method} adapter in the format of PEFT.", ""])
    version = f"- PEFT {PEFT_VERSION}"
    if not re.search(rf"^{re.escape(version)}[ \t\r]*$", body, re.M):
        if not re.search(rf"^{FRAME}[ \t\r]*$", body, re.M):
            body += newline.join(["" if body.endswith("\n") else newline, FRAME, "", ""])
        before, title, after = re.split(rf"^({FRAME}[ \t\r]*(?:\n(?:[ \t\r]*\n)?|\Z))", body, maxsplit=1, flags=re.M)
        gap = "" if title.endswith("\n") else newline * 2
        body = f"{before}{title}{gap}{version}{newline}{after}"
    return f"---{newline}{front.text()}---{newline}{body}"


def _split(text: str) -> tuple[_Front, str, str]:
    """Front matter, body, and how the lines of the text end."""
    newline = "\r\n" if re.match(r"[^\n]*\r\n", text) else "\n"
    if not re.match(r"\ufeff?\s*---", text):
        return _Front("", newline), text, newline
    whole = re.match(r"---[ \t]*\r?\n((?:(?!---)[^\n]*\n)*)---[ \t]*(?:\r?\n|\Z)", text)
    if whole is None:
        raise NotUnderstood("its front matter lacks the line --- at the very beginning, or the one at its end")
    return _Front(whole[1], newline), text[whole.end() :], newline


class _Front:
    """Front matter, as the lines of each key of its outermost level."""

    def __init__(self, head: str, newline: str) -> None:
        self.newline = newline
        self.entries: dict[str, list[str]] = {"": []}  # "" for what stands before the first key
        key = ""
        for line in head.splitlines(keepends=True):
            bare = line.rstrip("\r\n")
            if found := KEY.fullmatch(bare):
                key = found[1]
                if key in self.entries:
                    raise NotUnderstood(f"`{key}` stands in it twice")
                self.entries[key] = []
            elif not re.match(r"[ \t]*(#|$)", bare) and not (key and re.match(r"[ \t]|-([ \t]|$)", bare)):
                raise NotUnderstood(f"the line {bare[:60]!r} in it is none that is known here")
            self.entries[key].append(line)
        for key, lines in self.entries.items():
            if not _closed("".join(lines)):
                raise NotUnderstood(f"the value of `{key}` goes over several lines")

    def text(self) -> str:
        return "".join(line for lines in self.entries.values() for line in lines)

    def set(self, key: str, value: str) -> None:
        """Give `key` one value, in the place of another one of the same line."""
        if key not in self.entries:
            self.entries[key] = [f"{key}: {scalar(value)}{self.newline}"]
            return
        head, rest = self._parts(key)
        old = SCALAR.fullmatch(head.lstrip())
        if not rest and (old or EMPTY.fullmatch(head)):
            if old is None or _value(old) != value:
                comment = (old["rest"] if old else head).rstrip()
                self.entries[key][0] = f"{key}: {scalar(value)}{comment}{self.newline}"
        elif value not in self._items(key):
            raise NotUnderstood(f"`{key}` is a list without {value!r}")

    def extend(self, key: str, values: list[str]) -> None:
        """Add to the list at `key` those of `values` that are not in it."""
        if not values:
            return
        lines = self.entries.setdefault(key, [f"{key}:{self.newline}"])
        items = self._items(key)
        new = [scalar(value) for value in values if value not in items]
        flow = FLOW.fullmatch(self._parts(key)[0])
        if flow and new:
            inside = flow[1].strip().removesuffix(",").rstrip()
            lines[0] = f"{key}: [{', '.join([inside, *new] if inside else new)}]{flow[2]}{self.newline}"
        elif new:
            last = max((at for at, line in enumerate(lines) if _means_something(line)), default=0)
            indent = re.match(r"[ \t]*", lines[last])[0]  # type: ignore[index]
            lines[last + 1 : last + 1] = [f"{indent}- {value}{self.newline}" for value in new]

    def _parts(self, key: str) -> tuple[str, list[str]]:
        """What stands behind the key on its own line, and the lines after it that mean something."""
        first, *others = (line.rstrip("\r\n") for line in self.entries[key])
        return first[len(key) + 1 :], [line for line in others if _means_something(line)]

    def _items(self, key: str) -> list[str]:
        """The items of a list of simple values."""
        head, rest = self._parts(key)
        if EMPTY.fullmatch(head):
            lines = [re.fullmatch(r"([ \t]*)-[ \t]+(.*)", line) for line in rest]
            texts = [line[2] for line in lines if line]
            simple = None not in lines and len({line[1] for line in lines if line}) <= 1
        else:
            flow = FLOW.fullmatch(head)
            texts = [part.strip() for part in flow[1].split(",")] if flow else []
            texts = texts[:-1] if texts and not texts[-1] else texts
            simple = flow is not None and not rest and not any(re.match(r"[^'\"].*[\[\]{}]", text) for text in texts)
        found = [SCALAR.fullmatch(text) for text in texts]
        if not simple or None in found:
            raise NotUnderstood(f"`{key}` is not a list of simple values")
        return [_value(item) for item in found if item]


def scalar(text: str) -> str:
    """`text` as YAML writes it: in quotes, unless it is read as that text without them."""
    if PLAIN.fullmatch(text) and not OTHER.fullmatch(text):
        return text
    return '"' + "".join(map(_character, text)) + '"'


def _character(c: str) -> str:
    if c in '"\\':
        return f"\\{c}"
    if c.isprintable():
        return c
    code = ord(c)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _value(found: re.Match[str]) -> str:
    return next(part for part in found.group("single", "double", "plain") if part is not None)


def _means_something(line: str) -> bool:
    return re.match(r"[ \t]*(#|$)", line.rstrip("\r\n")) is None


def _closed(lines: str) -> bool:
    """Whether quotes and brackets that a value begins with end in these lines, which are those of one key."""
    value = lines.partition(":")[2].lstrip()
    if value[:1] in ("'", '"'):
        return re.match(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"", value, re.DOTALL) is not None
    if value[:1] in ("[", "{"):
        bare = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"|[ \t]#[^\n]*", "", value, flags=re.DOTALL)
        return sum(map(bare.count, "[{")) == sum(map(bare.count, "]}")) and not set(bare) & set("'\"")
    return True
