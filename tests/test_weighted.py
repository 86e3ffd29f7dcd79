"""add_weighted_adapter: peft's numbers where peft is right, and laws where it is not."""

import copy
import re

import pytest
import torch
from torch import nn

import minipeft
from minipeft.core.errors import PeftError
from minipeft.methods.lora import merging

FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
SVD = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
TYPES = [*FACTORS, *SVD, "cat"]


class Net(nn.Module):
    """One layer of each kind that LoRA adapts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.wide, self.thin = nn.Linear(6, 9), nn.Linear(9, 4)
        self.conv, self.point = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.line, self.cube = nn.Conv1d(4, 6, 3, padding=1), nn.Conv3d(6, 4, (1, 3, 1))
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(5, 5)}) for _ in range(2)])

    def forward(self, x):
        y = self.thin(torch.tanh(self.wide(self.embed(x))))  # (n, 5, 4)
        y = self.point(torch.tanh(self.conv(y.mT.unsqueeze(2))))  # (n, 4, 1, 5)
        y = self.line(y.squeeze(2))  # (n, 6, 5)
        y = self.cube(y[:, :, None, :, None]).flatten(2)  # (n, 4, 3)
        return self.layers[1]["q"](torch.tanh(self.layers[0]["q"](torch.cat([y, y], 2)[..., :5])))


X = torch.arange(10).view(2, 5)
PEFTS = ["embed", "wide", "thin", "conv", "point"]  # the kinds on which peft's own numbers are right


def adapted(lib, *configs, net=None, seed=0):
    """A model with the adapters "one", "two", ... of these fields, all of them moved away from zero."""
    torch.manual_seed(seed)
    net = Net() if net is None else net
    for name, fields in zip(("one", "two", "three"), configs):
        config = lib.LoraConfig(**{"target_modules": PEFTS, "r": 4, "lora_alpha": 6, **fields})
        if name == "one":
            model = lib.get_peft_model(net, config, name)
        else:
            model.add_adapter(name, config)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            p.data = torch.randn(p.shape)
    return model.eval()


def layers(model):
    modules = model.base_model.model.named_modules()
    return {k: m for k, m in modules if hasattr(m, "base_layer") and hasattr(m, "scaling")}


def factors(layer, name):
    """(A, B) of an adapter on a layer of either implementation, as matrices, or None when it is not there."""
    for A, B in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if name in getattr(layer, A, {}):
            factors = getattr(layer, A)[name], getattr(layer, B)[name]
            return [(f.weight if isinstance(f, nn.Module) else f).data.flatten(1) for f in factors]
    return None


def delta(layer, name):
    """s B A of an adapter, and beside it s b for the bias of B; 0 when it is not there."""
    if (found := factors(layer, name)) is None:
        return torch.zeros(1, 1)
    A, B = found
    b = layer.lora_B[name].bias.data[:, None] if layer.lora_bias[name] else torch.zeros(len(B), 1, dtype=B.dtype)
    return layer.scaling[name] * torch.cat([B @ A, b], 1)


def pair(*configs, net=None):
    """peft's and our model with equal values."""
    peft = pytest.importorskip("peft", reason="peft is not installed: there is nothing to compare with")
    theirs = adapted(peft, *configs, net=None if net is None else net())
    ours = adapted(minipeft, *configs, net=None if net is None else net())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * max(float(want.abs().max()), 1e-3))


def compare(theirs, ours, kind):
    for (path, mine), (theirs_path, other) in zip(layers(ours).items(), layers(theirs).items()):
        assert path == theirs_path
        assert mine.scaling["new"] == other.scaling["new"] == 1
        if kind in SVD:  # singular vectors are defined up to their sign
            close(delta(mine, "new"), delta(other, "new"), 1e-4)
            assert [t.shape for t in factors(mine, "new")] == [t.shape for t in factors(other, "new")]
        else:
            for got, want in zip(factors(mine, "new"), factors(other, "new")):
                close(got, want)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_as_peft(kind, sign):
    theirs, ours = pair({}, {"lora_alpha": 3}, {"use_rslora": True})
    for model in (theirs, ours):
        torch.manual_seed(5)
        model.add_weighted_adapter(
            ["one", "two", "three"], [0.7, 1.2, 0.4], "new", kind, density=0.6, majority_sign_method=sign, svd_rank=3
        )
    compare(theirs, ours, kind)
    assert torch.equal(torch.rand(3), (torch.manual_seed(5), ours.delete_adapter("new"), again(ours, kind, sign))[-1])


