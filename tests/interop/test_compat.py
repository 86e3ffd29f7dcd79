"""minipeft under the name of peft: dotted paths, `isinstance`, and transformers' own use of adapters.

Whatever needs `import peft` to find minipeft runs in a process of its own.
"""

import importlib
import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

import minipeft
from minipeft import compat

from . import harness as H
from .cases import CASES
from .processes import ROOT, SCRIPTS, close, here, last_line, run

OFFERED = compat.offered()
IMPORTS = """
    from peft import LoKrConfig, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, PeftType, PrefixTuningConfig
    from peft import PromptLearningConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
    from peft import prepare_model_for_kbit_training, set_peft_model_state_dict, AutoPeftModelForCausalLM
    from peft.config import PeftConfig
    from peft.functional import delete_adapter, set_adapter, cast_adapter_dtype, set_requires_grad
    from peft.helpers import check_if_peft_model, disable_input_dtype_casting, rescale_adapter_scale
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.mapping_func import get_peft_model
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
    from peft.optimizers.loraplus import create_loraplus_optimizer
    from peft.peft_model import PeftModelForCausalLM, get_layer_status
    from peft.tuners import LoraModel, PromptEmbedding
    from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel
    from peft.tuners.adalora.layer import RankAllocator
    from peft.tuners.ia3 import IA3Layer, IA3Model
    from peft.tuners.loha.layer import LoHaLayer
    from peft.tuners.lokr.layer import LoKrLayer, factorization
    from peft.tuners.lora import Conv2d, Embedding, Linear, LoraConfig, LoraLayer, LoraModel
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    from peft.tuners.lora.config import LoftQConfig
    from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.eva import forward_fn_dict, get_eva_state_dict, initialize_lora_eva_weights
    from peft.tuners.lora.loraga import preprocess_loraga
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.prompt_tuning import PromptEmbedding, PromptTuningConfig
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, _get_submodules, get_peft_model_state_dict, infer_device
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, TrainableTokensWrapper
    from peft.utils.constants import CONFIG_NAME, TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    from peft.utils.hotswap import check_hotswap_configs_compatible, hotswap_adapter, hotswap_adapter_from_state_dict
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap
    from peft.utils.merge_utils import dare_ties, ties
    from peft.utils.other import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper, fsdp_auto_wrap_policy
    from peft.utils.peft_types import PeftType, TaskType
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
    from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
""".replace("\n    ", "\n")  # what transformers, diffusers, accelerate, TRL and users import


def in_place(code):
    """`code` with `import peft` finding minipeft; what it prints last."""
    return run("-c", f"import minipeft.compat\nminipeft.compat.install()\n{code}").stdout.strip()


# --------------------------------------------------------------------------------------------------------------- names
def test_imports_of_other_libraries(ref):
    exec(IMPORTS, {})
    out = in_place(f"{IMPORTS}\nimport peft\nprint(PeftModel.__module__, LoraLayer.__module__, peft.__version__)")
    assert out == f"minipeft.model.peft_model minipeft.compat.surface {ref.__version__}"


def theirs_at(path, name=None):
    """peft's module of that path, or what it has under a name, there or in `.layer`."""
    for place in (path, f"{path}.layer"):
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError:
            continue
        if name is None or getattr(module, name, None) is not None:
            return module if name is None else getattr(module, name)
    return None


def test_paths_are_those_of_peft(ref):
    """Each path is one of peft's, and what both have there is a class in both or in none."""
    for path in [*OFFERED, *compat.same_as()]:
        offers, module = OFFERED[compat.same_as().get(path, path)], theirs_at(path)
        assert module or path.endswith(".layer"), path
        for name, value in offers.items():
            if getattr(module, name, None) is not None:
                assert isinstance(getattr(module, name), type) == isinstance(value, type), (path, name)


def test_layer_classes_are_all_there(ref):
    """For each method of minipeft, what peft calls its configuration, its model and its layer."""
    for folder, _ in compat._methods():
        path = f"peft.tuners.{folder}"
        public = {
            n: x for n, x in vars(theirs_at(path)).items() if isinstance(x, type) and x.__module__.startswith(path)
        }
        wanted = {n for n in public if n.endswith(("Config", "Model")) and hasattr(minipeft, n)}
        layer = ref.tuners.tuners_utils.BaseTunerLayer
        wanted |= {n for n, x in public.items() if n.endswith("Layer") and issubclass(x, layer)}
        assert wanted <= set(OFFERED[path]) and (wanted or path.endswith("adaption_prompt")), path


