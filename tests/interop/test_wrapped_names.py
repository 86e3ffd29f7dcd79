"""What torch wraps around modules (compile, checkpointing, FSDP, DataParallel) means nothing to names: saved keys never
hold it, loaded keys may, and targets are found as if it were not there. A module that is called `module` is one."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from . import harness as H
from .cases import CASES, each_case
from .cases.case import Case

ONE_OF_EACH = [next(c for c in CASES if c.method == m) for m in dict.fromkeys(c.method for c in CASES)]
each_method = each_case(lambda c: c in ONE_OF_EACH)
WRAPPERS = {
    "checkpoint": checkpoint_wrapper,
    "parallel": nn.DataParallel,
    "compile": lambda module: torch.compile(module, backend="eager"),
}
SEGMENTS = "_orig_mod._fsdp_wrapped_module.module._checkpoint_wrapped_module."


@pytest.fixture(autouse=True)
def _not_for_peft(is_ref):
    if is_ref:
        pytest.skip("a promise of the module under test alone")


def wrapped(base, wrap, leaves):
    """`base` with a wrapper around each module without children, or around each other one that is not the root's."""
    for parent in list(base.modules()):
        for name, child in parent.named_children():
            listed = parent is base or isinstance(child, (nn.ModuleList, nn.ModuleDict))
            meant = not child._modules if leaves else child._modules and not listed
            if meant and next(child.parameters(), None) is not None:
                parent._modules[name] = wrap(child)
    return base


def state(lib, model):
    return {k: v.clone() for k, v in lib.get_peft_model_state_dict(model).items()}


@each_method
def test_keys_of_wrapped_modules_are_loaded(lib, case: Case, tmp_path):
    model = H.move(H.adapt(lib, case)).eval()
    out = H.run(model, H.inputs(case))
    want, _ = H.saved(model, tmp_path)
    cut = {key: max(key.rfind(".", 0, key.rfind(".")), 0) for key in want}
    keys = {key: f"module.{key[:at]}{'.' * (at > 0)}{SEGMENTS}{key[at:]}".replace("..", ".") for key, at in cut.items()}
    changed = {keys[key] if "." in key else f"module.{key}": tensor for key, tensor in want.items()}
    save_file(changed, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    loaded = lib.PeftModel.from_pretrained(case.base.build(), tmp_path)
    H.identical(state(lib, loaded), want)
    H.close(H.run(loaded, H.inputs(case)), out, 1e-5)


@each_method
@pytest.mark.parametrize("wrapper, leaves", [(w, True) for w in WRAPPERS] + [("checkpoint", False)])
def test_wrapped_modules_are_adapted_under_their_own_names(lib, case: Case, wrapper, leaves, tmp_path):
    if wrapper == "parallel" and case.method == "adaption_prompt":
        pytest.skip("it reads the attention's weights, which DataParallel does not hand on")
    theirs = H.move(H.adapt(lib, case)).eval()
    out = H.run(theirs, H.inputs(case))
    want, _ = H.saved(theirs, tmp_path)
    base = wrapped(case.base.build(), WRAPPERS[wrapper], leaves)
    ours = H.adapt(lib, case, base=base)
    assert state(lib, ours).keys() == want.keys()
    base = wrapped(case.base.build(), WRAPPERS[wrapper], leaves)
    loaded = lib.PeftModel.from_pretrained(base, tmp_path)
    H.identical(state(lib, loaded), want)
    H.close(H.run(loaded, H.inputs(case)), out, 1e-5)


class Inner(nn.Module):
    """A model whose one child is called `module`, as in a DistributedDataParallel, and one of no name like that."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Linear(6, 10), nn.ReLU())
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(self.module(x))


@pytest.mark.parametrize("outer", [lambda net: nn.Sequential(net), lambda net: net], ids=["inside", "outermost"])
def test_a_module_called_module_is_one(lib, outer, tmp_path):
    def net():
        torch.manual_seed(0)
        return outer(Inner())

    config = lib.LoraConfig(r=2, target_modules=["module.0"], modules_to_save=["head"], init_lora_weights=False)
    model = lib.get_peft_model(net(), config)
    tensors, _ = H.saved(model, tmp_path)
    assert any(".module.0.lora_A.weight" in key for key in tensors)
    x = torch.randn(3, 6)
    for change in (lambda key: key, lambda key: key.replace(".module.", "."), lambda key: f"module.{key}"):
        changed = {change(key): tensor for key, tensor in tensors.items()}
        save_file(changed, tmp_path / "adapter_model.safetensors", {"format": "pt"})
        loaded = lib.PeftModel.from_pretrained(net(), tmp_path)
        H.identical(state(lib, loaded), tensors)
        torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_injected_by_keys_of_wrapped_modules(lib, wrapper):
    """`inject_adapter_in_model` and `state_dict=`, which transformers, diffusers and FSDP's users call."""
    config = lib.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    plain = lib.inject_adapter_in_model(config, Inner())
    tensors = lib.get_peft_model_state_dict(plain)
    keys = {f"module._orig_mod.{key}": tensor for key, tensor in tensors.items()}
    model = lib.inject_adapter_in_model(config, wrapped(Inner(), WRAPPERS[wrapper], True), state_dict=keys)
    lib.set_peft_model_state_dict(model, keys)
    H.identical(state(lib, model), tensors)
    live = {key.replace("head.", "module._checkpoint_wrapped_module.head."): t for key, t in model.state_dict().items()}
    H.identical(lib.get_peft_model_state_dict(model, state_dict={**model.state_dict(), **live}), tensors)


@each_method
def test_from_the_state_dict_of_the_model(lib, case: Case):
    """As Trainer saves under FSDP and DeepSpeed; some of what a checkpoint needs, a state dict does not have."""
    model = H.adapt(lib, case)
    H.identical(lib.get_peft_model_state_dict(model, state_dict=model.state_dict()), state(lib, model))


@each_method
def test_two_keys_of_one_tensor_are_refused(lib, case: Case, tmp_path):
    model = H.adapt(lib, case)
    tensors, _ = H.saved(model, tmp_path)
    key = sorted(tensors)[0]
    tensors[f"_orig_mod.{key}"] = tensors[key] + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(lib.PeftError, match="same tensor"):
        lib.PeftModel.from_pretrained(case.base.build(), tmp_path)