def again(model, kind, sign):
    """What the generator gives after combining once more, for equal draws."""
    model.add_weighted_adapter(
        ["one", "two", "three"], [0.7, 1.2, 0.4], "new", kind, density=0.6, majority_sign_method=sign, svd_rank=3
    )
    return torch.rand(3)


@pytest.mark.parametrize("kind", ["linear", "dare_linear", "magnitude_prune", "svd", "dare_linear_svd", "cat"])
def test_as_peft_with_negative_weights(kind):
    theirs, ours = pair({}, {"lora_alpha": 3})
    for model in (theirs, ours):
        torch.manual_seed(5)
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "new", kind, density=0.6)
    compare(theirs, ours, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_as_peft_on_transformers_conv1d(kind):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    theirs, ours = pair(
        {"target_modules": ["0"], "fan_in_fan_out": True},
        {"target_modules": ["0"], "fan_in_fan_out": True},
        net=lambda: nn.Sequential(Conv1D(7, 5)),
    )
    for model in (theirs, ours):
        torch.manual_seed(5)
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "new", kind, density=0.6)
    compare(theirs, ours, kind)


@pytest.mark.parametrize("clamp", [0.9, 0.99])
@pytest.mark.parametrize("whole", [True, False])
def test_clamp_as_peft(clamp, whole):
    theirs, ours = pair({}, {})
    for model in (theirs, ours):
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "new", svd_clamp=clamp, svd_full_matrices=whole)
    compare(theirs, ours, "svd")


def test_configuration_as_peft(tmp_path):
    theirs, ours = pair({"lora_dropout": 0.1}, {"target_modules": ["wide"], "r": 6})
    for model in (theirs, ours):
        model.add_weighted_adapter(["one", "two"], [1, 1], "new", "cat")
    mine, other = (m.peft_config["new"].to_dict() for m in (ours, theirs))
    assert {k: mine[k] for k in other if k in mine} == {k: other[k] for k in mine if k in other}


