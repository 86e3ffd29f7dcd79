"""Files as older releases of peft wrote them are read as peft reads them, or refused with what to do."""

import json

import pytest
import safetensors.torch
import torch

from . import harness as H
from .cases import CASES, each_case

CASE = {case.id: case for case in CASES}


def rewritten(folder, change, **fields):
    """The saved adapter with `change` of its tensors, and `fields` of its configuration."""
    tensors, config = H.stored(folder)
    safetensors.torch.save_file(change(tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))


def load(lib, case, folder):
    return lib.PeftModel.from_pretrained(case.base.build(), str(folder)).eval()


@each_case(lambda c: c.method == "boft" and "outputs" not in c.disputed)
def test_boft_with_its_permutations(case, lib, ref, tmp_path):
    """peft 0.11 and 0.12 saved a buffer of each layer."""
    model, batch = H.move(H.adapt(ref, case), case.scale), H.inputs(case)
    H.saved(model, tmp_path)
    rewritten(tmp_path, lambda tensors: tensors | {
        key.replace("boft_R", "boft_P"): torch.eye(t.shape[1] * t.shape[2])[None]
        for key, t in tensors.items() if key.endswith("boft_R")
    })  # fmt: skip
    want = H.run(load(ref, case, tmp_path), batch)
    H.close(H.run(load(lib, case, tmp_path), batch), want, 1e-5)
    again = H.adapt(lib, case)
    lib.set_peft_model_state_dict(again, H.stored(tmp_path)[0])
    H.close(H.run(again, batch), want, 1e-5)


def test_boft_that_was_trained_without_the_kernel(lib, ref, tmp_path):
    """Where peft cannot build its kernel it trains one butterfly factor, and writes the number that was asked for."""
    case = CASE["boft/linear/plain"]
    config = ref.BOFTConfig(target_modules=["square"], boft_block_size=2, boft_n_butterfly_factor=2, init_weights=False)
    model, batch = ref.get_peft_model(case.base.build(), config).eval(), H.inputs(case)
    H.saved(model, tmp_path)
    with pytest.raises(lib.PeftError, match=r"has one factor, and `boft_n_butterfly_factor` is 2: .* Write 1 into"):
        load(lib, case, tmp_path)
    rewritten(tmp_path, lambda tensors: tensors, boft_n_butterfly_factor=1)
    H.close(H.run(load(lib, case, tmp_path), batch), H.run(model, batch), 1e-5)


def test_oft_of_other_blocks(lib, is_ref, tmp_path):
    """Up to 0.15, OFT held dense blocks and a scale."""
    if is_ref:
        pytest.skip("peft leaves the adapter as it was made, with a warning")
    case = CASE["oft/linear/plain"]
    H.saved(H.adapt(lib, case), tmp_path)
    rewritten(tmp_path, lambda tensors: {key.replace("oft_R.weight", "oft_r"): t for key, t in tensors.items()})
    with pytest.raises(lib.PeftError, match=r"are of peft <= 0\.15 and mean another R\. Train it again."):
        load(lib, case, tmp_path)