@pytest.mark.parametrize("table", ["CONFIG", "TUNER", "PREFIX"])
def test_tables(table, ref):
    """Of the methods that both have; X-LoRA's prefix is that of the LoRA layers it weighs."""
    name = f"PEFT_TYPE_TO_{table}_MAPPING"
    ours, theirs = (
        {k.value: getattr(v, "__name__", v) for k, v in getattr(importlib.import_module(f"{m}.mapping"), name).items()}
        for m in ("minipeft", "peft")
    )
    assert len(ours) > 40 and set(ours) <= set(theirs)
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different <= ({"XLORA", "FROD"} if table == "PREFIX" else set())


def first_of_each():
    """One case for each method, and of LoRA for each base model."""
    found = {}
    for case in CASES:
        if not case.prompt:
            found.setdefault((case.method, case.base if case.method == "lora" else None), case)
    return list(found.values())


KINDS = [
    (path, name)
    for path, offers in OFFERED.items()
    for name, value in offers.items()
    if isinstance(value, compat._Kind)
]


@pytest.fixture(scope="module")
def their_kinds(ref):
    return {(path, kind): theirs_at(path, kind) for path, kind in KINDS}


@pytest.mark.parametrize("case", first_of_each(), ids=lambda case: case.id)
def test_isinstance(case, lib, ref, is_ref, their_kinds):
    """Every layer is an instance of what it is one of in peft."""
    if is_ref:
        pytest.skip("about minipeft alone")
    ours, theirs = H.adapt(lib, case), dict(H.adapt(ref, case).named_modules())
    found = set()
    for name, module in ours.named_modules():
        if name in theirs and hasattr(module, "merged_adapters"):
            for path, kind in KINDS:
                if (cls := their_kinds[path, kind]) is not None:
                    is_one = isinstance(module, OFFERED[path][kind])
                    assert is_one == isinstance(theirs[name], cls), (name, path, kind)
                    found |= {kind} if is_one else set()
            assert isinstance(module, OFFERED["peft.tuners.tuners_utils"]["BaseTunerLayer"]) == isinstance(
                theirs[name], ref.tuners.tuners_utils.BaseTunerLayer
            )
    layer = ref.tuners.tuners_utils.BaseTunerLayer
    assert found or not any(isinstance(module, layer) for module in theirs.values())


def test_kinds_are_for_isinstance():
    kind = OFFERED["peft.tuners.lora"]["LoraLayer"]
    assert issubclass(kind, OFFERED["peft.tuners.tuners_utils"]["BaseTunerLayer"])
    assert not isinstance(nn.Linear(1, 1), kind)
    with pytest.raises(NotImplementedError, match="isinstance"):
        kind(nn.Linear(1, 1))


# ---------------------------------------------------------------------------------------------------- what a layer says
VALUES = "active_adapters merged_adapters disable_adapters merged r lora_alpha scaling use_dora use_rslora lora_bias"
FEATURES = ["in_features", "out_features"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.conv, self.out = nn.Embedding(9, 6), nn.Conv2d(1, 4, 3), nn.Linear(16, 5)

    def forward(self, ids):
        return self.out(self.conv(self.words(ids).unsqueeze(1)).flatten(1))


def says(lib, rslora):
    """What three layers say of themselves, over a life of their own."""
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.2, "use_rslora": rslora, "init_lora_weights": False}
    model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["words", "conv", "out"], **config))
    torch.manual_seed(1)
    model.add_adapter("b", lib.LoraConfig(target_modules=["out"], **{**config, "r": 4}))
    layers, seen = [getattr(model.base_model.model, name) for name in ("words", "conv", "out")], []

    def note():
        for layer in layers:
            names = VALUES.split() + FEATURES * (layer is not layers[0])
            said = {name: getattr(layer, name) for name in names}
            said["dropout"] = {name: layer.lora_dropout[name].p for name in layer.lora_dropout}
            said["base"] = type(layer.get_base_layer()).__name__
            seen.append(json.loads(json.dumps(said, default=list)))
            seen[-1]["deltas"] = {name: layer.get_delta_weight(name).detach() for name in layer.scaling}

    note()
    for layer in layers[1:]:  # PEFT: embeddings are not scaled
        layer.scale_layer(3.0)
    note()
    for layer in layers[1:]:
        layer.unscale_layer(2.0)
    note()
    for layer in layers[1:]:
        layer.unscale_layer()
    layers[2].set_scale("b", 0.25)
    note()
    layers[2].set_adapter(["default", "b"])
    layers[2].merge()
    note()
    layers[2].unmerge()
    layers[1].enable_adapters(False)
    note()
    return seen


@pytest.mark.parametrize("rslora", [False, True])
def test_what_a_layer_says(rslora, lib, ref):
    for ours, theirs in zip(says(lib, rslora), says(ref, rslora), strict=True):
        torch.testing.assert_close(ours.pop("deltas"), theirs.pop("deltas"))
        assert ours == theirs