@pytest.mark.parametrize("name", ["task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_as_peft(name, density, dtype):
    utils = pytest.importorskip("peft.utils.merge_utils")
    tensors, weights = [torch.randn(3, 4, dtype=dtype) for _ in range(3)], torch.tensor([0.5, -1.5, 2.0])
    options = [] if name == "task_arithmetic" else [density]
    if density == 0 and "dare" in name:
        with pytest.raises(PeftError):
            getattr(merging, name)(tensors, weights, density)
        return
    for method in ["total", "frequency"] if "ties" in name else [None]:
        got, want = [], []
        for module, into in ((merging, got), (utils, want)):
            torch.manual_seed(3)
            more = [] if method is None else [method]
            into.append(getattr(module, name)(list(tensors), weights, *options, *more))
        assert torch.equal(got[0], want[0]) and got[0].dtype == want[0].dtype


def test_helper_functions_as_peft():
    utils = pytest.importorskip("peft.utils.merge_utils")
    t = torch.randn(4, 5, 6)
    mask = utils.calculate_majority_sign_mask(t, "frequency")
    assert torch.equal(merging.calculate_majority_sign_mask(t, "frequency"), mask)
    assert torch.equal(merging.disjoint_merge(t, mask), utils.disjoint_merge(t, mask))
    assert torch.equal(merging.magnitude_based_pruning(t, 0.37), utils.magnitude_based_pruning(t, 0.37))
    assert merging.reshape_weight_task_tensors(t, torch.ones(4)).shape == (4, 1, 1)
    for bad in ({"density": -0.1, "method": "magnitude"}, {"density": 0.5, "method": "best"}):
        with pytest.raises(ValueError):
            merging.prune(t, **bad)


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["wide", "thin", "conv", "point", "line", "cube"]},
    "rank_pattern": {"rank_pattern": {"wide": 2, "conv": 6}},
    "alpha_pattern": {"alpha_pattern": {"thin": 1, "embed": 9}, "use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": ["wide", "thin"]},
    "all_kinds": {"target_modules": [*PEFTS, "line", "cube"]},
    "some_layers": {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["thin"]},
    "negative_alpha": {"lora_alpha": -2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["svd", "linear", "cat", "ties"])
def test_one_adapter_with_weight_one_is_itself(variant, kind, tmp_path):
    """And is so after saving and loading, in peft too."""
    model = adapted(minipeft, VARIANTS[variant])
    with torch.no_grad():
        want = model(X)
    model.add_weighted_adapter(["one"], [1.0], "new", kind)
    model.set_adapter("new")
    assert {layer.scaling["new"] for layer in layers(model).values()} == {1}
    with torch.no_grad():
        close(model(X), want)
    model.save_pretrained(str(tmp_path), selected_adapters=["new"], save_embedding_layers=False)
    base = copy.deepcopy(model).unload()
    with torch.no_grad():
        close(minipeft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new")(X), want)
    try:
        import peft
    except ImportError:
        return
    with torch.no_grad():
        close(peft.PeftModel.from_pretrained(base, tmp_path / "new").eval()(X), want)


PAIRS = {
    "ranks": ({}, {"r": 7, "lora_alpha": 5}),
    "rslora_and_not": ({"use_rslora": True}, {"use_rslora": False}),
    "patterns": ({"rank_pattern": {"wide": 2}}, {"alpha_pattern": {"wide": 3}, "r": 3}),
    "bias_and_not": (VARIANTS["lora_bias"], {"target_modules": ["wide"]}),
    "no_bias_then_bias": ({"target_modules": ["wide", "cube"]}, VARIANTS["lora_bias"]),
    "other_layers": (VARIANTS["some_layers"], {**VARIANTS["some_layers"], "layers_to_transform": [0]}),
    "set_and_regex": ({}, {"target_modules": r"layers\.\d\.q|line"}),
    "regexes": ({"target_modules": "wide|thin"}, {"target_modules": r".*cube"}),
    "excluded": (VARIANTS["excluded"], {"target_modules": ["embed"]}),
    "all_kinds": (VARIANTS["all_kinds"], VARIANTS["all_kinds"]),
}


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.5, -0.8], [-1, 0]])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_types_give_the_weighted_sum(case, weights, kind):
    model = adapted(minipeft, *PAIRS[case])
    model.add_weighted_adapter(["one", "two"], weights, "new", kind, svd_rank=12)
    for layer in layers(model).values():
        want = weights[0] * delta(layer, "one") + weights[1] * delta(layer, "two")
        close(delta(layer, "new"), want, 1e-5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", ["all_kinds", "lora_bias"])
def test_a_negative_weight_is_the_negative_adapter(kind, case):
    model = adapted(minipeft, VARIANTS[case], VARIANTS[case])
    torch.manual_seed(9)
    model.add_weighted_adapter(["one", "two"], [0.6, -1.1], "minus", kind, density=0.7)
    for name, p in model.named_parameters():
        if ".two" in name and ("_A." in name or name.endswith("lora_B.two.bias")):
            p.data.neg_()
    torch.manual_seed(9)
    model.add_weighted_adapter(["one", "two"], [0.6, 1.1], "plus", kind, density=0.7)
    for layer in layers(model).values():
        close(delta(layer, "plus"), delta(layer, "minus"), 1e-4)


@pytest.mark.parametrize("kind", FACTORS)
def test_factor_types_where_ranks_differ_between_layers(kind, tmp_path):
    """Where the ranks agree layer by layer it works, and the result can be loaded again."""
    same = {"rank_pattern": {"wide": 2, "conv": 6}, "r": 4}
    model = adapted(minipeft, same, same)
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "new", kind, density=0.5)
    assert all(layer.r["new"] == layer.r["one"] for layer in layers(model).values())
    assert {layer.scaling["new"] for layer in layers(model).values()} == {1}
    model.set_adapter("new")
    with torch.no_grad():
        want = model(X)
    model.save_pretrained(str(tmp_path), selected_adapters=["new"], save_embedding_layers=False)
    again = minipeft.PeftModel.from_pretrained(model.unload(), tmp_path / "new")
    with torch.no_grad():
        close(again(X), want)


