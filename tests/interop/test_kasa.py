"""KaSA: its loss, and the truncation of frozen weights. Outputs are in the table of cases."""

import pytest
import torch

from . import bases as B
from . import harness as H
from .cases import each_case
from .cases.kasa import LINEARS, kasa

PLAIN = kasa("more/plain", B.MLP, LINEARS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
of_kasa = each_case(lambda c: c.method == "kasa")


def weights(model):
    """The frozen weights of adapted layers."""
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith("base_layer.weight")}


def ranks(model):
    """How many singular values of each adapted weight are not 0."""
    return {k: int(torch.linalg.matrix_rank(v, rtol=1e-5)) for k, v in weights(model).items()}


def loss(model, *names):
    """KaSA's term, and its gradients by name."""
    model.zero_grad()
    value = model.base_model._get_kasa_loss(*names)
    value.backward()
    return {"loss": value.detach().float(), **{n: p.grad.clone() for n, p in model.named_parameters()
                                               if p.grad is not None}}


# ------------------------------------------------------------------------------------------------------------- loss
@DTYPES
@of_kasa
def test_loss_and_its_gradients(case, dtype, lib, ref):
    theirs, ours = H.pair(ref, lib, case, dtype)
    want, got = loss(theirs), loss(ours)
    assert len(want) > 3 and want["loss"] > 0.01 * case.kwargs["kasa_config"].get("beta", 1e-2)
    H.close(got, want, max(1e-5, H.TOLERANCE[dtype]))  # PEFT: in float32 also for float64 models


def test_loss_of_which_adapters(lib, ref, is_ref):
    theirs, ours = H.pair(ref, lib, PLAIN, second=True)
    sums = [{n: m.base_model._get_kasa_loss(n).item() for n in ("default", "other")} for m in (theirs, ours)]
    assert sums[1] == pytest.approx(sums[0], rel=1e-5) and abs(sums[0]["default"] - sums[0]["other"]) > 1e-3
    for model, each in zip((theirs, ours), sums):
        assert model.base_model._get_kasa_loss().item() == each["default"]
        assert model.base_model._get_kasa_loss(["default", "other"]).item() == pytest.approx(sum(each.values()))
        model.set_adapter("other")
        assert model.base_model._get_kasa_loss().item() == each["other"]
    if not is_ref:
        with pytest.raises(ValueError, match="typo"):
            ours.base_model._get_kasa_loss("typo")
    plain = lib.get_peft_model(B.MLP.build(), lib.LoraConfig(target_modules=LINEARS))
    assert plain.base_model._get_kasa_loss() == 0.0


def test_training_lowers_the_loss(lib):
    model = H.move(H.adapt(lib, PLAIN)).train()
    step = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    start = model._get_kasa_loss().item()
    for _ in range(30):
        step.zero_grad()
        model._get_kasa_loss().backward()
        step.step()
    assert model._get_kasa_loss().item() < 0.8 * start


# ------------------------------------------------------------------------------------------------------- truncation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_truncated_weights(dtype, lib, ref):
    theirs, ours = (H.adapt(module, PLAIN, dtype=dtype) for module in (ref, lib))
    H.close(weights(ours), weights(theirs), 1e-6 if dtype != torch.bfloat16 else 1e-2)
    base = PLAIN.base.build(dtype).state_dict()
    for key, W in weights(ours).items():
        original = base[key.removeprefix("base_model.model.").replace(".base_layer", "")].double()
        S = torch.linalg.svdvals(original)
        off = torch.linalg.matrix_norm(original - W.double())
        assert off.item() == pytest.approx(S[-3:].norm().item(), rel=0.05), "not the closest weight of that rank"


@pytest.mark.parametrize("first, second", [(1, 3), (3, 1), (2, 2)])
def test_two_adapters_take_the_larger_rank(first, second, lib, ref):
    models = []
    for module in (ref, lib):
        model = H.adapt(module, kasa("more/two", B.MLP, LINEARS, r=first))
        H.add(module, model, kasa("more/two", B.MLP, LINEARS, second={"r": second}), "other")
        models.append(model)
    H.close(weights(models[1]), weights(models[0]), 1e-5)
    assert set(ranks(models[1]).values()) == {size - max(first, second) for size in (8, 4)}


def test_frozen_weight_stays_truncated(lib, ref):
    """Disabled, deleted and unloaded: as in peft."""
    theirs, ours = H.pair(ref, lib, PLAIN, second=True)
    want = weights(theirs)
    with ours.disable_adapter():
        H.identical(weights(ours), want)
    ours.delete_adapter("other")
    H.identical(weights(ours), want)
    H.identical(ours.unload().state_dict(), theirs.unload().state_dict())


def test_layers_that_share_a_weight(lib, ref):
    """Replicated layers with different ranks: as much is taken out as the largest of them says."""
    pytest.importorskip("transformers")
    case = kasa("more/replicated", B.LLAMA, ["q_proj"], layer_replication=[[0, 2], [1, 2]],
                rank_pattern={"layers.1.self_attn.q_proj": 5})
    theirs, ours = (H.adapt(module, case) for module in (ref, lib))
    H.close(weights(ours), weights(theirs), 1e-5)
    assert sorted(ranks(ours).values())[0] == sorted(ranks(ours).values())[1] < sorted(ranks(ours).values())[2]


