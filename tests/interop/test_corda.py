"""CorDA: peft's factors and base weights, for the same samples; its files go both ways."""

import importlib

import pytest
import torch

from . import harness as H
from .test_lora_ga import Net, transformers  # noqa: F401 - the fixture is for all tests here

TARGETS = ["one", "two", "inner.three"]


def preprocess(module):
    name = "peft.tuners.lora.corda" if module.__name__ == "peft" else f"{module.__name__}.methods.lora.corda"
    return importlib.import_module(name).preprocess_corda


def config(module, targets=TARGETS, corda=(), **fields):
    fields = {"r": 3, "lora_alpha": 5, **fields}
    CordaConfig = importlib.import_module(
        "peft.tuners.lora.config" if module.__name__ == "peft" else "minipeft.methods.lora.configs"
    ).CordaConfig
    corda = CordaConfig(**dict(corda))
    return module.LoraConfig(init_lora_weights="corda", corda_config=corda, target_modules=list(targets), **fields)


def sample(model, count=4, shape=(60, 12)):
    def run():
        g = torch.Generator().manual_seed(2)
        for _ in range(count):
            model((torch.randn(shape, generator=g) * torch.linspace(2, 0.5, 12)).to(next(model.parameters()).dtype))

    return run


def adapted(module, dtype=torch.float32, run=True, **fields):
    net = Net().to(dtype)
    given = config(module, **fields)
    preprocess(module)(net, given, sample(net) if run else None)
    H.seed(4)
    return module.get_peft_model(net, given).eval()


def compared(model):
    """What does not depend on the signs of singular vectors: base weights, and B A."""
    found = {k: t for k, t in H.snapshot(model).items() if "lora_" not in k or "magnitude" in k}
    for name in TARGETS:
        layer = model.base_model.model.get_submodule(name)
        if hasattr(layer, "lora_A"):
            found[f"{name}.product"] = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
            found[f"{name}.gram"] = layer.lora_B["default"].weight.float().T @ layer.lora_B["default"].weight.float()
    return {k: v.abs() if k.endswith("gram") else v for k, v in found.items()}


VARIANTS = [
    {}, {"use_dora": True}, {"corda": {"corda_method": "kpm"}}, {"use_rslora": True}, {"rank_pattern": {"two": 2}},
    {"r": 12}, {"targets": ["two"]}, {"corda": {"use_float16_for_covariance": True}, "dtype": torch.bfloat16},
]  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_same_start(fields, lib, ref):
    theirs, ours = (adapted(module, **fields) for module in (ref, lib))
    tolerance = 5e-2 if "dtype" in fields else 2e-3
    H.close(compared(ours), compared(theirs), tolerance)
    H.same_names(H.snapshot(ours), H.snapshot(theirs))
    assert H.differ(ours.base_model.model.two.base_layer.state_dict(), Net().two.state_dict(), 1e-4)
    x = torch.randn(5, 12).to(fields.get("dtype", torch.float32))
    unchanged = Net().to(x.dtype)(x)
    torch.testing.assert_close(ours(x), unchanged, rtol=5e-2 if "dtype" in fields else 1e-3, atol=tolerance)


@pytest.mark.parametrize("field", ["cache_file", "covariance_file"])
def test_files(field, lib, ref, tmp_path):
    models = []
    for maker in (lib, ref):
        corda = {field: str(tmp_path / maker.__name__ / "kept.pt")}
        models += [adapted(maker, corda=corda), *(adapted(reader, run=False, corda=corda) for reader in (lib, ref))]
    for model in models[1:]:
        H.close(compared(model), compared(models[0]), 2e-3)


def test_another_model_may_run(lib, ref):
    models = []
    for module in (ref, lib):
        net, other, given = Net(), Net(), config(module)
        other.one.bias.data += 0.1
        preprocess(module)(net, given, sample(other), other)
        models.append(module.get_peft_model(net, given))
    theirs, ours = models
    H.close(compared(ours), compared(theirs), 2e-3)
    assert H.differ(compared(ours), compared(adapted(lib)), 1e-4)


def test_sequences(lib):
    """Samples with a batch dimension count as their vectors."""
    found = []
    for shape in ((60, 12), (4, 15, 12)):
        net, given = Net(), config(lib)
        preprocess(lib)(net, given, sample(net, shape=shape))
        found.append(compared(lib.get_peft_model(net, given)))
    H.close(*found, 1e-3)


def test_model_is_left_as_it_was(lib):
    net = Net().train()
    before = H.snapshot(net)
    preprocess(lib)(net, config(lib, corda={"prune_temporary_fields": False}), sample(net))
    H.identical(H.snapshot(net), before)
    assert net.training and not any(m._forward_hooks for m in net.modules()) and hasattr(net.one, "covariance_matrix")
    model = lib.get_peft_model(net, config(lib))
    assert not any("eigens" in vars(m) for m in model.modules())


def test_refusals(lib, is_ref, tmp_path):
    if is_ref:
        pytest.skip("errors of the module under test")
    net, run = Net(), preprocess(lib)
    for args, match in (
        ((lib.LoraConfig(target_modules=["one"]), sample(net)), "corda_config"),
        ((config(lib, targets=["drop"]), sample(net)), "linear"),
        ((config(lib),), "run_model"),
        ((config(lib), lambda: None), "not used"),
        ((config(lib), lambda: net(torch.full((3, 12), torch.nan))), "finite"),
        ((config(lib, r=13), sample(net)), "rank 13"),
    ):
        with pytest.raises(ValueError, match=match):
            run(net, *args)
    with pytest.raises(ValueError, match="preprocess_corda"):
        lib.get_peft_model(net, config(lib))
    torch.save({}, tmp_path / "empty.pt")
    for field in ("cache_file", "covariance_file"):
        with pytest.raises(ValueError, match="another model"):
            run(net, config(lib, corda={field: str(tmp_path / "empty.pt")}))
    run(net, config(lib), sample(net))
    before = H.snapshot(net)
    with pytest.raises(ValueError, match="rank 3"):
        lib.get_peft_model(net, config(lib, r=4))
    H.identical(H.snapshot(net), before)
    assert not any(m._forward_hooks for m in net.modules())
