"""Record the fixtures anew from a reference implementation: `python -m conformance record [--check] [METHOD ...]`.

Every case is checked by the method's formula as it is recorded. What the two dispute ends up in `disputed` with both
numbers; what is trivial (the adapter hardly changes the output) or blind (a fault within ten tolerances) is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from pathlib import Path

import numpy as np

from ..drivers.oracle import Oracle
from ..reference import formulas, numpy_model, store
from ..reference.bases import BASES
from ..reference.compare import distance, first_difference
from ..reference.draw import bf16, draw_adapter, draw_base, draw_inputs, rng_of
from ..reference.method import KEY, Method, Row, turned
from ..run.checks import lifecycle

AGREE = "float32"  # formula and reference must agree to rounding of this dtype at least; most do to float64's
SMALLEST_MARGIN = 10.0
SMALLEST_EFFECT = 0.05
DRAWN = ("base", "adapter", "second", "input", "cotangent")  # parts of a case that are drawn; the others are computed
MEASURED = ("effect", "margin", "agreement", "nearest_fault")  # figures of a case that rounding may change


def record_bases(folder: Path) -> None:
    """Write the shapes of all base models' parameters, so that drawing weights for them needs no torch."""
    from .. import models

    rows = []
    for name, base in BASES.items():
        net = models.make(base)
        weights = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
        shapes = [[key, list(p.shape)] for key, p in weights]
        rows.append(json.dumps({"name": name, "base": base, "shapes": shapes}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bases.json").write_text('{"bases": [\n' + ",\n".join(rows) + "\n]}\n")
    store.bases.cache_clear()


def targets_of(base, weights, state, method_name) -> list:
    """The adapted layers: paths that own tensors which do not simply replace a base parameter."""
    keys = [k for k in state if formulas.plain_name(k) not in weights]
    at = sorted(numpy_model.sites(base, weights), key=len, reverse=True)
    keys = [k for k in keys if not k.endswith("trainable_tokens_delta") or method_name == "trainable_tokens"]
    return sorted({p for k in keys if (p := next((q for q in at if k.startswith(f"{KEY}{q}.")), None))})


