"""The rows of the checks of targets, as the reference answers them."""

from __future__ import annotations

from typing import Any

from ..driver import Rejected
from ..drivers.oracle import Oracle
from ..reference import store
from ..reference.methods import methods
from ..run.checks.targets import build, strengths

ALL: dict[str, dict] = {  # for every method whose config has the fields
    "names": {"target_modules": ["up", "model.layers.1.mid"], "exclude_modules": ["layers.10.up"],
              "modules_to_save": ["head"]},
    "regex": {"target_modules": r".*layers\.\d\.(up|mid)", "exclude_modules": r"model\.layers\.0\.m\w+"},
    "layers": {"target_modules": ["up", "setup"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "linear": {"target_modules": "all-linear", "exclude_modules": ["head"]},
    "one-layer": {"target_modules": ["up", "mid"], "layers_to_transform": 1},
    "nowhere": {"target_modules": ["nowhere"]},
    "ranks": {"target_modules": ["up"], "rank_pattern": {"layers.1.up": 3, r"model\.\w+\.1\.up": 5, "0.up": 1}},
    "strengths": {"target_modules": ["up"], "alpha_pattern": {"layers.1.up": 3, "h.1.up": 5, "setup": 7, "^up": 11}},
}
LORA: dict[str, dict] = {
    "one-name": {"target_modules": ["up"]},
    "a-whole-path": {"target_modules": ["model.layers.1.up"]},
    "some-of-a-path": {"target_modules": ["1.up"]},
    "part-of-a-name-is-none": {"target_modules": ["p", "mid"]},
    "regex-is-the-whole-path": {"target_modules": r"\w+\.1\.up"},
    "regex-from-the-start": {"target_modules": r"\w*up"},
    "regex-is-no-name": {"target_modules": "up"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear-in-capitals": {"target_modules": "All-Linear"},
    "all-linear-but-some": {"target_modules": "all-linear", "exclude_modules": ["up", "model.head"]},
    "all-linear-and-saved": {"target_modules": "all-linear", "modules_to_save": ["overhead"]},
    "exclude-by-regex": {"target_modules": ["up"], "exclude_modules": r"model.*\d\.up"},
    "exclude-by-part-of-a-regex": {"target_modules": ["up"], "exclude_modules": r"layers\.1"},
    "exclude-by-path": {"target_modules": ["up", "mid"], "exclude_modules": ["model.layers.1.up", "up.mid"]},
    "saved-beats-targeted": {"target_modules": ["up", "head"], "modules_to_save": ["model.head"]},
    "saved-parent": {"target_modules": ["up"], "modules_to_save": ["experts"]},
    "saved-without-a-dot": {"target_modules": ["mid"], "modules_to_save": ["up"]},
    "any-list-of-layers": {"target_modules": ["up"], "layers_to_transform": 1},
    "first-number-is-the-layer": {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "several-lists-of-layers": {"target_modules": ["up"], "layers_to_transform": [1],
                                "layers_pattern": ["blocks", "h"]},
    "layers-spare-a-whole-path": {"target_modules": ["up", "model.layers.10.up"], "layers_to_transform": [1]},
    "first-of-two-ranks": {"target_modules": ["up"], "rank_pattern": {r"layers\.\d+\.up": 2, "model.layers.1.up": 3}},
    "rank-and-alpha": {"target_modules": ["up"], "rank_pattern": {"layers.1.up": 2, "h.1.up": 5},
                       "alpha_pattern": {"layers.1.up": 3, "experts.0.up": 9}, "use_rslora": True},
    "exclude-by-the-beginning-of-a-regex": {"target_modules": ["up"], "exclude_modules": r"model\.layers\.1"},
    "matches-nothing": {"target_modules": ["nowhere"]},
    "excludes-everything": {"target_modules": ["mid"], "exclude_modules": ["mid"]},
    "regex-with-layers": {"target_modules": ".*up", "layers_to_transform": [1]},
    "pattern-without-layers": {"target_modules": ["up"], "layers_pattern": "layers"},
}
OTHER: dict[str, tuple[str, str, dict]] = {  # row: method, base, changes
    "layer-replication": ("lora", "decoder-llama", {"target_modules": ["q_proj"],
                                                    "layer_replication": [[0, 2], [1, 3]]}),
    "feedforward": ("ia3", "decoys", {"target_modules": ["up", "head"], "feedforward_modules": ["up"]}),
    "feedforward-regex": ("ia3", "decoys", {"target_modules": ".*(up|mid)", "feedforward_modules": r".*\.up"}),
    "feedforward-regex-is-the-whole-path": ("ia3", "decoys", {"target_modules": ".*(up|mid)",
                                                              "feedforward_modules": r"layers\.1\.up"}),
    "feedforward-regex-is-no-beginning": ("ia3", "decoys", {"target_modules": ".*(up|mid)",
                                                            "feedforward_modules": r"model\.layers\.1"}),
    "all-linear-conv1d": ("lora", "gpt", {"target_modules": "all-linear"}),
    "many-names": ("lora", "decoys-many", {"target_modules": [
        f"model.layers.{i}.{name}" for i in range(7) for name in ("q", "k")] + [f"encoder.layers.{i}.q"
                                                                                 for i in (0, 2, 3, 4, 5, 6)]}),
    "all-linear-spares-the-output": ("lora", "decoys-output", {"target_modules": "all-linear"}),
    "parameters": ("lora", "decoys-parameters", {"target_modules": [], "target_parameters": ["experts.weight"]}),
    "parameter-by-path": ("lora", "decoys-parameters", {
        "target_modules": [], "target_parameters": ["model.experts.weight", "layers.1.myexperts.weight"]}),
    "frequencies": ("fourierft", "decoys", {"target_modules": ["up", "setup"], "n_frequency_pattern": {
        "layers.1.up": 7, "up": 5}}),
    "wavelets": ("waveft", "decoys", {"target_modules": ["up", "setup"], "n_frequency_pattern": {
        "layers.1.up": 7, "up": 5}}),
    "block-sizes": ("c3a", "decoys", {"target_modules": ["up", "setup"], "block_size": 8, "block_size_pattern": {
        "layers.1.up": 4, "up": 2}}),
    "all-linear-spares-the-classifier": ("lora", "decoys-classifier", {"target_modules": "all-linear",
                                                                       "task_type": "SEQ_CLS"}),
    "all-linear-without-a-task": ("lora", "decoys-classifier", {"target_modules": "all-linear"}),
}
TYPES = ("RefinedWeb", "RefinedWebModel", "bart", "bert", "blip-2", "bloom", "btlm", "chatglm", "codegen", "deberta",
         "deberta-v2", "electra", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo",
         "gpt_neox", "gptj", "layoutlm", "llama", "llama4", "mistral", "mixtral", "mpt", "mt5", "nemotron_h", "opt",
         "phi", "qwen2", "qwen3", "roberta", "rwkv7", "stablelm", "t5", "xlm-roberta")
FEW = ("bert", "dinov2", "falcon", "gpt2", "gpt_bigcode", "llama", "opt", "phi", "t5", "vit")  # for other methods
BY_RULE = {"hira/ranks"}  # the reference does not do what its documentation says


def answer(driver, row) -> dict:
    build(driver, row)
    found: dict[str, Any] = {"keys": {k: list(v.shape) for k, v in sorted(driver.state_dict().items())}}
    return {**found, "strengths": strengths(driver)} if "strengths" in row else found


def by_type(driver, method) -> dict | None:
    """What is adapted of models of known types, where the config says nothing of it."""
    config = {k: v for k, v in method.rows[0].config.items() if k not in ("target_modules", "feedforward_modules")}
    row: dict[str, Any] = {"method": method.name, "id": "by-type", "base": "architectures", "config": config,
                           "profile": "core" if method.name == "lora" else "full", "types": {}}
    for model_type in TYPES if method.name == "lora" else FEW:
        try:
            build(driver, row, model_type)
            found: dict[str, Any] = {k: list(v.shape) for k, v in sorted(driver.state_dict().items())}
            if method.name == "adamss":  # whose shapes depend on values
                found = dict.fromkeys(found)
            row["types"][model_type] = found
        except Exception as e:
            print(f"left out, {method.name}/targets/by-type, {model_type}: {type(e).__name__}: {e}"[:300])
    return row if row["types"] else None


def record(driver) -> list[dict]:
    """The rows as the reference answers them, and `BY_RULE` as the rules do.

    A shape that depends on values is left out: it is None.
    """
    fields = {method: row["defaults"].keys() for method, row in store.configs().items()}
    wanted = [(m.name, "decoys", id, {k: v for k, v in changes.items() if k in fields[m.name]})
              for m in methods().values() for id, changes in ALL.items()
              if not m.prompt and changes.keys() - {"exclude_modules"} <= fields[m.name]]
    wanted += [("lora", "decoys", id, changes) for id, changes in LORA.items()]
    wanted += [(method, base, id, changes) for id, (method, base, changes) in OTHER.items()]
    found = []
    for method, base, id, changes in wanted:
        config = methods()[method].rows[0].config
        row: dict[str, Any] = {"method": method, "id": id, "profile": "core" if method == "lora" or id == "names" else
                               "full", "base": base, "config": {**config, **changes}}
        if "alpha_pattern" in changes:
            row["strengths"] = {}
        by_rule = f"{method}/{id}" in BY_RULE
        try:
            row |= answer(Oracle() if by_rule else driver, row)
            if id not in OTHER or base != "decoder-llama":
                for key, shape in answer(Oracle(), row)["keys"].items():
                    if row["keys"].get(key, shape) != shape:
                        row["keys"][key] = None
        except Exception as e:
            if id in (*LORA, "nowhere") and isinstance(e, Rejected):
                found.append({**row, "refused": True})
            else:
                print(f"left out, {method}/targets/{id}: {type(e).__name__}: {e}"[:300])
            continue
        found.append(row)
    chosen = [m for m in methods().values() if m.name == m.peft_type.lower() and "target_modules" in fields[m.name]]
    return found + [typed for m in chosen if (typed := by_type(driver, m))]
