"""Build the same adapted model in two implementations, move it, run it, and compare."""

import copy
import json
import warnings
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from .cases.case import Case

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def seed(value: int):
    """torch.manual_seed for a machine of which only the CPU is used: a hundred times as fast."""
    torch.default_generator.manual_seed(value)


def tolerance(case: Case, dtype: torch.dtype) -> float:
    if dtype == torch.float64 and case.tolerance:
        return case.tolerance
    if dtype == torch.float64 and case.base.float32_inside:
        return 2e-6
    return TOLERANCE[dtype]


def config(lib, case: Case, **changes):
    """The case's config as `lib`'s own class. `changes` replace fields."""
    return getattr(lib, case.config)(**{**copy.deepcopy(case.kwargs), **changes})


def adapt(lib, case: Case, base=None, dtype=torch.float32, at=0, **options):
    """The case's base model with a fresh adapter from `lib`, in eval mode, drawn at the global seed `at`."""
    base = case.base.build(dtype) if base is None else base
    seed(at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lib.get_peft_model(base, config(lib, case), **options).eval()


def add(lib, model, case: Case, name: str, at=1, **changes):
    """Add the case's second adapter under `name`."""
    seed(at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(name, config(lib, case, **{**(case.second or {}), **changes}))
    return model.eval()


def move(model, scale=0.1, only=lambda name, p: p.requires_grad):
    """Add noise to every trainable tensor, drawn from its name: the same in every implementation."""
    for name, p in model.named_parameters():
        if only(name, p):
            g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            with torch.no_grad():
                p.add_(scale * torch.randn(p.shape, generator=g).to(p.dtype))
    return model


def copy_values(source, target):
    """Write all of source's tensors into target, by name. Names and shapes must be the same."""
    with torch.no_grad():
        values = source.state_dict()
        same_names(target.state_dict(), values)
        target.load_state_dict(values)
    return target


MADE: dict = {}  # of one case alone


def shared(case: Case, what, make):
    """What `make` gives, made once for all tests of the case in a file: conftest.py runs them one after another."""
    if MADE.get("case") is not case:
        MADE.clear()
        MADE["case"] = case
    if what not in MADE:
        MADE[what] = make()
    return MADE[what]


def pair(ref, lib, case: Case, dtype=torch.float32, second=False):
    """The case in `ref` and `lib`, moved, with equal values. With `second`, two adapters: "default" and "other"."""
    models = []
    for module in (ref, lib):
        model = adapt(module, case)
        if second:
            add(module, model, case, "other")
        models.append(model)
    theirs, ours = models
    move(theirs, case.scale, only=adapter_or_trainable)
    copy_values(theirs, ours)
    return theirs.to(dtype), ours.to(dtype)


def adapter_or_trainable(name, p):
    return p.is_floating_point() and (p.requires_grad or ".other" in name)


def inputs(case: Case, dtype=torch.float32) -> dict:
    return {**case.base.inputs(dtype), **copy.deepcopy(case.inputs)}


def tensors(output) -> dict[str, torch.Tensor]:
    """The floating tensors of a model's output, by name."""
    if torch.is_tensor(output):
        return {"output": output}
    return {k: v for k, v in output.items() if torch.is_tensor(v) and v.is_floating_point()}


def run(model, batch: dict, **options) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {k: v.clone() for k, v in tensors(call(model, {**batch, **options})).items()}


def call(model, batch: dict):
    """model(**batch). The plain PeftModel does not know of task_ids, its tuner does."""
    return (model.base_model if type(model).__name__ == "PeftModel" and "task_ids" in batch else model)(**batch)


def weighable(case: Case, out: dict) -> dict:
    """The outputs that a merged weight must reproduce."""
    return {k: v for k, v in out.items() if not (case.own_loss and k == "loss")}


def gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    """Gradients of a fixed nonlinear function of the output: by trainable parameter, and by input as `input:name`."""
    batch = {k: v.clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
             for k, v in batch.items()}
    model.zero_grad()
    out = tensors(call(model, batch))
    sum((v * torch.sin(v + 1)).sum() for v in out.values()).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    grads |= {f"input:{k}": v.grad for k, v in batch.items() if torch.is_tensor(v) and v.requires_grad}
    model.zero_grad()
    return grads


def snapshot(model) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------- comparisons
def same_names(got, want):
    missing, extra = [k for k in want if k not in got], [k for k in got if k not in want]
    assert not missing and not extra, f"missing: {missing}\nunexpected: {extra}"


def close(got: dict, want: dict, tolerance: float):
    """Equal within `tolerance` of the largest entry of the tensor that was wanted."""
    same_names(got, want)
    assert want, "nothing to compare"
    for name, w in want.items():
        g = got[name]
        assert g.shape == w.shape, f"{name}: shape {tuple(g.shape)}, wanted {tuple(w.shape)}"
        assert g.dtype == w.dtype, f"{name}: {g.dtype}, wanted {w.dtype}"
        if not w.is_floating_point():
            assert torch.equal(g, w), f"{name}: not equal"
        elif w.numel():
            g, w = g.double(), w.double()
            assert torch.isfinite(w).all() and torch.isfinite(g).all(), f"{name}: not finite"
            off = (g - w).abs().max().item()
            scale = max(w.abs().max().item(), 1e-3)
            assert off <= tolerance * scale, f"{name}: off by {off:.3e}, allowed {tolerance * scale:.3e}"


def differ(a: dict, b: dict, tolerance: float) -> bool:
    try:
        close(a, b, tolerance)
    except AssertionError:
        return True
    return False


def without_labels(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}


def bits(t: torch.Tensor) -> bytes:
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def identical(got: dict, want: dict):
    """The same names with the same bits."""
    same_names(got, want)
    for name, w in want.items():
        g = got[name]
        assert g.dtype == w.dtype, f"{name}: {g.dtype}, wanted {w.dtype}"
        assert g.shape == w.shape, f"{name}: shape {tuple(g.shape)}, wanted {tuple(w.shape)}"
        if bits(g) != bits(w):
            n = int((g != w).sum())
            raise AssertionError(f"{name}: {n} of {w.numel()} entries have other bits")


def saved(model, path: Path, **options) -> tuple[dict[str, torch.Tensor], dict]:
    """Save the model; the tensors and the config of the default adapter as they stand on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(path), **options)
    return stored(path)


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in memory of their own: the file may be written to afterwards."""
    return safetensors.torch.load(path.read_bytes())


def stored(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return read(path / "adapter_model.safetensors"), json.loads((path / "adapter_config.json").read_text())


def same_config(got: dict, want: dict):
    """Equal JSON values; the version of the writer and the order of a list that stands for a set do not count."""
    unordered = {"target_modules", "exclude_modules", "modules_to_save", "feedforward_modules", "target_parameters",
                 "layers_pattern"}

    def plain(config):
        return {k: sorted(set(v)) if k in unordered and isinstance(v, list) else v
                for k, v in config.items() if k != "peft_version"}

    got, want = plain(got), plain(want)
    same_names(got, want)
    wrong = {k: (got[k], want[k]) for k in want if got[k] != want[k] or type(got[k]) is not type(want[k])}
    assert not wrong, f"field: (got, wanted): {wrong}"


def quantised_linear(bits):
    """One of bitsandbytes' layers, 64 to 32 features, with the same drawn weights whichever it is."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 32)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def on_four_bits(lib, **fields):
    """A moved LoRA with `fields` on one of bitsandbytes' 4-bit layers, in train mode, and an input for it (5, 64)."""
    bnb = pytest.importorskip("bitsandbytes")
    base = torch.nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    return move(lib.get_peft_model(base, lib.LoraConfig(target_modules=["0"], **fields))).train(), torch.randn(5, 64)


def assert_adds_its_delta(model, x):
    """In eval mode the adapted layer adds x times its delta to what the frozen layer gives."""
    layer = model.eval().base_model.model[0]
    added = model(x) - layer.base_layer(x)
    torch.testing.assert_close(added, x @ layer.get_delta_weight("default").T, rtol=1e-3, atol=1e-4)
