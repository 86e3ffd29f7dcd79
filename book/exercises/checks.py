"""What an answer to each exercise must do. A check is given the module with the answer."""

import copy
import tempfile
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import minipeft


def like(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def network(inputs: int = 16, outputs: int = 16) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs))


def filled(model: Any, values: dict[str, Tensor]) -> Any:
    """The model, with these values in the parameters whose names contain the keys."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for slot, value in values.items():
                if slot in name:
                    parameter.copy_(value.view_as(parameter))
    return model


def rslora(answer: Any) -> None:
    """The outputs are minipeft's with `use_rslora`, at several ranks."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    for r in (1, 4, 16):
        ours = answer.RsLoraLinear(network()[0], r, 8)
        nn.init.normal_(ours.B)
        config = minipeft.LoraConfig(r=r, lora_alpha=8, use_rslora=True, target_modules=["0"])
        theirs = filled(minipeft.get_peft_model(network(), config), {"lora_A": ours.A, "lora_B": ours.B})
        assert like(ours(x), theirs(x)), f"With r={r} the outputs differ from those of use_rslora=True."


def ia3_merge(answer: Any) -> None:
    """The merged layer answers as the running one, with its gains behind and before it."""
    base = network(12, 16)[0]
    x = torch.randn(5, 12)
    for feedforward, size in ((False, 16), (True, 12)):
        gain = 1 + 0.3 * torch.randn(size)
        running = base(gain * x) if feedforward else gain * base(x)
        W, b = answer.merged(base.weight, base.bias, gain, feedforward)
        assert W.shape == base.weight.shape and b.shape == base.bias.shape, "Wrong shapes."
        assert like(nn.functional.linear(x, W, b), running), f"Wrong outputs with feedforward={feedforward}."


def fault(answer: Any) -> None:
    """Its weight is that of minipeft's DoRA, where no shape tells rows from columns and where it does."""
    for inputs, outputs in ((16, 16), (12, 16)):
        base = network(inputs, outputs)
        A, B, W = torch.randn(4, inputs), torch.randn(outputs, 4), base[0].weight.detach()
        m = answer.start(W)
        assert m.shape == (outputs,), f"{tuple(m.shape)} magnitudes, not one for each of {outputs} outputs."
        assert like(answer.weight(W, A, 0 * B, m, 2.0), W), "A new adapter changes the weight."
        config = minipeft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"])
        model = filled(minipeft.get_peft_model(copy.deepcopy(base), config), {"lora_A": A, "lora_B": B})
        theirs = model.merge_and_unload()[0].weight
        assert like(answer.weight(W, A, B, m, 2.0), theirs), f"From {inputs} to {outputs} the weight is not DoRA's."


def add_method(answer: ModuleType) -> None:
    """It runs as it should, trains its own parameters alone, obeys the law, unmerges exactly, saves and loads."""
    x = torch.randn(5, 12)
    make: Any = lambda: minipeft.get_peft_model(network(12, 16), answer.GainShiftConfig(target_modules=["0"]))
    model = make()
    assert torch.equal(model(x), network(12, 16)(x)), "A new adapter changes the output."
    assert model.get_nb_trainable_parameters()[0] == 12 + 16, "It should train in + out numbers."
    g, s = 1 + 0.3 * torch.randn(12), torch.randn(16)
    filled(model, {"gainshift_g": g, "gainshift_s": s})
    running, base = model(x), network(12, 16)[0]
    assert like(running, base(g * x) + s), "Wrong outputs."
    model.merge_adapter()
    assert like(model(x), running), "Running and merged differ."
    model.unmerge_adapter()
    assert torch.equal(model.unload()[0].weight, base.weight), "Unmerging changed the frozen weight."
    model = filled(make(), {"gainshift_g": g, "gainshift_s": s})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = minipeft.PeftModel.from_pretrained(network(12, 16), folder)
        assert like(again(x), running), "Saved and loaded it differs."


CHECKS = {"rslora": rslora, "ia3_merge": ia3_merge, "fault": fault, "add_method": add_method}
