"""PEFT's rules of which layers a config means, without a model: names and patterns in, paths out.

`RULES` holds one function for each rule of choosing, so that a seeded fault is another function in its place.
"""

from __future__ import annotations

import re


def named(name: str, path: str) -> bool:
    """A name means the module of that path, and whatever ends with it after a dot."""
    return path == name or path.endswith("." + name)


def matched(pattern: str, path: str) -> bool:
    """A string is a regular expression for the whole path."""
    return re.fullmatch(pattern, path) is not None


def layer_of(path: str, patterns: list[str]) -> int | None:
    """The number of a module's layer: the first after one of the names, or after any name that is not the first."""
    for pattern in patterns or [""]:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\." if pattern else r".*?\.[^.]*\.(\d+)\.", path)
        if found:
            return int(found[1])
    return None


def in_layers(path: str, config: dict) -> bool:
    wanted = config["layers_to_transform"]
    patterns = config.get("layers_pattern") or []
    index = layer_of(path, [patterns] if isinstance(patterns, str) else patterns)
    return index in ([wanted] if isinstance(wanted, int) else wanted)


def excluded(path: str, config: dict) -> bool:
    out = config.get("exclude_modules") or []
    return matched(out, path) if isinstance(out, str) else any(named(name, path) for name in out)


def within_saved(path: str, names: list[str]) -> bool:
    """Modules that are saved whole, and what is in them, are not adapted."""
    return any(f".{name}." in f".{path}." for name in names)


def saved_whole(name: str, path: str) -> bool:
    """`modules_to_save` means the end of a path, with or without a dot before it."""
    return path.endswith(name)


def of_pattern(patterns: dict, path: str, default):
    """The value of the first pattern that matches the end of a path, from its start or a dot on."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", path)), default)


def spared(base: dict) -> set[str]:
    """What "all-linear" leaves out of a model of transformers: its output layer."""
    return {base["output"]} if base.get("output") else set()


HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def whole(config: dict) -> list[str]:
    """The names of what is trained and saved whole: those of the config, and the head of the task."""
    return [*(config.get("modules_to_save") or []), *HEADS.get(config.get("task_type") or "", [])]


RULES = {"named": named, "matched": matched, "in_layers": in_layers, "excluded": excluded, "spared": spared,
         "whole": whole, "within_saved": within_saved, "saved_whole": saved_whole}


def adapted(base: dict, config: dict, rules=RULES) -> list[str]:
    """The layers of a base model that a config means, by path."""
    wanted = config.get("target_modules") or []
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        spare = rules["spared"](base)
        wanted = [path for path, kind, _ in base["layers"] if kind in ("Linear", "Conv1D") and path not in spare]
    found = []
    for path, kind, _ in base["layers"]:
        if rules["excluded"](path, config) or rules["within_saved"](path, rules["whole"](config)):
            continue
        if isinstance(wanted, str):
            meant = rules["matched"](wanted, path)
        else:
            meant = path in wanted or (any(rules["named"](name, path) for name in wanted) and
                                       (config.get("layers_to_transform") in (None, []) or
                                        rules["in_layers"](path, config)))
        if kind in ("Matrix", "Experts"):
            meant = any(rules["named"](name, f"{path}.weight") for name in config.get("target_parameters") or ())
        if meant:
            found.append(path)
    return found


def saved(base: dict, config: dict, rules=RULES) -> list[str]:
    """The paths of the layers that are trained and saved whole, or are in a module that is."""
    names = rules["whole"](config)
    parts = [path.split(".") for path, _, _ in base["layers"]]
    return [".".join(p) for p in parts
            if any(rules["saved_whole"](name, ".".join(p[:i + 1])) for name in names for i in range(len(p)))]
