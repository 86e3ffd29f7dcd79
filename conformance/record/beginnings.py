"""The rows of the checks of beginnings: every method as it begins by default, and its other initialisations."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..reference import store
from ..reference.bases import BASES
from ..reference.beginnings import described
from ..reference.draw import draw_base, rng_of
from ..reference.methods import methods
from ..run.checks.beginnings import begun, strengths
from ..run.checks.options import SEEDS
from .config import another

STARTS = 8
NOT_ASKED = {"peft_type", "task_type", "revision", "inference_mode", "peft_version"}
KEYS = {**SEEDS, "adamss": "random_seed", "psoft": "random_seed"}
TWO = ["up", "mid"]
GPT = {"target_modules": ["c_attn"], "fan_in_fan_out": True}


def corda(kind, **more):
    return {"init_lora_weights": "corda", "corda_config": {"corda_method": kind}, **more}


def lora_ga(direction, scale):
    return {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": direction, "scale": scale}}


EFFECTIVE = {"target_modules": ["c1", "c2"], "use_effective_conv2d": True, "r": 2}
SMALL = {"wide": "mlp", "conv1d-hf-wide": "gpt"}
OF_KIND = {"conv2d": "conv2d", "embedding": "embedding", "gpt": "conv1d-hf-wide"}  # a row's base -> where it is begun


# method -> id -> (base, changes of the method's first config); "wide" is the default's base, too
MORE: dict[str, dict[str, tuple[str, dict]]] = {
    "lora": {
        "gaussian": ("wide", {"init_lora_weights": "gaussian"}), "random": ("wide", {"init_lora_weights": False}),
        "orthogonal": ("wide", {"init_lora_weights": "orthogonal"}),
        "pissa": ("wide", {"init_lora_weights": "pissa"}), "olora": ("wide", {"init_lora_weights": "olora"}),
        "pissa-rslora": ("wide", {"init_lora_weights": "pissa", "use_rslora": True}),
        "olora-scaled": ("wide", {"init_lora_weights": "olora", "lora_alpha": 48}),
        "mica": ("wide", {"init_lora_weights": "mica"}),
        "eva": ("wide", {"init_lora_weights": "eva", "eva_config": {}}),
        "pissa-conv1d": ("conv1d-hf-wide", {"init_lora_weights": "pissa", **GPT}),
        "orthogonal-conv1d": ("conv1d-hf-wide", {"init_lora_weights": "orthogonal", **GPT}),
        "eva-data": ("wide", {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "tau": 0.999}}),
        "eva-data-redistributed": ("wide", {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.999},
                                            "lora_alpha": 24}),
        "eva-data-plain": ("wide", {"init_lora_weights": "eva", "eva_config": {
            "rho": 1.0, "tau": 0.999, "whiten": True, "adjust_scaling_factors": False}}),
        "eva-data-batches": ("wide", {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}}),
        "corda-batches": ("wide", corda("kpm")),
        "lora-ga-batches": ("wide", lora_ga("ArB2r", "stable")),
        "corda-ipm": ("wide", corda("ipm")), "corda-kpm": ("wide", corda("kpm")),
        "corda-scaled": ("wide", corda("ipm", lora_alpha=48)),
        "lora-ga-arb2r-stable": ("wide", lora_ga("ArB2r", "stable")),
        "lora-ga-a2rbr-gd-scale": ("wide", lora_ga("A2rBr", "gd_scale")),
        "lora-ga-arbr-unit": ("wide", lora_ga("ArBr", "unit")),
        "embedding": ("embedding", {"target_modules": ["emb"]}),
        "embedding-gaussian": ("embedding", {"target_modules": ["emb"], "init_lora_weights": "gaussian"}),
        "conv2d": ("conv2d", {"target_modules": ["c1", "c2"]}), "bias": ("wide", {"lora_bias": True}),
        "rank-pattern": ("wide", {"init_lora_weights": "gaussian", "rank_pattern": {"mid": 5}}),
        "pissa-niter": ("wide", {"init_lora_weights": "pissa_niter_16"}),
        "lora-ga-arb2r-weight-svd": ("wide", lora_ga("ArB2r", "weight_svd")),
        "conv1d": ("conv1d", {"target_modules": ["c1", "c2"]}),
        "orthogonal-conv2d-one-by-one": ("conv2d-1x1", {"target_modules": ["c1", "c2"]}),
        "experts": ("experts", {"target_modules": [], "target_parameters": ["experts.weight"]}),
    },
    "dora": {"conv2d": ("conv2d", {"target_modules": ["c1", "c2"]}), "pissa": ("wide", {"init_lora_weights": "pissa"})},
    "c3a": {name: ("wide", {"init_weights": value}) for name, value in
            {"gaussian": "gaussian", "kaiming": "kaiming_uniform", "identity": True,
             "xavier": "xavier_uniform"}.items()},
    "loha": {"effective": ("conv2d", EFFECTIVE), "effective-random": ("conv2d", {**EFFECTIVE, "init_weights": False})},
    "randlora": {"sparse": ("wide", {"sparse": True}), "very-sparse": ("wide", {"very_sparse": True}),
                 "very-sparse-on-one": ("wide", {"very_sparse": True, "target_modules": ["up"]})},
    "road": {"road-2": ("wide", {"variant": "road_2"}), "road-4": ("wide", {"variant": "road_4"})},
    "shadow": {"narrow": ("decoder-llama", {"shadow_hidden_size": 4, "update_hidden_size": 5}),
               "own-embeddings": ("decoder-llama", {"share_embeddings": False})},
    "hira": {"gaussian": ("wide", {"init_weights": "gaussian"})},
    "lokr": {"lycoris": ("wide", {"init_weights": "lycoris"}), "effective": ("conv2d", EFFECTIVE),
             "effective-lycoris": ("conv2d", {**EFFECTIVE, "init_weights": "lycoris"}),
             "effective-random": ("conv2d", {**EFFECTIVE, "init_weights": False}),
             "both": ("wide", {"decompose_both": True, "r": 2}),
             "both-random": ("wide", {"decompose_both": True, "r": 2, "init_weights": False}),
             "both-lycoris": ("wide", {"decompose_both": True, "r": 2, "init_weights": "lycoris"})},
    "miss": {"bat": ("wide", {"init_weights": "bat", "r": 8}), "mini": ("wide", {"init_weights": "mini", "mini_r": 8})},
    "tinylora": {"uniform": ("wide", {"init_weights": "uniform"}),
                 "bound": ("wide", {"init_weights": "uniform", "init_v_bound": 0.5})},
    "psoft": {"pissa": ("wide", {"ab_svd_init": "pissa_init"}), "unconstrained": ("wide", {"psoft_orth": False}),
              "lowrank": ("wide", {"psoft_svd": "lowrank"})},
    "prefix_tuning": {"zero": ("causal-lm", {"init_weights": "zero"}),
                      "zero-projected": ("causal-lm", {"init_weights": "zero", "prefix_projection": True,
                                                       "encoder_hidden_size": 5})},
    "prompt_tuning": {"vocabulary": ("causal-lm", {"prompt_tuning_init": "SAMPLE_VOCAB"})},
    "vera": {"d-initial": ("wide", {"d_initial": 1.5}), "another-key": ("wide", {"projection_prng_key": 7})},
    "pvera": {"d-initial": ("wide", {"d_initial": 1.5})},
    "vblora": {"bounds": ("wide", {"init_vector_bank_bound": 0.5, "init_logits_std": 1.0})},
    "unilora": {"bound": ("wide", {"init_theta_d_bound": 0.5})},
    "deft": {"scale": ("wide", {"init_scale": 0.2})},
    "delora": {"lambda": ("wide", {"delora_lambda": 7}), "lambda-pattern": ("wide", {"lambda_pattern": {"mid": 4}})},
}
RANDOM = ("boft", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hira", "hra", "lily", "loha", "lokr",
          "miss", "oft", "peanut", "psoft", "pvera", "randlora", "road", "shira", "supertuning", "vera", "waveft",
          "ia3", "poly", "beft", "c3a", "adalora", "adamss", "alora", "bdlora", "dora", "monteclora", "osf", "shadow",
          "trainable_tokens", "unilora", "velora")  # init_weights, or init_<name>_weights, False: drawn
FROM_DATA = ("eva-data", "corda", "lora-ga")
SIGNS = ("pissa", "olora", "mica", *FROM_DATA)


def row_of(driver, method, id, base, changes) -> dict:
    config = dict(method.rows[0].config)
    if base == "wide" and config.get("r", 0) > 1:
        config["r"] = 16
    profile = "core" if method.name == "lora" or id == "default" else "full"
    row: dict[str, Any] = {"method": method.name, "id": id, "profile": profile, "base": base,
                           "config": {**config, **changes}, "weights": {"all": {}}}
    if id.startswith(FROM_DATA):
        row |= {"data": True, "strengths": {}}
    if id.endswith("-batches"):
        row["batches"] = 4
    signs = id.startswith(SIGNS) or method.name in ("psoft", "osf", "tinylora", "adamss", "frod")
    if signs:
        row["signs"] = True
    starts = [begun(driver, row, seed) for seed in range(STARTS)]
    by_key: set[str] = set()
    if key := KEYS.get(method.name):
        row["key"] = key
        other, _ = begun(driver, row, **{key: row["config"].get(key, 0) + 11})
        by_key = {k for k, v in starts[0][0].items() if v.shape != other[k].shape or not np.array_equal(v, other[k])}
        if not by_key:
            del row["key"]
    row["tensors"] = {k: described([s[0][k] for s in starts], k in by_key, signs) for k in sorted(starts[0][0])}
    given = draw_base(BASES[base], rng_of(base))
    row["weights"] = {k: described([s[1][k] for s in starts], False, False) for k, v in starts[0][1].items()
                      if not np.array_equal(v, given[k].astype(np.float32)) and not row.get("data")}
    if "strengths" in row:
        begun(driver, row)
        row["strengths"] = {k: float(f"{v:.6g}") for k, v in strengths(driver).items()}
    drawn = [v for k, v in starts[0][0].items() if "at" not in row["tensors"][k] and v.size > 8]
    if any(np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]):
        row["twins"] = True
    return row


def offered(driver, method) -> dict[str, list]:
    """Field of a method's config -> other values that it may take: both of a flag, all that are listed of a word, and
    another number."""
    kinds = typing.get_type_hints(driver.peft.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type])
    found: dict[str, list] = {}
    for field, value in store.configs()[method.name]["defaults"].items():
        if field in NOT_ASKED or field not in kinds:
            continue
        words = [w for kind in (kinds[field], *typing.get_args(kinds[field])) for w in typing.get_args(kind)
                 if typing.get_origin(kind) is typing.Literal]
        found[field] = [v for v in (*words, another(value)) if v is not None and v != value]
    return found


def by_options(driver, method, plain, known) -> Iterator[dict]:
    """Rows of single fields by which a new adapter's tensors differ, but for those that other rows are about."""
    for field, values in offered(driver, method).items():
        for value in values:
            if any(row["config"].get(field) == value for row in known):
                continue
            changes = {**{k: v for k, v in plain["config"].items() if k not in method.rows[0].config}, field: value}
            id = f"with-{field}-{value}".lower().replace("_", "-").replace(".", "-")
            try:
                row = row_of(driver, method, id, plain["base"], changes)
            except Exception:
                continue  # not for such a layer, or not alone
            if any(want.get("std", 0) > 1e3 for want in row["tensors"].values()):
                continue  # nothing is put there
            shapes = [{k: v["shape"] for k, v in r["tensors"].items()} for r in (row, plain)]
            if shapes[0] == shapes[1] and not alike(row, plain):
                yield {**row, "profile": "full"}


