"""Every method on every kind of layer: what it cannot adapt it refuses when it is added, and what it takes runs."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from minipeft.core.adapter import Adapter, adapter_class
from minipeft.core.errors import MergeError, PeftError

from . import bases as B
from . import harness as H
from .cases import CASES

TARGETS = {
    B.MLP: "wide", B.HF_CONV1D: "wide", B.EMBEDDING: "emb", B.ATTENTION: "attn", B.ATTENTION_NO_BIAS: "attn",
    B.CONV1D: "same", B.CONV2D: "same", B.CONV3D: "same", B.CONV1D_GROUPS: "same", B.CONV2D_GROUPS: "same",
    B.CONV3D_GROUPS: "same", B.NORMS: "ln",
}
# fields that speak of the model that a case is made for
OF_THE_MODEL = {"target_modules", "target_parameters", "modules_to_save", "feedforward_modules", "rank_pattern",
                "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules", "trainable_token_indices",
                "bias", "task_type"}


def one_of_each_method():
    """A case of each class of adapters that are aimed at layers."""
    import minipeft

    found = {}
    for case in CASES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = H.config(minipeft, case)
        cls = adapter_class(config)
        if cls is not Adapter and "Block" not in cls.bases:
            found.setdefault(cls, case)
    return list(found.values())


METHODS = one_of_each_method()


@pytest.mark.parametrize("base", TARGETS, ids=lambda base: base.name)
@pytest.mark.parametrize("case", METHODS, ids=[case.id for case in METHODS])
def test_taken_or_refused(case, base, lib, is_ref):
    if is_ref:
        pytest.skip("peft takes some that it cannot run")
    kwargs = {key: value for key, value in case.kwargs.items() if key not in OF_THE_MODEL}
    if "feedforward_modules" in case.kwargs:
        kwargs["feedforward_modules"] = []
    case = dataclasses.replace(case, base=base, kwargs={**kwargs, "target_modules": [TARGETS[base]]})
    model = case.base.build()
    before = H.snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = H.config(lib, case)
            adapted = H.move(lib.get_peft_model(model, config)).eval()
        except PeftError as error:
            assert TARGETS[base] in str(error)
            H.identical(H.snapshot(model), before)
            return
        batch = H.inputs(case)
        running = H.run(adapted, batch)
        H.gradients(adapted, batch)
        try:
            adapted.merge_adapter()
        except MergeError:
            return
    H.close(H.run(adapted, batch), running, 1e-4)


class Linear(nn.Module):
    """None of torch's, by the name alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize("case", METHODS, ids=[case.id for case in METHODS])
def test_another_class_of_a_known_name_is_called_by_its_whole_name(case, lib, is_ref):
    """As torch's and other libraries' quantised layers have."""
    if is_ref or "Linear" not in adapter_class(H.config(lib, case)).bases:
        pytest.skip("does not say which kinds it adapts, or not that one")
    kwargs = {key: value for key, value in case.kwargs.items() if key not in OF_THE_MODEL}
    if "feedforward_modules" in case.kwargs:
        kwargs["feedforward_modules"] = []
    model = nn.Sequential(nn.Linear(8, 8), Linear())
    with pytest.raises(lib.UnsupportedLayerError, match=rf"cannot adapt '1', a {__name__}\.Linear\. It adapts"):
        lib.get_peft_model(model, getattr(lib, case.config)(**{**kwargs, "target_modules": ["1"]}))
