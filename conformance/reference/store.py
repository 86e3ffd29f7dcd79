"""Reading and writing the fixtures: one JSON file of cases and one safetensors pack for each method."""

from __future__ import annotations

import hashlib
import json
from functools import cache, cached_property
from pathlib import Path

import numpy as np

SCHEMA = 1
PARTS = ("base", "adapter", "second", "input", "out", "grad", "merged", "fresh", "cotangent", "trace")


@cache
def folder() -> Path:
    """`fixtures/` beside the package (a checkout), else inside it (an installed wheel)."""
    here = Path(__file__).resolve().parents[1]
    for place in (here.parent / "fixtures", here / "fixtures"):
        if (place / "schema.json").exists():
            return place
    raise FileNotFoundError("no fixtures: neither beside the conformance package nor inside it")


@cache
def bases() -> list[dict]:
    """The base models of the cases: `name`, `base` (the description) and `shapes`, [[parameter, shape], ...]."""
    return json.loads((folder() / "bases.json").read_text())["bases"]


@cache
def states() -> dict:
    """`cases`: case -> the `steps` of an adapter's life, each [what was done, active adapters, which of `names` the
    model's parameters have, which of `trained` are trained]; `left_out`: case -> why the reference has none."""
    return json.loads((folder() / "states.json").read_text())


def base_shapes(base: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a base model's parameters, in the order in which they are drawn."""
    for known in bases():
        if known["base"] == base:
            return {name: tuple(shape) for name, shape in known["shapes"]}
    raise LookupError(f"fixtures/bases.json does not hold this base model; `record` writes it: {base}")


@cache
def rows(table: str) -> list[dict]:
    """A table of the fixtures that holds no tensors: `targets` or `config`, each row with its method and id."""
    return json.loads((folder() / f"{table}.json").read_text())["rows"]


def write_rows(folder: Path, table: str, rows: list[dict]) -> None:
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / f"{table}.json").write_text('{"rows": [\n' + text + "\n]}\n")


@cache
def configs() -> dict[str, dict]:
    """What is known of each method's config; see run/checks/config.py."""
    return {row["method"]: row for row in rows("config")}


@cache
def defaults(peft_type: str) -> dict:
    """What a config holds that gives only what it must; {} for a type that is not recorded."""
    return next((row["defaults"] for row in configs().values() if row["defaults"].get("peft_type") == peft_type), {})


def resolved(config: dict) -> dict:
    """A config whose files and `adapters`, named from the fixtures' folder on, are found from anywhere."""
    if source := config.get("prompt_tuning_init_state_dict_path"):
        config = {**config, "prompt_tuning_init_state_dict_path": str(folder() / source)}
    if named := config.get("adapters"):
        config = {**config, "adapters": {k: str(folder() / path) for k, path in named.items()}}
    return config


class Case:
    """One recorded case: the JSON fields as attributes, the tensors by part, e.g. `case.tensors("adapter")`."""

    def __init__(self, data: dict, pack: Pack):
        self.data, self.pack = data, pack

    @property
    def config(self) -> dict:
        return resolved(self.data["config"])

    @property
    def agreed(self) -> bool:
        """Is the golden the reference's, and does nothing contradict it?"""
        return self.data["golden"] == "reference" and not self.data.get("disputed")

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def tensors(self, part: str) -> dict:
        return dict(self.pack.parts.get((self.data["id"], part), {}))

    def __repr__(self):
        return f"<Case {self.id}>"


class Pack:
    """All cases of one method."""

    def __init__(self, path: Path):
        self.path = path
        self.data = json.loads(path.read_text())

    @cached_property
    def tensors(self) -> dict:
        from safetensors.numpy import load_file

        return load_file(self.path.with_suffix(".safetensors"))

    @cached_property
    def parts(self) -> dict[tuple[str, str], dict]:
        """The tensors by case and part."""
        found: dict[tuple[str, str], dict] = {}
        for name, value in self.tensors.items():
            case, part, key = name.split("|", 2)
            found.setdefault((case, part), {})[key] = value
        return found

    @cached_property
    def cases(self) -> list[Case]:
        return [Case(c, self) for c in self.data["cases"]]


@cache
def packs() -> dict[str, Pack]:
    return {p.stem: Pack(p) for p in sorted((folder() / "methods").glob("*.json"))}


def all_cases() -> list[Case]:
    return [c for p in packs().values() for c in p.cases]


def find(case_id: str) -> Case:
    return next(c for c in packs()[case_id.split("/")[0]].cases if c.id == case_id)


def tensor_hash(tensors: dict) -> str:
    """One hash over names, dtypes, shapes and values, whatever order a file holds them in."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        a = np.ascontiguousarray(tensors[name])
        h.update(f"{name}|{a.dtype}|{a.shape}|".encode() + a.tobytes())
    return h.hexdigest()


def meaning(case: Case) -> str:
    """A short hash of what a case is: the base model and the config."""
    return hashlib.sha256(json.dumps([case.base, case.data["config"]], sort_keys=True).encode()).hexdigest()[:16]


def narrow(a):
    """float32 where it loses nothing, to keep packs small."""
    a = np.asarray(a)
    if a.dtype == np.float64 and (a.astype(np.float32).astype(np.float64) == a).all():
        return a.astype(np.float32)
    return a


def write(folder: Path, name: str, data: dict, tensors: dict) -> None:
    from safetensors.numpy import save_file

    tensors = {k: np.ascontiguousarray(narrow(v)) for k, v in tensors.items()}
    data["tensor_sha256"] = tensor_hash(tensors)
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "methods" / f"{name}.safetensors")
    (folder / "methods" / f"{name}.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
