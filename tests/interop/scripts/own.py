"""Methods, variants and kinds of layers that are defined outside of minipeft."""

import pickle
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import minipeft
from minipeft.core.adapter import Delta
from minipeft.core.bases import Linear
from minipeft.core.config import PeftConfig, Positive
from minipeft.methods.lora.lora import LoRA, LoraConfig


def refused(kind, part, call):
    try:
        call()
    except kind as error:
        assert part in str(error), error
    else:
        raise AssertionError(f"not refused: {part}")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


x = torch.randn(5, 4)


# names: one's own, once more, and taken ones
def define(name):
    @dataclass
    class ShiftConfig(PeftConfig, method=name):
        r: Positive = 1
        target_modules: list[str] | str | None = None

    class Shift(Delta, config=ShiftConfig):
        prefix = "shift_"

        def build(self) -> None:
            self.shift_D = nn.Parameter(torch.zeros(self.base.shape))

        def delta(self) -> Tensor:
            return self.shift_D

    return ShiftConfig


define("SHIFT")
Config = define("SHIFT")  # a cell that is run again
assert minipeft.PeftType.SHIFT == "SHIFT"
assert type(minipeft.get_peft_config({"peft_type": "SHIFT"})) is Config
refused(minipeft.ConfigError, "'LORA' is that of minipeft.methods.lora", lambda: define("LORA"))
refused(minipeft.ConfigError, "'IA3' is that of minipeft.methods.ia3", lambda: define("IA3"))  # not imported yet
assert "LoraConfig" in repr(minipeft.LoraConfig()) and minipeft.IA3Config(feedforward_modules=[]).peft_type == "IA3"
refused(minipeft.ConfigError, "entry point", lambda: minipeft.get_peft_config({"peft_type": "NOBODYS"}))
model = minipeft.get_peft_model(network(), Config(target_modules=["0"]))
assert torch.equal(model(x), network()(x)) and type(model.base_model).__name__ == "ShiftModel"
assert minipeft.get_layer_status(model)[0].active_adapters == ["default"]


# a variant of LoRA: its own peft_type, and plain ones stay what they are
@dataclass
class LoudConfig(LoraConfig, method="LOUD"):
    loudness: float = 2.0


class Loud(LoRA, config=LoudConfig):
    def initial_scaling(self) -> float:
        return super().initial_scaling() * self.config.loudness


loud, plain = (minipeft.get_peft_model(network(), C(target_modules=["0"], init_lora_weights=False))
               for C in (LoudConfig, LoraConfig))
assert {type(a).__name__ for m in plain.modules() for a in getattr(m, "adapters", {}).values()} == {"LoRA"}
weights = minipeft.get_peft_model_state_dict(plain)
minipeft.set_peft_model_state_dict(loud, weights)
assert torch.allclose(loud(x) - network()(x), 2 * (plain(x) - network()(x)), atol=1e-5)
with tempfile.TemporaryDirectory() as folder:
    loud.save_pretrained(folder)
    again = minipeft.PeftModel.from_pretrained(network(), folder)
    assert torch.equal(again(x), loud(x)) and again.peft_config["default"].loudness == 2.0


@dataclass
class Unnamed(LoraConfig):
    more: int = 1


refused(TypeError, "peft_type of its own", lambda: type("Mine", (LoRA,), {}, config=Unnamed))
assert torch.equal(pickle.loads(pickle.dumps(plain))(x), plain(x))


# a kind of layer
class Scaled(nn.Module):
    """A linear layer of another make: its weight is stored ten times as large."""

    def __init__(self, inp, out):
        super().__init__()
        self.in_features, self.out_features = inp, out
        self.weight, self.bias = nn.Parameter(10 * torch.randn(out, inp)), None

    def forward(self, x):
        return x @ (self.weight / 10).T


net = lambda: (torch.manual_seed(0), nn.Sequential(Scaled(4, 6)))[1]
refused(minipeft.UnsupportedLayerError, "Scaled",
        lambda: minipeft.get_peft_model(net(), LoraConfig(target_modules=["0"])))


class ScaledBase(Linear, layer=Scaled):
    def read(self):
        W, b = super().read()
        return W / 10, b

    def write(self, W, b):
        super().write(10 * W, b)


for config in (LoraConfig(target_modules=["0"], init_lora_weights=False, use_dora=True),
               minipeft.OFTConfig(target_modules=["0"], oft_block_size=2, r=0),
               minipeft.IA3Config(target_modules=["0"], feedforward_modules=[])):
    model = minipeft.get_peft_model(net(), config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * parameter.requires_grad)
    y = model(x)
    before = model.state_dict()["base_model.model.0.base_layer.weight"].clone()
    model.merge_adapter()
    assert torch.allclose(model(x), y, atol=1e-5), type(config)
    model.unmerge_adapter()
    assert torch.equal(model.state_dict()["base_model.model.0.base_layer.weight"], before)
    assert type(model.unload()[0]) is Scaled
custom = LoraConfig()._register_custom_module
refused(minipeft.UnsupportedFeatureError, "layer=MyLayer", lambda: custom({Scaled: nn.Linear}))
print("fine")