@pytest.mark.parametrize("names", [None, "LlamaMLP,LlamaAttention"])
def test_fsdp_auto_wrap_policy(names, lib, ref, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    if names:
        monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", names)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "vocab_size": 31}
    for config in ("LoraConfig", "PromptTuningConfig"):
        seen = []
        for side in (lib, ref):
            options = {"num_virtual_tokens": 3} if config == "PromptTuningConfig" else {"modules_to_save": ["lm_head"]}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=2))
            model = side.get_peft_model(model, getattr(side, config)(task_type="CAUSAL_LM", **options))
            make = OFFERED["peft.utils.other"]["fsdp_auto_wrap_policy"] if side is minipeft else None
            policy = (make or importlib.import_module("peft.utils.other").fsdp_auto_wrap_policy)(model)
            assert all(policy(module=m, recurse=True, nonwrapped_numel=0) for m in model.modules())
            wraps = {n for n, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)}
            seen.append(wraps)
        assert seen[0] == seen[1] and len(seen[0]) > 2
    if names and lib is minipeft:
        monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Nothing")
        with pytest.raises(ValueError, match="Nothing"):
            minipeft.utils.fsdp_auto_wrap_policy(model)


# ---------------------------------------------------------------------------------------------------------- installing
def test_never_by_itself():
    code = "import sys, minipeft, minipeft.compat\nprint([m for m in sys.modules if m.split('.')[0] == 'peft'])"
    assert run("-c", code).stdout.strip() == "[]"


def test_twice_is_once():
    code = "first = __import__('peft')\nminipeft.compat.install()\nimport peft, peft.tuners.lora\nprint(peft is first)"
    assert in_place(code) == "True"


def test_refused_beside_peft(ref):
    with pytest.raises(ImportError, match="peft itself is imported already"):
        compat.install()
    assert sys.modules["peft"] is ref


def test_what_is_not_offered_cannot_be_imported():
    tries = ("from peft.helpers import Rescaling", "import peft.tuners.nothing")
    code = "".join(f"try:\n    {line}\nexcept ImportError as error:\n    print(error)\n" for line in tries)
    first, second = in_place(code).splitlines()
    assert "Rescaling" in first and "No module named" in second


# ---------------------------------------------------------------------------------------------------------- in the wild
@pytest.fixture(scope="module")
def no_peft(tmp_path_factory):
    """Options and environment of a Python that has all packages but peft."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("peft", "minipeft", "__editable__")):
            (folder / entry.name).symlink_to(entry)
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}


def test_adapters_of_transformers(ref, no_peft):
    """model.add_adapter, load_adapter and their like; once with peft, and once where peft is not even installed."""
    pytest.importorskip("transformers")
    theirs = here(SCRIPTS / "injected.py")
    ours = last_line(run("-S", "-m", "minipeft.compat", SCRIPTS / "injected.py", **no_peft))
    assert (ours["library"], theirs["library"]) == ("minipeft", "peft")
    close(ours["seen"], theirs["seen"])
    assert len(ours["seen"]) > 15


def test_adapters_of_diffusers(ref):
    """add_adapter, set_adapters with weights, fusing, files in diffusers' own layout, and hot swapping, on a U-Net."""
    pytest.importorskip("diffusers")
    ours, theirs = last_line(run("-m", "minipeft.compat", SCRIPTS / "unet.py")), here(SCRIPTS / "unet.py")
    assert (ours["library"], theirs["library"]) == ("minipeft", "peft")
    close(ours["seen"], theirs["seen"])
    outputs = {tuple(step["out"]) for step in ours["seen"]}
    assert len(ours["seen"]) == 15 and len(outputs) >= 7, "adapters and their scales make a difference"


def test_too_late_where_there_is_no_peft(no_peft):
    pytest.importorskip("transformers")
    code = "import transformers, minipeft.compat\nminipeft.compat.install()"
    done = run("-S", "-c", code, check=False, **no_peft)
    assert done.returncode and "before transformers" in done.stderr


def test_found_where_there_is_no_peft(no_peft):
    """transformers and accelerate look for an importable peft and its version."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    code = """
import minipeft.compat
minipeft.compat.install()
from accelerate.utils import is_peft_available as in_accelerate, is_peft_model
from transformers.trainer_utils import _is_peft_model
from transformers.utils import check_peft_version, is_peft_available
import peft, torch
check_peft_version("0.20.0")
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), peft.LoraConfig(target_modules=["0"]))
print(is_peft_available(), in_accelerate(), _is_peft_model(model), is_peft_model(model))
"""
    assert run("-S", "-c", code, **no_peft).stdout.split() == ["True"] * 4