@pytest.mark.parametrize("low", [False, True])
def test_loading_truncates(low, lib, ref, tmp_path):
    """At once: peft waits for the first forward pass when low_cpu_mem_usage is set."""
    saved = H.move(H.adapt(ref, PLAIN))
    saved.save_pretrained(str(tmp_path))
    ours = lib.PeftModel.from_pretrained(PLAIN.base.build(), str(tmp_path), low_cpu_mem_usage=low)
    batch = H.inputs(PLAIN)
    H.close(H.run(ours, batch), H.run(saved, batch), 1e-5)
    H.close(weights(ours), weights(saved), 1e-5)


def test_loading_beside(lib, tmp_path):
    other = kasa("more/other", B.MLP, LINEARS, r=2)
    H.move(H.adapt(lib, other, at=2)).save_pretrained(str(tmp_path))
    model = H.move(H.adapt(lib, PLAIN))
    before = H.run(model, H.inputs(PLAIN))
    model.load_adapter(str(tmp_path), "other")
    H.close(H.run(model, H.inputs(PLAIN)), before, 1e-5)
    assert ranks(model) == ranks(H.adapt(lib, PLAIN))


@pytest.mark.parametrize("merge", [False, True])
def test_base_without_values(merge, lib, ref, is_ref):
    """A model on the meta device: built, counted, loaded, and truncated in the first forward pass."""
    whole = H.move(H.adapt(ref, PLAIN))
    model = lib.get_peft_model(B.MLP.build().to("meta"), H.config(lib, PLAIN)).eval()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.parameters())
    original = {f"base_model.model.{k}": v for k, v in B.MLP.build().state_dict().items()}
    values = {k: original[k.replace(".base_layer", "")] if "base_layer" in k else v
              for k, v in whole.state_dict().items()}
    if not is_ref:
        with pytest.raises(ValueError, match="meta device"):
            model(**{k: v.to("meta") for k, v in H.inputs(PLAIN).items()})
    model.load_state_dict(values, assign=True)
    batch = H.inputs(PLAIN)
    if merge and not is_ref:
        with pytest.raises(ValueError, match="before its weight was loaded"):
            model.merge_adapter()
    H.close(H.run(model, batch), H.run(whole, batch), 1e-5)
    H.close(weights(model), weights(whole), 1e-5)
    if merge:
        model.merge_adapter()
        H.close(H.run(model, batch), H.run(whole, batch), 1e-5)


# ----------------------------------------------------------------------------------------------------------- refused
OTHER_KIND = {"kasa_config": None}
BROKEN = {
    "beside LoRA": ({}, OTHER_KIND, "changes the frozen weights"),
    "LoRA beside": (OTHER_KIND, {}, "changes the frozen weights"),
    "beside DoRA": ({}, {**OTHER_KIND, "use_dora": True}, "changes the frozen weights"),
    "rank": ({}, {"rank_pattern": {"thin": 4}}, "got r=4"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refusals_change_nothing(name, lib, is_ref):
    first, second, why = BROKEN[name]
    model = lib.get_peft_model(B.MLP.build(), H.config(lib, PLAIN, **first))
    before = H.snapshot(model)
    with pytest.raises(ValueError, match=None if is_ref else why):
        model.add_adapter("other", H.config(lib, PLAIN, **second))
    if not is_ref:
        H.identical(H.snapshot(model), before)
        assert list(model.peft_config) == ["default"]


def test_a_layer_that_fails_late_changes_none(lib, is_ref):
    """The last of three layers has no singular values: those before it are as they were."""
    if is_ref:
        pytest.skip("a promise of the module under test: peft has truncated the first layers by then")
    base = B.MLP.build()
    with torch.no_grad():
        base.thin.weight[0, 0] = float("nan")
    before = H.snapshot(base)
    with pytest.raises((ValueError, RuntimeError)):
        lib.get_peft_model(base, H.config(lib, PLAIN))
    H.identical(H.snapshot(base), before)


def test_not_while_merged(lib, is_ref):
    if is_ref:
        pytest.skip("a promise of the module under test: peft truncates the merged weight")
    model = H.move(H.adapt(lib, PLAIN))
    before = H.snapshot(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.add_adapter("other", H.config(lib, PLAIN))
    model.unmerge_adapter()
    H.identical(H.snapshot(model), before)


def test_not_late_while_merged(lib, is_ref):
    """The first adapter was added to an empty model; the second, to the loaded one, is merged when the first runs."""
    if is_ref:
        pytest.skip("a promise of the module under test: peft truncates the merged weight")
    model = lib.get_peft_model(B.MLP.build().to("meta"), H.config(lib, PLAIN)).eval()
    model.load_state_dict(H.adapt(lib, PLAIN).state_dict(), assign=True)
    H.add(lib, model, PLAIN, "other")
    model.merge_adapter(["other"])
    before = H.snapshot(model)
    with pytest.raises(ValueError, match="merged"):
        model(**H.inputs(PLAIN))
    H.identical(H.snapshot(model), before)


def test_no_plain_lora_of_it(lib, is_ref, tmp_path):
    model = H.adapt(lib, PLAIN)
    assert model.supports_lora_conversion() is False
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        lib.convert_to_lora(model, rank=2)
    if not is_ref:
        model.add_adapter("other", H.config(lib, PLAIN))
        with pytest.raises(NotImplementedError, match="KaSA"):
            model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", "linear")
        model.save_pretrained(str(tmp_path))
        with pytest.raises(NotImplementedError):
            model.save_pretrained(str(tmp_path / "x"), path_initial_model_for_weight_conversion=str(tmp_path))
