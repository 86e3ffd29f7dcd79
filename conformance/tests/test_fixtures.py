"""The fixtures: schema, sizes, hashes, immutable ids, and what is promised of every case."""

import json

import numpy as np
import pytest

from conformance.record import coverage
from conformance.reference import formulas, numpy_model, store
from conformance.reference.compare import distance
from conformance.reference.methods import methods
from conformance.run.checks.figures import figures

CASES = store.all_cases()


def test_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((store.folder() / "schema.json").read_text())
    for pack in store.packs().values():
        jsonschema.validate(pack.data, schema)


def test_every_method_has_its_pack_and_every_row_its_case():
    for m in methods().values():
        assert {c.id for c in store.packs()[m.name].cases} == {f"{m.name}/{r.id}" for r in m.rows}


@pytest.mark.parametrize("method", [m for m in methods().values() if m.files], ids=lambda m: m.name)
def test_files_that_configs_name_are_drawn_again(method, tmp_path):
    from safetensors.numpy import load_file

    method.files(tmp_path)
    written = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()]
    assert written and {p.suffix for p in written} == {".json", ".safetensors"}
    for path in written:
        read = load_file if path.suffix == ".safetensors" else lambda p: json.loads(p.read_text())
        new, old = read(tmp_path / path), read(store.folder() / path)
        assert str(new) == str(old) if path.suffix == ".json" else store.tensor_hash(new) == store.tensor_hash(old)


def test_ids_are_unique_and_frozen():
    """Ids that were published once keep their meaning: base and config are hashed in ids.json; adding is free."""
    frozen = json.loads((store.folder() / "ids.json").read_text())
    now = {c.id: store.meaning(c) for c in CASES}
    assert len(now) == len(CASES)
    changed = [i for i, h in frozen.items() if now.get(i, h) != h]
    assert not changed, f"these ids changed their meaning; take new ids: {changed}"
    assert not set(now) - set(frozen), "new cases: run python -m conformance freeze"


def test_tensor_hashes():
    for pack in store.packs().values():
        assert store.tensor_hash(pack.tensors) == pack.data["tensor_sha256"], pack.path


def test_size_budget():
    size = sum(p.stat().st_size for p in store.folder().rglob("*") if p.is_file())
    assert size < 12 * 2**20


def test_coverage_contract():
    assert coverage.problems() == []


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_golden_agrees_with_the_formula(case):
    """Outputs and merged weights; a disputed case must hold both answers and say why."""
    method = methods()[case.pack.data["method"]]
    said = formulas.output(method, case.base, case.tensors("base"), case.tensors("adapter"), case.config,
                           case.tensors("input"))
    if case.data.get("disputed"):
        assert case.disputed["evidence"] and distance(said, case.tensors("paper")["y"], "float32") <= 1
        return
    assert distance(said, case.tensors("out")["y"], "float32") <= 1
    weights = {k: np.asarray(v, np.float64) for k, v in case.tensors("base").items()}
    folded, _ = formulas.adapted(method, case.base, weights, case.tensors("adapter"), case.config)
    for name, want in case.tensors("merged").items():
        assert distance(folded[name], want, "float32") <= 1, name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_counts_follow_from_the_closed_form(case):
    """The closed form of the shapes gives the number of trained parameters."""
    method = methods()[case.pack.data["method"]]
    closed = formulas.expected_shapes(method, case.base, case.tensors("base"), case.config, case.targets)
    trained = formulas.trained_count(method, closed, case.config)
    extra = {k: v for k, v in case.keys.items() if k not in closed and k not in case.frozen}
    assert trained + sum(int(np.prod(v)) for v in extra.values()) == case.count[0]


def test_every_case_is_moved_away_from_its_start():
    for case in CASES:
        for key, values in case.tensors("adapter").items():
            neutrals = methods()[case.pack.data["method"]].tensors.neutral
            neutral = next((v for slot, v in neutrals.items() if key.endswith(slot)), None)
            assert neutral is None or np.abs(np.asarray(values) - neutral).max() > 1e-3, (case.id, key)


def test_square_and_other_layers_are_covered():
    for name, pack in store.packs().items():
        shapes = {s.W.shape[:2] for c in pack.cases for p, s in
                  numpy_model.sites(c.base, c.tensors("base")).items() if p in c.targets and s.W.ndim > 1}
        if len(shapes) > 1:
            assert any(a == b for a, b in shapes) and any(a != b for a, b in shapes), name


def test_documented_figures_are_rederived():
    for f in figures():
        if f["documented"]:
            total = [r + sum(d[i] for d in f["differences"]) for i, r in enumerate(f["reference"])]
            assert total == f["documented"], f["id"]