def alike(row, plain) -> bool:
    """Are the tensors of two rows described by the same numbers, as far as those of drawn tensors can tell?"""
    for name, want in plain["tensors"].items():
        got = row["tensors"][name]
        if ("at" in got) != ("at" in want) or ("rows" in got, "columns" in got) != ("rows" in want, "columns" in want):
            return False
        if "at" in got and not np.allclose(got["at"], want["at"], 1e-3, 1e-6):
            return False
        if "at" not in got and not np.isclose(got["std"], want["std"], 0.2):
            return False
    return True


def record(driver) -> list[dict]:
    found = []
    for method in (m for m in methods().values() if m.name != "xlora"):  # whose classifier the reference does not save
        first = method.rows[0]
        base = "wide" if first.base.startswith("mlp") else first.base
        rows = {"default": (base, {}), **MORE.get(method.name, {})}
        for kind, where in OF_KIND.items():
            like = next((r for r in method.rows if r.base == kind), None)
            if like and where not in (base for base, _ in rows.values()):
                targets = ["c_attn"] if kind == "gpt" else like.config["target_modules"]
                rows[f"on-{kind}"] = (where, {**like.config, "target_modules": targets})
        if method.name in KEYS:
            rows["key-zero"] = (base, {KEYS[method.name]: 0})  # a seed like any other
        if method.name in RANDOM:
            names = [f for f in store.configs()[method.name]["defaults"] if f.startswith("init_") and "weights" in f]
            rows["random"] = (base, dict.fromkeys(names, False))
        if method.name == "frod":  # what it takes from wide layers is ill-conditioned
            rows = {id: (SMALL.get(where, where), changes) for id, (where, changes) in rows.items()}
        for id, (where, changes) in rows.items():
            try:
                found.append(row_of(driver, method, id, where, changes))
            except Exception as e:
                print(f"left out, {method.name}/beginnings/{id}: {type(e).__name__}: {e}"[:250])
        own = [row for row in found if row["method"] == method.name]
        if own and method.name == method.peft_type.lower():
            found += by_options(driver, method, own[0], own)
    return found
