"""Loaded and saved again, an adapter's files are what peft wrote, byte for byte where peft's bytes are defined."""

import json

from . import harness as H
from .cases import CASES, each_case

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


FIRST = {case.method: case.id for case in reversed(CASES) if case.id.endswith("/plain")}


@each_case(lambda case: case.id in FIRST.values())
def test_same_bytes_as_peft(case, lib, ref, tmp_path):
    H.saved(H.move(H.adapt(ref, case), case.scale), tmp_path / "peft")
    H.seed(0)
    loaded = lib.PeftModel.from_pretrained(case.base.build(), str(tmp_path / "peft"))
    for name in ("one", "two"):
        H.saved(loaded, tmp_path / name)
    want, one, two = (tmp_path / name for name in ("peft", "one", "two"))
    assert (one / WEIGHTS).read_bytes() == (want / WEIGHTS).read_bytes()
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()
    assert (one / CONFIG).read_bytes() == (two / CONFIG).read_bytes()
    layouts = [(folder / CONFIG).read_text() for folder in (one, want)]
    assert [json.dumps(json.loads(text), indent=2, sort_keys=True) for text in layouts] == layouts
