"""What the laws of training stand on."""

import inspect

import numpy as np
import pytest

from conformance.reference import dropout, numpy_model, store
from conformance.reference.method import slots
from conformance.reference.methods import methods
from conformance.run.checks import states

UNCHECKED = {  # a rate of the reference's configs that no law looks at: why
    "encoder_dropout": "of the LSTM of p-tuning alone, of which there are no cases",
    "pvera_dropout": "PVeRA draws in training in any case",
    "shadow_dropout": "told by the law of training: outputs differ, and do not without it",
    "xlora_dropout_p": "told by the law of training: outputs differ, and do not without it",
}


def test_every_rate_of_the_reference_is_checked_or_listed():
    peft = pytest.importorskip("peft")
    configs = {c for c in vars(peft).values() if inspect.isclass(c) and issubclass(c, peft.PeftConfig)}
    rates = {field for c in configs for field in vars(c)["__dataclass_fields__"] if "dropout" in field}
    assert {"lora_dropout", "rank_dropout"} <= rates
    assert rates - {d.rate for d in dropout.DROPOUTS} - set(UNCHECKED) - {"rank_dropout_scale"} == set()


@pytest.mark.parametrize("d", [d for d in dropout.DROPOUTS if d.drops == "input"], ids=lambda d: d.method)
def test_on_average_nothing_is_dropped(d):
    """Over all choices, each as likely as it is, the output is that without dropout."""
    case = next(c for c in store.packs()[d.method].cases if "linear/plain" in c.id or "linear/supra" in c.id)
    config = {**case.config, **{k: v for k, v in d.more.items() if k in case.config}, d.rate: 0.25}
    path = case.targets[0]
    site, t = numpy_model.sites(case.base, case.tensors("base"))[path], slots(case.tensors("adapter"), path)
    t |= {k: v for k, v in case.tensors("adapter").items() if methods()[d.method].tensors.shared}
    if d.undropped and d.undropped not in t:
        pytest.skip("a case without the part that is dropped")
    x = np.random.default_rng(0).normal(size=(2, site.inp))
    kept = dropout.choices(d, site, t, 0.25, x)
    odds = 0.75 ** kept.sum(1) * 0.25 ** (1 - kept).sum(1)
    formula = methods()[d.method].formula
    mean = sum(p * dropout.output(d, formula, site, t, config, x, keep) for p, keep in zip(odds, kept))
    assert np.allclose(mean, numpy_model.affine(x, *formula(site, t, config)))


def test_states_hold_every_case_that_has_them():
    recorded = store.states()
    wanted = {c.id for c in store.all_cases() if states.worth_recording(c, methods()[c.pack.data["method"]])}
    assert wanted == set(recorded["cases"]) | set(recorded["left_out"]), "run python -m conformance record --new"
    assert len(recorded["left_out"]) <= 1


def test_what_is_trained_follows_from_what_is_active():
    """The same adapters, the same ones active and on: the same is trained, in whatever way that was come to."""
    for case, recorded in store.states()["cases"].items():
        seen: dict = {}
        for what, active, names, trained in recorded["steps"]:
            off = what.startswith("disable") or what == "enable once"
            assert seen.setdefault((off, *active, names), trained) == trained, f"{case}: {what}"