@pytest.mark.parametrize("kind", ["linear", "cat", "ties"])
def test_grouped_convolution(kind):
    """Each group has rows of A of its own, which must stay with it."""
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    fields = {"target_modules": ["0"]}
    model = adapted(minipeft, fields, {**fields, "r": 2 if kind == "cat" else 4}, net=net)
    x = torch.randn(2, 4, 5, 5)

    def branch(name):
        layer = layers(model)["0"]
        with torch.no_grad():
            return layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))

    model.add_weighted_adapter(["one"], [1.0], "same", kind, density=0.5)
    close(branch("same"), branch("one"))
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "new", kind, density=0.5)
    if kind == "cat":
        close(branch("new"), 0.7 * branch("one") - 0.4 * branch("two"))
    else:
        assert torch.isfinite(branch("new")).all()


def test_attention():
    net = nn.Sequential(nn.MultiheadAttention(6, 2, batch_first=True))
    model = adapted(minipeft, {"target_modules": ["0"]}, {"target_modules": ["0"]}, net=net)
    model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "new", "cat")
    for layer in layers(model).values():
        close(delta(layer, "new"), 0.7 * delta(layer, "one") - 0.4 * delta(layer, "two"))


def test_low_precision_rounds_once():
    model = adapted(minipeft, {}, {}).to(torch.bfloat16)
    wide = copy.deepcopy(model).float()
    for m in (model, wide):
        m.add_weighted_adapter(["one", "two"], [0.7, -0.4], "new", "svd", svd_rank=8)
    for layer, exact in zip(layers(model).values(), layers(wide).values()):
        close(delta(layer, "new").float(), delta(exact, "new"), 2e-2)


def test_new_adapter_is_frozen_and_not_active():
    model = adapted(minipeft, {}, {})
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["one", "two"], [1, 1], "new", "cat")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert model.active_adapters == ["one"]
    with pytest.warns(UserWarning, match="exists already"):
        model.add_weighted_adapter(["one"], [1], "new")


