"""Kinds of layers that a method adapts here and not in peft: running is merging, also for two adapters."""

import copy

import pytest
import torch
from torch import nn

import minipeft


class Conv1D(nn.Module):
    """The linear layer of GPT-2, which stores its weight (in, out); known by its name."""

    def __init__(self, out: int, inp: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inp, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return x @ self.weight + self.bias


LAYERS = {  # kind -> (layer, input)
    "Conv1D": lambda: (Conv1D(6, 4), torch.randn(3, 4)),
    "Conv1D square": lambda: (Conv1D(6, 6), torch.randn(3, 6)),
    "Conv1d groups": lambda: (nn.Conv1d(4, 6, 3, groups=2), torch.randn(3, 4, 7)),
    "Conv2d groups": lambda: (nn.Conv2d(6, 6, (3, 2), groups=3, padding=1), torch.randn(3, 6, 5, 4)),
    "Conv3d": lambda: (nn.Conv3d(4, 6, (2, 3, 1)), torch.randn(2, 4, 4, 5, 3)),
    "Conv3d one": lambda: (nn.Conv3d(4, 6, 1, bias=False), torch.randn(2, 4, 2, 3, 2)),
    "Conv2d reflect": lambda: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 5, 5)),
    "Embedding": lambda: (nn.Embedding(10, 6), torch.randint(0, 10, (3, 4))),
}
LINEAR, CONVS = ["Conv1D", "Conv1D square"], ["Conv3d", "Conv3d one", "Conv2d reflect"]
GROUPS = ["Conv1d groups", "Conv2d groups"]
CASES = [  # config, kinds
    (minipeft.LoHaConfig(r=2), [*LINEAR, *CONVS, "Embedding"]),
    (minipeft.LoHaConfig(r=2, use_effective_conv2d=True), CONVS),
    (minipeft.LoKrConfig(r=1), [*LINEAR, *CONVS, "Embedding"]),
    (minipeft.LoKrConfig(r=4, decompose_both=True), ["Conv1D", *CONVS]),
    (minipeft.LoKrConfig(r=1, decompose_factor=1, use_effective_conv2d=True), CONVS),
    (minipeft.HiraConfig(r=2), GROUPS + CONVS),
    (minipeft.MissConfig(r=3), LINEAR),
    (minipeft.MissConfig(r=2, init_weights="mini", mini_r=3), LINEAR),
    (minipeft.MissConfig(r=2, init_weights="bat"), LINEAR),
    (minipeft.DeloraConfig(r=2), LINEAR),
    (minipeft.GloraConfig(r=2), LINEAR),
    (minipeft.GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector"), LINEAR),
    (minipeft.BeftConfig(), [*LINEAR, "Conv1d groups", "Conv2d groups", "Conv3d", "Conv2d reflect"]),
    (minipeft.RoadConfig(variant="road_4", group_size=2), [*LINEAR, *GROUPS, *CONVS]),
    (minipeft.HRAConfig(r=2), [*LINEAR, *CONVS]),
    (minipeft.HRAConfig(r=3, apply_GS=True, init_weights=False), ["Conv1D", "Conv3d"]),
    (minipeft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2), ["Conv3d one", "Conv2d reflect"]),
    (minipeft.BOFTConfig(boft_block_size=2), [*LINEAR, *CONVS]),
    (minipeft.ShiraConfig(r=1), LINEAR),
    (minipeft.FourierFTConfig(n_frequency=7), LINEAR),
    (minipeft.WaveFTConfig(n_frequency=24, wavelet_family="sym11", scaling=500.0), LINEAR),
    (minipeft.WaveFTConfig(n_frequency=24, wavelet_family="coif5", scaling=500.0), LINEAR),
    (minipeft.C3AConfig(block_size=2), LINEAR),
    (minipeft.AdamssConfig(r=3, num_subspaces=2, subspace_rank=2), LINEAR),
    (minipeft.SupertuningConfig(sparsity=0.7, r=2), LINEAR),
]


def adapted(config, kind):
    """A model of one layer with two moved adapters, in float64, and its input."""
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    model = nn.Sequential(layer).double()
    x = x.double() if x.is_floating_point() else x
    config.target_modules = {"0"}
    model = minipeft.get_peft_model(model, copy.deepcopy(config))
    model.add_adapter("other", copy.deepcopy(config))
    for name, p in model.named_parameters():
        if ".default" in name or ".other" in name:
            p.data += 0.3 * torch.randn_like(p)
    return model.eval(), x


@pytest.mark.parametrize(
    "config, kind",
    [pytest.param(c, k, id=f"{c.peft_type.value}-{i}-{k}") for i, (c, kinds) in enumerate(CASES) for k in kinds],
)
def test_running_is_merging(config, kind):
    model, x = adapted(config, kind)
    with model.disable_adapter():
        plain = model(x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    outputs = []
    for names in (["default"], ["default", "other"]):
        model.base_model.set_adapter(names)
        y = model(x)
        assert not torch.allclose(y, outputs[-1] if outputs else plain, atol=1e-3)
        model.merge_adapter()
        assert torch.allclose(model(x), y, rtol=0, atol=1e-12 * y.abs().max().item())
        model.unmerge_adapter()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        outputs.append(y)
    outputs[0].square().sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if ".default" in n]
    assert all(g is not None and g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("kind", ["Conv3d", "Embedding", "Conv1D"])
def test_checkpoint_of_a_further_kind(kind, tmp_path):
    model, x = adapted(minipeft.LoKrConfig(r=1), kind)
    base = copy.deepcopy(model.get_base_model())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    plain = nn.Sequential(base[0].base_layer)
    again = minipeft.PeftModel.from_pretrained(plain, tmp_path)
    assert torch.allclose(again(x), model(x), rtol=0, atol=1e-12)


def test_hira_rank_pattern_counts_for_the_first_adapter():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model = minipeft.get_peft_model(net, minipeft.HiraConfig(r=5, target_modules=["0", "1"], rank_pattern={"1": 2}))
    layers = model.get_base_model()
    assert layers[0].hira_A["default"].shape == (5, 4) and layers[1].hira_A["default"].shape == (2, 6)
