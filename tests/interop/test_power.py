"""The harness can fail: implementations with one fault each, made of peft, must be caught by the test that is meant to.

A fault is a change to the adapted model, to what is saved, or to what is run. Each is caught by calling the very test
function that the table runs.
"""

import json
import types

import pytest
import torch

from . import harness as H
from . import test_checkpoints, test_initial, test_merge, test_names, test_outputs, test_several
from .cases import CASES

CASE = {c.id: c for c in CASES}
LORA = CASE["lora/linear/plain"]


def layers(model):
    return [m for m in model.modules() if hasattr(m, "base_layer")]


class Faulty:
    """peft, with `fault(model)` done to every adapted model that it makes."""

    def __init__(self, ref, fault):
        self._ref, self._fault, self.__name__ = ref, fault, "faulty"
        outer = self

        class PeftModel:
            @staticmethod
            def from_pretrained(*args, **kwargs):
                return outer._broken(ref.PeftModel.from_pretrained(*args, **kwargs))

        self.PeftModel = PeftModel

    def __getattr__(self, name):
        return getattr(self._ref, name)

    def _broken(self, model):
        self._fault(model)
        return model

    def get_peft_model(self, *args, **kwargs):
        return self._broken(self._ref.get_peft_model(*args, **kwargs))


def scaled(factor):
    def fault(model):
        for layer in layers(model):
            layer.scaling = {k: v * factor for k, v in layer.scaling.items()}

    return fault


def no_bias(model):
    """Forget the bias of lora_B."""
    for layer in layers(model):
        layer.lora_B["default"].bias.register_hook(torch.zeros_like)
        forward = layer.lora_B["default"]
        forward.forward = types.MethodType(lambda self, x: torch.nn.functional.linear(x, self.weight), forward)


def merges_twice(model):
    for layer in layers(model):
        merge = layer.merge

        def twice(*args, merge=merge, layer=layer, **kwargs):
            merge(*args, **kwargs)
            layer.merged_adapters.clear()
            merge(*args, **kwargs)

        layer.merge = twice


def leaks_when_disabled(model):
    for layer in layers(model):
        layer.enable_adapters = lambda enabled: None


def another_dtype(model):
    layers(model)[0].lora_A["default"].half()


def another_name(model):
    layer = layers(model)[0]
    layer.lora_a = layer.lora_A
    del layer.lora_A


def one_more_buffer(model):
    layers(model)[0].register_buffer("cache", torch.zeros(1))


def trains_the_head(model):
    model.base_model.model.head.requires_grad_(True)


def detached(model):
    """The gradient of lora_A is lost."""
    for layer in layers(model):
        A = layer.lora_A["default"]
        A.forward = types.MethodType(lambda self, x: torch.nn.functional.linear(x, self.weight.detach()), A)


def half_gradient(model):
    for layer in layers(model):
        layer.lora_B["default"].weight.register_hook(lambda g: g * 0.5)


def unscaled_reading(model):
    """Merges with alpha in place of alpha / r; running is right."""
    for layer in layers(model):
        delta = layer.get_delta_weight
        layer.get_delta_weight = lambda name, delta=delta, layer=layer: delta(name) * layer.r[name]


def one_bit(model):
    """Running moves one weight by its last bit."""
    weight = layers(model)[0].base_layer.weight

    def nudge(*_):
        weight.data.view(-1)[0] = torch.nextafter(weight.data.view(-1)[0], torch.tensor(9.0, dtype=weight.dtype))

    model.register_forward_hook(nudge)


def not_the_identity(model):
    layers(model)[0].lora_B["default"].weight.data.fill_(1e-3)


def another_seed(model):
    layers(model)[0].lora_A["default"].weight.data.mul_(1 + 1e-7)


def first_adapter_only(model):
    """Mixed batches run with the first sample's adapter."""
    forward = model.forward

    def broken(*args, adapter_names=None, **kwargs):
        if adapter_names is None:
            return forward(*args, **kwargs)
        return forward(*args, adapter_names=[adapter_names[0]] * len(adapter_names), **kwargs)

    model.forward = broken


def switches_nothing(model):
    model.set_adapter = lambda name: None


def saves(change):
    """Change the files after they are saved."""

    def fault(model):
        save = model.save_pretrained

        def broken(path, **kwargs):
            from pathlib import Path

            from safetensors.torch import save_file

            save(path, **kwargs)
            path = Path(path)
            tensors, config = H.stored(path)
            change(tensors, config)
            save_file(tensors, path / "adapter_model.safetensors")
            (path / "adapter_config.json").write_text(json.dumps(config))

        model.save_pretrained = broken

    return fault