ADD = {"adapters": ["one", "two"], "weights": [1.0, 1.0]}
REFUSED = {  # fields of the second adapter, arguments, what the message says
    "unknown": ({}, {"adapters": ["one", "z"]}, "z does not exist"),
    "no_adapters": ({}, {"adapters": [], "weights": []}, "list of adapter names"),
    "string": ({}, {"adapters": "ab"}, "list of adapter names"),
    "too_few_weights": ({}, {"weights": [1.0]}, "2 finite numbers"),
    "infinite": ({}, {"weights": [1.0, float("inf")]}, "2 finite numbers"),
    "nan": ({}, {"weights": [float("nan"), 1.0]}, "2 finite numbers"),
    "type": ({}, {"combination_type": "best"}, "Invalid combination_type"),
    "no_density": ({}, {"combination_type": "ties"}, "density"),
    "negative_density": ({}, {"combination_type": "magnitude_prune_svd", "density": -0.5}, "density"),
    "dare_without_any": ({}, {"combination_type": "dare_linear", "density": 0.0}, "density"),
    "sign_method": ({}, {"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "majority_sign"),
    "svd_rank": ({}, {"svd_rank": -1}, "svd_rank"),
    "svd_clamp": ({}, {"svd_clamp": 2}, "svd_clamp"),
    "svd_driver": ({}, {"svd_driver": "gesvd"}, "svd_driver"),
    "name": ({}, {"adapter_name": "a.b"}, "cannot be an adapter name"),
    "long_name": ({}, {"adapter_name": "a" * 300}, "cannot be an adapter name"),
    "ranks": ({"r": 3}, {"combination_type": "linear"}, "same r value"),
    "rank_of_a_layer": ({"rank_pattern": {"wide": 2}}, {"combination_type": "linear"}, "'wide'"),
    "dora": ({"use_dora": True}, {}, "DoRA adapters do not add up"),
    "bias": ({"bias": "lora_only"}, {}, "train biases"),
    "modules_to_save": ({"modules_to_save": ["cube"]}, {}, "modules_to_save"),
    "target_parameters": ({"target_parameters": ["layers.0.q.weight"]}, {}, "target_parameters"),
    "pissa": ({"init_lora_weights": "pissa", "target_modules": ["wide"]}, {}, "changed the base weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    fields, arguments, message = REFUSED[case]
    model = adapted(minipeft, {}, fields)
    before, configs = copy.deepcopy(model.state_dict()), dict(model.peft_config)
    with pytest.raises(PeftError, match=re.escape(message)):
        model.add_weighted_adapter(**{**ADD, "adapter_name": "new", **arguments})
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert model.peft_config == configs


def test_not_finite_is_refused():
    model = adapted(minipeft, {}, {})
    layers(model)["wide"].lora_A["two"].weight.data[0, 0] = float("nan")
    with pytest.raises(PeftError, match="not finite"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "new", "cat")
    assert "new" not in model.peft_config


# ----------------------------------------------------------------------------------------------------------------- IA3
def ia3(lib, *configs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    for name, fields in zip(("one", "two"), configs):
        config = lib.IA3Config(**{"target_modules": ["0", "1"], "feedforward_modules": ["1"], **fields})
        if name == "one":
            model = lib.get_peft_model(net, config, name)
        else:
            model.add_adapter(name, config)
    for p in (p for n, p in sorted(model.named_parameters()) if "ia3_" in n):
        p.data += torch.randn_like(p)
    return model


def test_ia3_as_peft():
    peft = pytest.importorskip("peft")
    theirs, ours = ia3(peft, {}, {}), ia3(minipeft, {}, {})
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        model.add_weighted_adapter(["one", "two"], [0.3, -0.7], "new")
    got, want = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(want) and all(torch.equal(got[k], want[k]) for k in want)
    assert ours.peft_config["new"].to_dict() == theirs.peft_config["new"].to_dict()
    assert not any(p.requires_grad for n, p in ours.named_parameters() if ".new" in n)


@pytest.mark.parametrize(
    "second",
    [
        {"target_modules": ["0"], "feedforward_modules": []},
        {"target_modules": "0", "feedforward_modules": ""},
        {"target_modules": ["0"], "feedforward_modules": [], "exclude_modules": ["1"]},
    ],
)
def test_ia3_counts_as_ones_where_it_is_not(second):
    model = ia3(minipeft, {}, second)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "new")
    first, second = model.base_model.model
    torch.testing.assert_close(second.ia3_l["new"], 0.5 * second.ia3_l["one"] + 0.5)
    torch.testing.assert_close(first.ia3_l["new"], 0.5 * first.ia3_l["one"] + 0.5 * first.ia3_l["two"])
    assert second.adapters["new"].is_feedforward and not first.adapters["new"].is_feedforward


def test_ia3_refuses_input_and_output_on_one_layer():
    model = ia3(minipeft, {}, {"feedforward_modules": ["0", "1"]})
    with pytest.raises(PeftError, match="'0' some scale its input"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "new")
    assert list(model.peft_config) == ["one", "two"]


@pytest.mark.parametrize("kinds", [("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "float32")])
@pytest.mark.parametrize("kind", TYPES)
def test_of_as_many_bits_as_its_parts(kind, kinds):
    """What is made of adapters of 16 bits has 16, as they have; with one of 32 bits among them it has 32."""
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).to(torch.bfloat16)
    config = minipeft.LoraConfig(r=2, target_modules=["0"])
    model = minipeft.get_peft_model(base, config, autocast_adapter_dtype=kinds[0] == "float32")
    model.add_adapter("other", copy.copy(config), autocast_adapter_dtype=kinds[1] == "float32")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "both", combination_type=kind, density=0.5)
    found = {str(p.dtype).removeprefix("torch.") for name, p in model.named_parameters() if ".both." in name}
    assert found == {max(kinds, key=("bfloat16", "float32").index)}
