"""VB-LoRA's small checkpoints (`save_only_topk_weights`): which vectors were chosen, and with which weights."""

import pytest
import torch

from . import bases as B
from . import harness as H
from .cases.vblora import LINEARS, vblora

SIZES = [(10, torch.uint8), (300, torch.int16)]


def case(**given):
    return vblora("linear/only_topk", B.MLP, LINEARS, save_only_topk_weights=True, **{"topk": 3, **given})


def moved(lib, c):
    return H.move(H.adapt(lib, c), c.scale)


@pytest.mark.parametrize("num_vectors, dtype", SIZES)
def test_saved_tensors(num_vectors, dtype, lib, ref, tmp_path):
    c = case(num_vectors=num_vectors)
    want, want_config = H.saved(moved(ref, c), tmp_path / "want")
    got, got_config = H.saved(moved(lib, c), tmp_path / "got")
    H.identical(got, want)
    H.same_config(got_config, want_config)
    assert got["base_model.model.wide.vblora_logits_A_topk_indices"].dtype == dtype


@pytest.mark.parametrize("topk", [1, 2, 10])
@pytest.mark.parametrize("direction", ["peft to us", "us to peft"])
def test_loading(direction, topk, lib, ref, tmp_path):
    writer, reader = (ref, lib) if direction == "peft to us" else (lib, ref)
    c = case(topk=topk)
    model = moved(writer, c)
    H.saved(model, tmp_path)
    loaded = reader.PeftModel.from_pretrained(c.base.build(), str(tmp_path)).eval()
    H.close(H.run(loaded, H.inputs(c)), H.run(model, H.inputs(c)), 2e-5)
    merged = loaded.merge_and_unload()
    H.close(H.run(merged, H.inputs(c)), H.run(model, H.inputs(c)), 2e-5)


def test_readers_agree_on_the_logits(lib, ref, tmp_path):
    """Also where a vector was not chosen: minus infinity."""
    c = case()
    H.saved(moved(ref, c), tmp_path)
    ours, theirs = (H.snapshot(m.PeftModel.from_pretrained(c.base.build(), str(tmp_path))) for m in (lib, ref))
    H.identical(ours, theirs)
    assert torch.isneginf(ours["base_model.model.wide.vblora_logits_A.default"]).any()


@pytest.mark.parametrize("fault", ["indices", "weights", "nan"])
def test_damaged(fault, lib, tmp_path):
    c = case()
    H.saved(moved(lib, c), tmp_path)
    tensors, _ = H.stored(tmp_path)
    key = "base_model.model.wide.vblora_logits_A_topk_weights"
    if fault == "nan":
        tensors[key][0, 0, 0] = torch.nan
    else:
        del tensors[key.replace("weights", fault)]
    with pytest.raises(lib.CheckpointError if hasattr(lib, "CheckpointError") else ValueError):
        lib.set_peft_model_state_dict(H.adapt(lib, c), tensors)


@pytest.mark.parametrize("only_topk", [False, True])
def test_count_of_what_is_saved(only_topk, lib, ref, capsys):
    c = vblora("linear/count", B.MLP, LINEARS, save_only_topk_weights=only_topk, topk=3)
    counts, lines = [], []
    for module in (lib, ref):
        model = H.adapt(module, c).base_model
        counts.append(model.get_nb_savable_parameters())
        model.print_savable_parameters()
        lines.append(capsys.readouterr().out)
    assert counts[0] == counts[1] and lines[0] == lines[1]