def _swap(tensors, config):
    square, wide = (f"base_model.model.{name}.lora_A.weight" for name in ("square", "wide"))  # of one shape
    tensors[square], tensors[wide] = tensors[wide].clone(), tensors[square].clone()


def _nudge(tensors, config):
    first = tensors[sorted(tensors)[0]].view(-1)
    first[0] = torch.nextafter(first[0], torch.tensor(9.0))


BOTH = "peft to us", "us to peft"
outputs = [lambda c, lib, ref, tmp: test_outputs.test_output(c, torch.float64, lib, ref)]
gradient = [lambda c, lib, ref, tmp: test_outputs.test_gradients(c, torch.float64, lib, ref)]
merging = [lambda c, lib, ref, tmp: test_merge.test_merged_weights(c, lib, ref, False)]
saving = [lambda c, lib, ref, tmp: test_names.test_saved_keys_and_config(c, lib, ref, tmp)]
reloading = [lambda c, lib, ref, tmp, d=d: test_checkpoints.test_from_pretrained(c, d, lib, ref, tmp / d) for d in BOTH]
names = [lambda c, lib, ref, tmp: test_names.test_live_names(c, lib, ref)]
FAULTS = {
    "alpha instead of alpha / r": (LORA, scaled(4), outputs + merging),
    "scaling off by one in a thousand": (LORA, scaled(1.001), outputs + merging),
    "scaling off by 1e-8": (LORA, scaled(1 + 1e-8), outputs),
    "rsLoRA ignored": (CASE["lora/linear/rslora"], scaled(0.5), outputs),
    "bias of lora_B dropped": (CASE["lora/linear/lora_bias"], no_bias, outputs),
    "merged twice": (LORA, merges_twice, merging),
    "merged with another scaling": (LORA, unscaled_reading, merging),
    "leaks when disabled": (LORA, leaks_when_disabled,
                            [lambda c, lib, ref, tmp: test_merge.test_disabled(c, lib, ref, False)]),
    "gradient lost": (LORA, detached, gradient),
    "gradient halved": (LORA, half_gradient, gradient),
    "another dtype": (LORA, another_dtype, names),
    "another name": (LORA, another_name, names),
    "one more buffer": (LORA, one_more_buffer, names),
    "trains the head": (LORA, trains_the_head,
                        [lambda c, lib, ref, tmp: test_names.test_trainable_set(c, lib, ref)]),
    "running moves one bit": (LORA, one_bit,
                              [lambda c, lib, ref, tmp: test_outputs.test_running_changes_no_tensor(c, lib, False)]),
    "a fresh adapter acts": (LORA, not_the_identity,
                             [lambda c, lib, ref, tmp: test_initial.test_fresh_adapter_is_the_identity(c, lib, False)]),
    "another initial value": (LORA, another_seed,
                              [lambda c, lib, ref, tmp: test_initial.test_values_at_equal_seed(c, lib, ref)]),
    "mixed batch runs one adapter": (LORA, first_adapter_only,
                                     [lambda c, lib, ref, tmp: test_several.test_mixed_batch(c, lib, ref, False)]),
    "set_adapter switches nothing": (LORA, switches_nothing,
                                     [lambda c, lib, ref, tmp: test_several.test_switching(c, lib, ref)]),
    "saves a wrong field": (LORA, saves(lambda t, c: c.update(lora_alpha=7)), saving),
    "saves a number as text": (LORA, saves(lambda t, c: c.update(lora_alpha="6")), saving),
    "saves one field more": (LORA, saves(lambda t, c: c.update(news=1)), saving),
    "saves one tensor less": (LORA, saves(lambda t, c: t.pop(sorted(t)[0])), saving),
    "saves another key": (LORA, saves(lambda t, c: t.update(a=t.pop(sorted(t)[0]))), saving),
    "saves half precision": (LORA, saves(lambda t, c: t.update({k: v.half() for k, v in t.items()})), saving),
    "saves two tensors swapped": (CASE["lora/linear/init_false"], saves(_swap), reloading[1:]),
    "saves one bit wrong": (LORA, saves(_nudge), reloading[:1]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, ref, tmp_path):
    case, change, tests = FAULTS[fault]
    for test in tests:
        H.MADE.clear()  # what the test of another file, or with another fault, has made of the case
        with pytest.raises(AssertionError):
            test(case, Faulty(ref, change), ref, tmp_path)


@pytest.mark.parametrize("tests", [outputs, gradient, merging, saving, reloading, names],
                         ids=["outputs", "gradient", "merging", "saving", "reloading", "names"])
def test_no_fault_is_not_caught(tests, ref, tmp_path):
    """The same scaffold around a sound implementation passes: it is the fault that is caught."""
    for test in tests:
        H.MADE.clear()
        test(LORA, Faulty(ref, lambda model: None), ref, tmp_path)
