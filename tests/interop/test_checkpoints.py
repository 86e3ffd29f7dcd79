"""Checkpoints: what one saves the other loads, with the same tensors, config and outputs, and saves again unchanged."""

import tempfile
from pathlib import Path

import pytest
import torch

from . import harness as H
from .cases import each_case

both_ways = pytest.mark.parametrize("direction", ["peft to us", "us to peft"])


class Written:
    """The case's moved adapter as `writer` saves it: the folder, and what its model trained and gave."""

    def __init__(self, case, writer):
        self.kept = tempfile.TemporaryDirectory()
        self.folder = Path(self.kept.name)
        model = H.move(H.adapt(writer, case), case.scale)
        self.kind, self.trained = type(model).__name__, {n for n, p in model.named_parameters() if p.requires_grad}
        H.saved(model, self.folder)
        self.output = H.run(model, batch(case))  # after saving: running may write (CoFT)


def written(case, writer):
    return H.shared(case, writer.__name__, lambda: Written(case, writer))


def batch(case):
    return H.without_labels(H.inputs(case)) if case.own_loss else H.inputs(case)


@both_ways
@each_case()
def test_from_pretrained(case, direction, lib, ref, tmp_path):
    writer, reader = (ref, lib) if direction == "peft to us" else (lib, ref)
    saved = written(case, writer)
    H.seed(0)  # PiSSA and OLoRA are made again while loading, from the same draw
    loaded = reader.PeftModel.from_pretrained(case.base.build(), str(saved.folder)).eval()
    assert type(loaded).__name__ == saved.kind
    if not {"reload", "outputs"} & set(case.disputed):
        H.close(H.run(loaded, batch(case)), saved.output, H.TOLERANCE[torch.float32])
    by_peft = loaded if reader is ref else ref.PeftModel.from_pretrained(case.base.build(), str(saved.folder))
    trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (loaded, by_peft)]
    assert trains[0] <= trains[1], "peft freezes what is loaded, but for trained biases and prompts"
    written_tensors, written_config = H.stored(saved.folder)
    again, again_config = H.saved(loaded, tmp_path)
    if "running writes" not in case.disputed:
        H.identical(again, written_tensors)
    assert again_config["inference_mode"] is True
    H.same_config({**again_config, "inference_mode": written_config["inference_mode"]}, written_config)


@both_ways
@each_case()
def test_from_pretrained_trainable(case, direction, lib, ref):
    writer, reader = (ref, lib) if direction == "peft to us" else (lib, ref)
    saved = written(case, writer)
    if case.prompt:
        with pytest.raises(ValueError):
            reader.PeftModel.from_pretrained(case.base.build(), str(saved.folder), is_trainable=True)
        return
    base = case.base.build()
    loaded = reader.PeftModel.from_pretrained(base, str(saved.folder), adapter_name="x", is_trainable=True)
    H.same_names({n.replace(".x", ".default") for n, p in loaded.named_parameters() if p.requires_grad}, saved.trained)


@both_ways
@each_case(lambda c: c.second is not None)
def test_load_adapter(case, direction, lib, ref):
    """Into a model that has an adapter already; the two readers must agree on everything."""
    saved = written(case, ref if direction == "peft to us" else lib)
    models = []
    for reader in (ref, lib):
        model = H.adapt(reader, case)
        model.load_adapter(str(saved.folder), "other")
        model.set_adapter("other")
        models.append(model.eval())
    theirs, ours = models
    got, want = H.snapshot(ours), H.snapshot(theirs)
    H.same_names(got, want)
    if case.exact_init:
        H.identical({k: v for k, v in got.items() if ".other" in k}, {k: v for k, v in want.items() if ".other" in k})
        out = H.run(ours, H.inputs(case)), H.run(theirs, H.inputs(case))
        if "outputs" not in case.disputed:
            H.close(*out, H.TOLERANCE[torch.float32])


@both_ways
@each_case(lambda c: not c.kwargs.get("prefix_projection") and c.method != "p_tuning")  # saved without their encoders
def test_state_dict_travels(case, direction, lib, ref):
    writer, reader = (ref, lib) if direction == "peft to us" else (lib, ref)
    model = H.move(H.adapt(writer, case), case.scale)
    state = {k: v.detach().clone() for k, v in writer.get_peft_model_state_dict(model).items()}
    other = H.adapt(reader, case, at=9)
    reader.set_peft_model_state_dict(other, {k: v.clone() for k, v in state.items()})
    H.identical(dict(reader.get_peft_model_state_dict(other)), state)


@each_case(lambda c: c.id.endswith("/plain"))
def test_low_cpu_mem_usage(case, lib, ref):
    if lib is ref and "low memory" in case.disputed:
        pytest.skip(f"disputed: {case.disputed['low memory']}")
    saved = written(case, lib if "outputs" in case.disputed else ref)
    loaded = lib.PeftModel.from_pretrained(case.base.build(), str(saved.folder), low_cpu_mem_usage=True).eval()
    assert not [n for n, t in loaded.state_dict().items() if t.is_meta]
    H.close(H.run(loaded, batch(case)), saved.output, H.TOLERANCE[torch.float32])


@each_case(lambda c: c.id.endswith("/plain") and not c.prompt)
def test_several_adapters_in_subfolders(case, lib, ref, tmp_path):
    """The default adapter lies in the folder itself, another in a folder of its name; selected_adapters picks."""
    listings = []
    for module, path in ((ref, tmp_path / "want"), (lib, tmp_path / "got")):
        model = H.add(module, H.adapt(module, case), case, "other")
        model.save_pretrained(str(path / "all"))
        model.save_pretrained(str(path / "one"), selected_adapters=["other"])
        listings.append(sorted(str(p.relative_to(path)) for p in path.rglob("*")))
    assert listings[0] == listings[1]
