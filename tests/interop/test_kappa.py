"""Targets by condition number: those of peft, on linear layers and on stacked experts."""

import pytest
import torch
from torch import nn

from minipeft.compat.kappa import condition_number


class Net(nn.Module):
    """Linear layers and experts whose condition numbers are random, far apart and known."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, n) for n in (8, 5, 12, 9, 8, 6, 20))
        self.conv, self.embed = nn.Conv1d(4, 4, 3), nn.Embedding(7, 8)
        self.experts = nn.ModuleList(nn.Module() for _ in range(3))
        for layer in self.layers:
            layer.weight.data = self.conditioned(g, *layer.weight.shape)
        for module in self.experts:
            for name in ("gate_up_proj", "down_proj", "other_proj"):
                module.register_parameter(name, nn.Parameter(torch.stack([self.conditioned(g, 6, 4)] * 2)))

    def conditioned(self, g, rows, columns):
        W = torch.randn(rows, columns, generator=g)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U * torch.logspace(0, -3 * torch.rand(1, generator=g).item(), len(S)) @ Vh


OPTIONS = [{}, {"top_p": 1.0}, {"top_p": 0.01}, {"top_p": 0.5, "max_dim_size_to_analyze": 10},
           {"top_p": 0.7, "moe_param_suffixes": (".other_proj",)}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_targets(options, lib, ref):
    got = lib.find_kappa_target_modules(Net(), show_progress=False, **options)
    assert got == ref.find_kappa_target_modules(Net(), show_progress=False, **options)
    assert got["target_modules"] and got["target_parameters"]


def test_without_experts(lib, ref):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    got = lib.find_kappa_target_modules(net, top_p=1.0, show_progress=False)
    assert got == ref.find_kappa_target_modules(net, top_p=1.0, show_progress=False)
    assert got["target_parameters"] is None and len(got["target_modules"]) == 2


def test_targets_are_taken_by_a_configuration(lib):
    found = lib.find_kappa_target_modules(Net(), top_p=0.5, show_progress=False)
    model = lib.get_peft_model(Net(), lib.LoraConfig(**found))
    assert model.targeted_module_names and set(model.targeted_module_names) == set(found["target_modules"])
    assert set(model.targeted_parameter_names) == set(found["target_parameters"])


def test_condition_number():
    W = torch.diag(torch.tensor([4.0, -2.0, 1.0]))
    assert condition_number(W) == pytest.approx(4.0, rel=1e-6)
    assert condition_number(torch.stack([W, torch.eye(3)])) == pytest.approx(2.5, rel=1e-6)


@pytest.mark.bnb
def test_quantised_layers(lib, ref):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = nn.Sequential(*(bnb.nn.Linear4bit(64, 64, quant_type="nf4") for _ in range(5))).to("cpu")
    got = lib.find_kappa_target_modules(net, top_p=0.6, show_progress=False)
    assert got == ref.find_kappa_target_modules(net, top_p=0.6, show_progress=False)


@pytest.mark.parametrize("top_p", [0, -0.1, 1.5])
def test_shares_that_cannot_be(top_p, lib, is_ref):
    if is_ref:
        pytest.skip("peft takes them")
    with pytest.raises(ValueError, match="top_p"):
        lib.find_kappa_target_modules(Net(), top_p=top_p)