def record_case(method: Method, row: Row, driver) -> tuple[dict, dict]:
    case_id = f"{method.name}/{row.id}"
    rng = rng_of(case_id + row.draw)
    base, config = BASES[row.base], store.resolved({"peft_type": method.peft_type, **row.config})
    weights = draw_base(base, rng)
    inputs = draw_inputs(base, row.inputs, rng)

    driver.build(base, weights, config, "float32", case=case_id)
    live, count = driver.names(), driver.count()
    driver.build(base, weights, config, widest(row), case=case_id)
    closed = formulas.expected_shapes(method, base, weights, config, []) if row.lost else {}
    fresh_state = {k: np.zeros(s) for k, s in closed.items()} or driver.state_dict()
    cotangent = bf16(rng.normal(size=driver.forward(inputs).shape))
    used = config.get("inference_mode")  # nothing is trained any more
    take = driver.live_gradients if row.live or row.lost else driver.gradients
    put = driver.assign if row.live else driver.load
    fresh = {k: np.zeros(s) for k, s in method.live(config).items()} if row.live else fresh_state
    trainable = set(fresh if used else take(inputs, cotangent)) - {"input"}
    frozen = set(fresh) - trainable
    adapter = draw_adapter(method, fresh, set() if row.live else frozen, rng)
    put(adapter)

    parts: dict[str, dict] = {"base": weights, "adapter": adapter, "input": inputs, "cotangent": {"y": cotangent}}
    made = method.tensors.made(config, []) if row.begins and method.tensors.made else {}
    parts["fresh"] = {k: fresh_state[k] for k in made}
    said = formulas.output(method, base, weights, adapter, config, inputs)
    if row.golden == "formula":
        y, grad = said, formulas.gradients(method, base, weights, adapter, config, inputs, cotangent)
    else:
        y = driver.forward(inputs)
        grad = {} if used else take(inputs, cotangent)
    parts["out"], parts["grad"] = {"y": y}, grad
    folded, _ = formulas.adapted(method, base, {k: np.asarray(v, np.float64) for k, v in weights.items()}, adapter,
                                 config)
    if method.merges and row.merges:
        if row.golden == "formula":
            parts["merged"] = {k: v for k, v in folded.items() if v is not weights[k] and KEY + k not in adapter}
        else:
            driver.merge()
            after = driver.weights()
            parts["merged"] = {k: v for k, v in after.items() if not np.array_equal(v, weights[k])}
            parts["merged_out"] = {"y": driver.forward(inputs)}
    merged_out = parts.pop("merged_out", {}).get("y")

    parts["plain"] = {"y": formulas.output(method, base, weights, {}, config, inputs, prompt=lambda *a: {})}
    problems: list[str] = []
    plain = parts["plain"]["y"]
    agreement = agreement_of(said, y, "formula and reference", problems)
    if "merged" in parts:
        for k, v in parts["merged"].items():
            agreement_of(folded[k], v, f"merged {k}", problems)
        if merged_out is not None:
            agreement_of(merged_out, y, "the merged model and the running one", problems)
    counted = formulas.gradients(method, base, weights, adapter, config, inputs, cotangent)
    for k in sorted(grad):
        if k not in counted or distance(grad[k], counted[k], "float32", floor=1) > 1:
            problems.append(f"gradient of {k}: reference and finite differences of the formula differ")
    for k, v in made.items():
        agreement_of(v, parts["fresh"][k], f"a new adapter's {k}: formula and reference", problems)
    evidence, problems = (problems, []) if row.disputed else ([], problems)
    if row.disputed:
        parts["paper"], parts["paper_grad"] = {"y": said}, counted
        parts["paper_merged"] = {k: folded[k] for k in parts.get("merged", {})}
    trace = record_trace(method, row, driver, base, config, parts, problems, case_id)
    targets = targets_of(base, weights, adapter, method.name)
    if row.live:
        parts["saved"] = driver.state_dict()
        for k, v in method.saved(adapter, config).items():
            agreement_of(v, parts["saved"][k], f"saved {k}: formula and reference", problems)
    saved = parts.get("saved", adapter)
    closed = formulas.expected_shapes(method, base, weights, config, targets)
    for k, shape in closed.items():
        if k not in saved or tuple(saved[k].shape) != tuple(shape):
            problems.append(f"{k}: closed form says {tuple(shape)}, saved {saved.get(k, np.empty(0)).shape}")
    if plain.shape != y.shape:  # prompts lengthen the output
        plain = None
    effect = 1.0 if plain is None else float(np.abs(y - plain).max() / np.abs(y).max())
    if agreement > 1e-11 and "float64" in row.dtypes and not row.disputed:
        problems.append(f"formula and reference agree to {agreement:.1g} only: leave float64 out of the row's dtypes")
    if effect < SMALLEST_EFFECT:
        problems.append(f"the adapter changes the output by {effect:.3f} only")
    margin, nearest = margin_of(method, row, base, weights, adapter, config, inputs, y, plain, targets)
    if margin < SMALLEST_MARGIN:
        problems.append(f"margin {margin:.1f}: the nearest fault is {nearest}")

    data = {
        "id": case_id, "profile": row.profile, "note": row.note, "golden": row.golden, "base_name": row.base,
        "base": base, "config": {"peft_type": method.peft_type, **row.config}, "second": second_config(method, row),
        **({"trace": trace} if trace else {}), "dtypes": list(row.dtypes),
        "merges": "merged" in parts, "targets": targets,
        "keys": {k: list(v.shape) for k, v in sorted(saved.items())}, "frozen": sorted(frozen),
        **({"live": True} if row.live else {}),
        "parameters": dict(sorted(live.items())), "count": list(count),
        "effect": round(effect, 4), "margin": float(f"{margin:.4g}"), "nearest_fault": nearest,
        "agreement": float(f"{agreement:.3g}"),
    }
    if row.disputed:
        data["disputed"] = {"what": row.disputed, "evidence": evidence}
        if not evidence:
            problems.append("listed as disputed, but reference and formula agree")
    if problems:
        data["problems"] = problems
    tensors = {f"{case_id}|{part}|{k}": v for part, group in parts.items() for k, v in group.items()}
    return data, tensors


def widest(row) -> str:
    """The dtype in which the reference is asked: float64, but for formulas of what it refuses there."""
    return "float32" if row.golden == "formula" and "float64" not in row.dtypes else "float64"


def second_config(method, row):
    return None if row.second is None else \
        {"peft_type": method.peft_type, **(row.second or row.config), **method.laws.second}


def record_trace(method, row, driver, base, config, parts, problems, case_id):
    """The lifecycle's outputs, from the reference or from the formulas; where it is both, they must agree."""
    second = second_config(method, row)
    if second is None:
        return []
    weights, inputs = parts["base"], parts["input"]
    driver.build(base, weights, second, widest(row), case=case_id)
    state = driver.state_dict()
    other = draw_adapter(method, state, {k for k in state if method.tensors.is_frozen(k)}, rng_of(case_id + " second"))
    other.update({k: v for k, v in parts["adapter"].items() if method.tensors.is_frozen(k)})
    known = (method, base, weights, config, second, parts["adapter"], other, inputs, "float64")
    asked = [(Oracle(), case_id + "?")] if row.golden == "formula" else [(driver, case_id), (Oracle(), case_id + "?")]
    told = [list(lifecycle.steps(d, *known, case=name)) for d, name in asked]
    for (name, a), (_, b) in zip(told[0], told[-1]):
        agreement_of(b, a, f"lifecycle, after '{name}': formula and reference", problems)
    parts["second"] = other
    parts["trace"] = {str(i): y for i, (_, y) in enumerate(told[0])}
    return [name for name, _ in told[0]]


