"""The model card: a README.md whose front matter says which library, base model and method an adapter is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import PEFT_VERSION

FRAME = "### Framework versions"


def model_card(model: Any, path: Path) -> str:
    """The text of the card of a PeftModel: that of `path`, if it is there, with its metadata brought up to date."""
    front, body = _split(path.read_text(encoding="utf-8")) if path.is_file() else ({}, "")
    base = model.get_base_model()
    method = model.peft_type.value
    tags = set(front.get("tags", [])) | set(getattr(base, "model_tags", None) or [])
    if hasattr(base, "config") and hasattr(base.config, "model_type"):
        tags.add("transformers")
    if method == "LORA":
        tags.add("lora")
    name = getattr(base, "__dict__", {}).get("name_or_path")
    if name:
        tags.add(f"base_model:adapter:{name}")
        front["base_model"] = name
    front["library_name"] = "peft"
    if tags:
        front["tags"] = sorted(tags)
    causal = any(getattr(c, "task_type", None) == "CAUSAL_LM" for c in model.peft_config.values())
    if "pipeline_tag" not in front and causal:
        front["pipeline_tag"] = "text-generation"
    version = f"- PEFT {PEFT_VERSION}"
    if not body.strip():
        body = f"# Adapter\n\nA {method} adapter in the format of PEFT.\n"
    if version not in body.splitlines():
        if FRAME in body:
            body = body.replace(FRAME, f"{FRAME}\n\n{version}", 1)
        else:
            body = f"{body.rstrip()}\n\n{FRAME}\n\n{version}\n"
    return f"---\n{_dump(front)}---\n{body}"


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body. Only what this module writes is understood; any other line is kept as it stands."""
    if not text.startswith("---\n") or "\n---\n" not in text[4:]:
        return {}, text
    head, body = text[4:].split("\n---\n", 1)
    front: dict[str, Any] = {}
    for line in head.splitlines():
        if line.startswith("- ") and front:
            key = next(reversed(front))
            front[key] = [*front[key], line[2:]] if isinstance(front[key], list) else [line[2:]]
        elif line.startswith((" ", "\t")) and front:
            key = next(reversed(front))
            front[key] = f"{front[key]}\n{line}"
        else:
            key, _, value = line.partition(":")
            front[key.strip()] = value.strip()
    return front, body


def _dump(front: dict[str, Any]) -> str:
    lines = []
    for key, value in sorted(front.items()):
        listed = isinstance(value, list)
        lines += [f"{key}:", *(f"- {item}" for item in value)] if listed else [f"{key}: {value}".rstrip()]
    return "\n".join(lines) + "\n"
