"""BD-LoRA beyond the table: what the blocks are, where peft fails, and what cannot be."""

import pytest
import torch

from . import bases as B
from . import harness as H
from .cases.case import Case

TARGETS = ["square", "wide", "thin"]
BLOCKS = {"target_modules_bd_a": ["square", "thin"], "target_modules_bd_b": ["wide"], "nblocks": 2}


def case(base=B.MLP, **fields):
    return Case("bdlora/here", "LoraConfig", {"target_modules": TARGETS, "use_bdlora": BLOCKS, "r": 4, **fields}, base)


def layer(model, path):
    return model.base_model.model.get_submodule(path)


def merged_as_running(model, batch):
    running = H.run(model, batch)
    model.merge_adapter(safe_merge=True)
    H.close(H.run(model, batch), running, 1e-10)


def test_no_block_sees_the_others(lib):
    model = H.move(H.adapt(lib, case())).double()
    square, wide = (layer(model, path) for path in ("square", "wide"))
    A = square.lora_A["default"](torch.eye(8, dtype=torch.float64)).t()  # (4, 8)
    assert not A[:2, 4:].any() and not A[2:, :4].any() and A[:2, :4].all() and A[2:, 4:].all()
    B_ = wide.lora_B["default"](torch.eye(4, dtype=torch.float64)).t()  # (12, 4)
    assert not B_[:6, 2:].any() and not B_[6:, :2].any() and B_[:6, :2].all() and B_[6:, 2:].all()
    dW = wide.get_delta_weight("default")
    torch.testing.assert_close(dW, wide.scaling["default"] * B_ @ wide.lora_A["default"].weight)


def test_count(lib):
    trained = H.adapt(lib, case()).get_nb_trainable_parameters()[0]
    assert trained == 4 * (8 // 2 + 8) + 4 * (8 + 12 // 2) + 4 * (12 // 2 + 4)


def test_a_bias_that_blocks_do_not_have(lib, ref, is_ref):
    """peft runs a block-diagonal B without the bias that lora_bias asks for, and cannot merge it."""
    theirs, ours = H.pair(ref, lib, case(lora_bias=True, target_modules=["square", "wide"]), torch.float64)
    batch = B.MLP.inputs(torch.float64)
    H.close(H.run(ours, batch), H.run(theirs, batch), 1e-10)
    assert not any("wide.lora_B.default.bias" in name for name, _ in ours.named_parameters())
    with pytest.raises(AttributeError):
        theirs.merge_adapter()
    if not is_ref:
        merged_as_running(ours, batch)


def test_conv1d(lib, is_ref):
    """peft asks transformers' Conv1D for in_features, which it does not have."""
    if is_ref:
        pytest.skip("peft refuses it")
    model = H.move(H.adapt(lib, case(B.HF_CONV1D, fan_in_fan_out=True))).double()
    merged_as_running(model, B.HF_CONV1D.inputs(torch.float64))


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "orthogonal", "mica"])
def test_starts_that_compute_a_whole_matrix(init, lib, is_ref):
    if is_ref:
        pytest.skip("peft computes it and throws a part of it away")
    with pytest.raises(ValueError, match="init_lora_weights"):
        H.adapt(lib, case(init_lora_weights=init))


@pytest.mark.parametrize("wrong", [{"nblocks": 0}, {"nblocks": -2}, {"target_modules_bd_b": "wide"}])
def test_records_that_cannot_be(wrong, lib, is_ref):
    if is_ref:
        pytest.skip("peft divides by zero, or takes each letter for a pattern")
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        lib.LoraConfig(use_bdlora=lib.BdLoraConfig(**{**BLOCKS, **wrong}))


@pytest.mark.parametrize("bad", [{"r": 5}, {"rank_pattern": {"wide": 3}}, {"target_modules": [*TARGETS, "head"]}])
def test_a_refused_second_adapter_changes_nothing(bad, lib, is_ref):
    if is_ref:
        pytest.skip("peft raises half way")
    model = H.adapt(lib, case())
    before = H.snapshot(model)
    with pytest.raises(ValueError):
        H.add(lib, model, case(), "other", **bad)
    H.identical(H.snapshot(model), before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_they_do_not_add_up(kind, lib, is_ref):
    if is_ref:
        pytest.skip("peft multiplies the blocks as if they were whole matrices")
    model = H.add(lib, H.adapt(lib, case()), case(), "other")
    with pytest.raises(NotImplementedError):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", combination_type=kind)


@pytest.mark.parametrize("rank", [4, 6, 2])
def test_hot_swapping(rank, lib, is_ref, tmp_path):
    """An equal or a larger rank takes the place; a smaller one would need zeros within the blocks."""
    if is_ref:
        pytest.skip("peft puts the zeros behind all blocks, where they are those of other inputs")
    new = H.move(H.adapt(lib, case(r=rank), at=5))
    H.saved(new, tmp_path)
    model = H.move(H.adapt(lib, case()))
    before = H.snapshot(model)
    if rank < 4:
        for act in (lambda: lib.hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu"),
                    lambda: lib.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)):
            with pytest.raises(NotImplementedError, match="rank"):
                act()
            H.identical(H.snapshot(model), before)
        return
    lib.hotswap.hotswap_adapter(model, tmp_path, "default", torch_device="cpu")
    H.close(H.run(model, B.MLP.inputs()), H.run(new, B.MLP.inputs()), 2e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(bits, lib, is_ref):
    """peft leaves the blocks out on bitsandbytes' layers, without a word."""
    if is_ref:
        pytest.skip("peft has a plain LoRA there")
    blocks = {"target_modules_bd_a": ["lin"], "nblocks": 4}
    config = lib.LoraConfig(target_modules=["lin"], use_bdlora=blocks, r=4)
    model = H.move(lib.get_peft_model(B.Chain(lin=H.quantised_linear(bits)), config)).train()
    lin, x = layer(model, "lin"), torch.randn(5, 64)
    assert lin.lora_A["default"].weight.shape == (4, 16)
    running, bare = lin(x), lin.base_layer(x)
    read = lin.base.apply(x, *lin.operator().read()) - lin.base.apply(x, *lin.base.read())
    torch.testing.assert_close(running - bare, read, rtol=1e-3, atol=1e-3)
    assert read.abs().max() > 0.1


def test_blocks_beside_plain_lora(lib, ref):
    """One adapter of each sort on a layer: running, switching, merging."""
    plain = case()
    models = [H.add(m, H.adapt(m, plain), plain, "other", use_bdlora=None) for m in (ref, lib)]
    theirs, ours = models
    H.copy_values(H.move(theirs, only=H.adapter_or_trainable), ours)
    batch = B.MLP.inputs(torch.float64)
    for active in (["default"], ["other"], ["default", "other"]):
        for model in models:
            model.double().base_model.set_adapter(active)
        H.close(H.run(ours, batch), H.run(theirs, batch), 1e-10)
    for model in models:
        model.merge_adapter()
    H.close(H.run(ours, batch), H.run(theirs, batch), 1e-10)