def agreement_of(a, b, what, problems) -> float:
    """Relative difference; a dispute is written down."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        problems.append(f"{what}: shapes {a.shape} and {b.shape}")
        return float("inf")
    gap = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))
    if distance(a, b, AGREE) > 1:
        problems.append(f"{what} differ by {gap:.3g} relative")
    return gap


def margin_of(method, row, base, weights, adapter, config, inputs, y, plain, targets):
    """(distance of the nearest fault in float32 tolerances, its name), over the faults meant for this case."""
    gauges = [{}] if method.tensors.gauges is None else list(method.tensors.gauges(config, targets))

    def outputs(**change):
        return [formulas.output(method, base, weights, turned(adapter, gauge), config, inputs, **change)
                for gauge in gauges]

    wrong: dict[str, list] = {}
    if plain is not None:
        wrong["adapter ignored"] = [plain]
        wrong["effect 1% too large"] = [plain + 1.01 * (y - plain)]
    if method.prompt:
        wrong["prompt 1% too large"] = [formulas.output(method, base, weights,
                                                        {k: 1.01 * v for k, v in adapter.items()}, config, inputs)]
    for fault in method.faults:
        if fault.gradient_only or not fault.meant_for(row.id):
            continue
        for part in ("formula", "run", "prompt", "loss", "route"):
            if part in fault.change:
                with contextlib.suppress(ValueError):  # it does not even run
                    wrong[fault.id] = outputs(**{part: fault.change[part]})
    measured = {k: min(distance(v, y, "float32") for v in found) for k, found in wrong.items()}
    if not measured:
        return float("inf"), ""
    nearest = min(measured, key=lambda name: measured[name])
    return min(measured[nearest], 1e9), nearest


def differences(new: store.Pack, old: store.Pack) -> list[str]:
    """How a pack recorded anew differs from the stored one.

    What was drawn must be equal bit for bit. What was computed from it may differ by rounding, which another processor
    does in another order.
    """
    found = []
    dtype = {c["id"]: "float64" if "float64" in c["dtypes"] else "float32" for c in old.data["cases"]}
    for a, b in zip(new.data["cases"], old.data["cases"]):
        found += [f"{b['id']}: {k} is now {a.get(k)!r}, stored {b.get(k)!r}" for k in {**a, **b}
                  if k not in MEASURED and a.get(k) != b.get(k)]
        found += [f"{b['id']}: {k} is now {a[k]}, stored {b[k]}" for k in ("effect", "margin")
                  if not np.isclose(a[k], b[k], rtol=0.01)]
    if (now := [c["id"] for c in new.data["cases"]]) != (before := [c["id"] for c in old.data["cases"]]):
        found.append(f"{old.data['method']}: the cases are now {now}, stored {before}")
    for name in sorted(new.tensors.keys() | old.tensors.keys()):
        a, b, (case, part, _) = new.tensors.get(name), old.tensors.get(name), name.split("|", 2)
        if a is None or b is None:
            found.append(f"{name}: {'not recorded any more' if a is None else 'not stored'}")
        elif part in DRAWN:
            found += [] if np.array_equal(a, b) else [f"{name}: drawn otherwise, {first_difference(a, b)}"]
        elif distance(a, b, dtype.get(case, "float64"), floor=1) > 1:
            found.append(f"{name}: {first_difference(a, b)}")
    return found


def provenance(driver) -> dict:
    reference = Path(formulas.__file__).parent
    files = [*sorted(reference.glob("methods/*.py")), Path(__file__), reference / "draw.py", reference / "bases.py"]
    source = b"".join(p.read_bytes() for p in files)
    info = driver.info()
    return {"library": info["name"], "version": info["version"], "torch": info.get("torch", ""),
            "numpy": np.__version__, "platform": f"{platform.system()} {platform.machine()}",
            "recorder_sha256": hashlib.sha256(source).hexdigest()[:16], "dtype": "float64"}


def record_method(method: Method, driver, folder: Path, kept: store.Pack | None = None) -> list[str]:
    """Write one method's pack, the cases of `kept` as they are there; the problems found, as text."""
    cases, tensors, problems = [], {}, []
    stored = {case["id"]: case for case in kept.data["cases"]} if kept else {}
    if method.files:
        method.files(folder)
    for row in method.rows:
        if kept and (data := stored.get(f"{method.name}/{row.id}")):
            parts = {k: v for k, v in kept.tensors.items() if k.startswith(f"{data['id']}|")}
        else:
            data, parts = record_case(method, row, driver)
        problems += [f"{data['id']}: {p}" for p in data.pop("problems", [])]
        cases.append(data)
        tensors.update(parts)
    store.write(folder, method.name, {
        "schema": store.SCHEMA, "method": method.name, "peft_type": method.peft_type, "title": method.title,
        "paper": method.paper, "equation": method.equation, "provenance": provenance(driver), "cases": cases}, tensors)
    return problems
