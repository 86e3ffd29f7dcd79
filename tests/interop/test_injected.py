"""Adapters injected into a model itself, without a PeftModel around it: every method that peft injects."""

import copy

import pytest
import torch

from . import harness as H
from .cases import CASES

METHODS = {}
for _case in CASES:
    if not _case.prompt and (_case.method == "randlora" or "mlp" in _case.base.name):
        if _case.kwargs.get("bias", "none") == "none" and not _case.inputs:
            METHODS.setdefault(_case.id if _case.method == "randlora" else _case.method, _case)


def injected(module, case):
    H.seed(0)
    return module.inject_adapter_in_model(H.config(module, case), case.base.build()).eval()


@pytest.mark.parametrize("case", METHODS.values(), ids=METHODS)
def test_as_peft_does_it(case, lib, ref):
    """Equal outputs and keys, the state dict in both directions, a second adapter, and deletion."""
    try:
        theirs = injected(ref, case)
    except ValueError:  # its layers share tensors that are beside the model
        with pytest.raises(ValueError):
            injected(lib, case)
        return
    ours, batch = injected(lib, case), H.inputs(case)
    for model in (theirs, ours):
        H.move(model)
    want = H.run(theirs, batch)
    H.close(H.run(ours, batch), want, 2e-5)
    state = {module: module.get_peft_model_state_dict(model) for module, model in ((ref, theirs), (lib, ours))}
    state = {module: copy.deepcopy(tensors) for module, tensors in state.items()}
    H.same_names(state[lib], state[ref])
    for into, source in ((ref, lib), (lib, ref)):
        fresh = injected(into, case)
        into.set_peft_model_state_dict(fresh, state[source])
        H.close(H.run(fresh, batch), want, 2e-5)
    if case.second is None:
        return
    H.seed(1)
    lib.inject_adapter_in_model(H.config(lib, case, **case.second), ours, "other")
    other = H.run(H.move(ours, only=lambda n, p: p.requires_grad and "other" in n).eval(), batch)
    H.same_names(lib.get_peft_model_state_dict(ours), state[lib])
    lib.functional.set_adapter(ours, "default")
    H.close(H.run(ours, batch), want, 2e-5)
    lib.functional.set_adapter(ours, "other")
    lib.functional.delete_adapter(ours, "default", "")
    H.close(H.run(ours, batch), other, 1e-6)


@pytest.mark.parametrize("all_of_it", [True, False], ids=["function", "layer by layer"])
@pytest.mark.parametrize("method", ["lora", "loha", "ia3", "oft", "boft", "hra"])
def test_deleting_the_active_one_where_it_is_not_on_every_layer(method, all_of_it, lib):
    """The one that is left is active then on all layers, also on those that never had the deleted one."""
    case = METHODS[method]
    names = [name for name, layer in case.base.build().named_modules() if isinstance(layer, torch.nn.Linear)]
    alone = {"feedforward_modules": []} if method == "ia3" else {}
    model = case.base.build().eval()
    lib.inject_adapter_in_model(H.config(lib, case, target_modules=names[:1], **alone), model, "kept")
    want = H.run(H.move(model), H.inputs(case))
    lib.inject_adapter_in_model(H.config(lib, case, target_modules=names[1:2], **alone), model, "gone")
    H.move(model)
    if all_of_it:
        assert lib.functional.delete_adapter(model, "gone", "") == ["kept"]
    else:  # as diffusers does it
        for layer in model.modules():
            if hasattr(layer, "delete_adapter"):
                layer.delete_adapter("gone")
    H.close(H.run(model.eval(), H.inputs(case)), want, 1e-6)


def test_layers_that_disagree_about_what_they_share(lib, is_ref):
    if is_ref:
        pytest.skip("peft takes the values of each")
    case = METHODS["randlora/linear/plain"]
    model = injected(lib, case)
    state = {key: tensor.clone() for key, tensor in lib.get_peft_model_state_dict(model).items()}
    state["wide.randlora_A"] += 1
    before = H.snapshot(model)
    with pytest.raises(lib.CheckpointError, match=r"wide\.randlora_A"):
        lib.set_peft_model_state_dict(model, state)
    H.identical(H.snapshot(model), before)
