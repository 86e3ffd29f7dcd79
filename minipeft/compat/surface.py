"""What stands at each of peft's dotted paths when minipeft takes its place, and how it gets there: see the package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..core import files, state
from ..core.adapter import ADAPTERS
from ..core.bases import Attention, Base, Conv, Conv1D, Embedding, Linear, Param
from ..core.boxes import BufferDict
from ..core.config import CONFIGS, PEFT_VERSION, PeftType
from ..core.errors import CheckpointError, PeftWarning, UnsupportedFeatureError
from ..core.layer import Layer
from ..core.state import LoadReport, infer_device
from ..methods import lokr
from ..methods.adalora import budget as adalora_budget
from ..methods.lora import arrow, loftq, merging
from ..methods.lora import configs as lora_configs
from ..methods.lora import corda as lora_corda
from ..methods.lora import eva as lora_eva
from ..methods.lora import gradient as lora_ga
from ..methods.lycoris import LycorisConfig
from ..methods.prompts import prefixes
from ..methods.shadow import backbone
from ..model import checkpoint, defaults, experts, mixed, status, utils
from ..model.prompt import PROMPTS
from ..model.tuner import BaseTuner, tuner_class
from ..model.wrappers import ModulesToSaveWrapper, TrainableTokensWrapper
from . import conversion, functional, helpers, hotswap, inside, intruders, kappa, optimizers

HOME: Any = importlib.import_module("..", __package__)  # minipeft, by whatever name it is there
PARTS = ("config", "model", "layer")  # of a method's folder in peft
CONSTANTS = """DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND
    MIN_TARGET_MODULES_FOR_OPTIMIZATION SEQ_CLS_HEAD_NAMES"""
FURTHER = (  # what users import from inside peft: path, where it is here, and its names
    ("peft.helpers", kappa, "KappaTuneSelector find_kappa_target_modules"),
    ("peft.tuners.adalora", adalora_budget, "RankAllocator"),
    ("peft.tuners.adamss.asa_callback", inside, "AdamssAsaCallback"),
    ("peft.tuners.cartridge.utils", prefixes, """compose_cartridge_adapters initialize_kv_prefix_from_text
        initialize_kv_prefix_from_past_key_values prompt_embeddings_from_past_key_values"""),
    ("peft.tuners.lokr", lokr, "factorization"),
    ("peft.tuners.lora", HOME, """convert_to_lora save_as_lora create_arrow_model preprocess_loraga
        get_eva_state_dict initialize_lora_eva_weights"""),
    ("peft.tuners.lora.arrow", arrow, "create_arrow_model"),
    ("peft.tuners.lora.conversion", conversion, "convert_to_lora save_as_lora"),
    ("peft.tuners.lora.corda", lora_corda, "preprocess_corda"),
    ("peft.tuners.lora.eva", lora_eva, """get_eva_state_dict initialize_lora_eva_weights forward_fn_dict
        prepare_model_inputs_fn_language_modeling prepare_layer_inputs_fn_language_modeling"""),
    ("peft.tuners.lora.intruders", intruders, "reduce_intruder_dimension"),
    ("peft.tuners.lora.loraga", lora_ga, "preprocess_loraga"),
    ("peft.tuners.shadow", backbone, "ShadowCache"),
    ("peft.tuners.tuners_utils", inside, """check_target_module_exists inspect_matched_modules
        _find_minimal_target_modules _maybe_include_all_linear_layers"""),
    ("peft.utils", inside, CONSTANTS),
    ("peft.utils", loftq, "replace_lora_weights_loftq"),
    ("peft.utils.constants", inside, CONSTANTS),
    ("peft.utils.integrations", inside, "init_empty_weights skip_init_on_device"),
    ("peft.utils.loftq_utils", loftq, "replace_lora_weights_loftq"),
    ("peft.utils.other", inside, "_get_module_names_tied_with_embedding _get_no_split_modules"),
)
LIBRARIES = {  # what `peft.import_utils` asks for, by the name in `is_..._available`
    **{name: name for name in ("aqlm", "diffusers", "eetq", "gptqmodel", "hqq", "optimum", "torchao")},
    **{"bnb": "bitsandbytes", "bnb_4bit": "bitsandbytes", "inc": "neural_compressor", "te": "transformer_engine"},
}
LOOKS_ONCE = ("transformers", "accelerate", "diffusers")  # what looks for peft when it is imported, and remembers

# ---------------------------------------------------------------------------------------------------- kinds of layers


class _Kind(type):
    """The type of classes that exist for `isinstance` alone: they contain whatever `fits`."""

    fits: Callable[[Any], bool]

    def __instancecheck__(cls, x: Any) -> bool:
        return cls.fits(x)


def _kind(name: str, fits: Callable[[Any], bool], parent: type = Layer) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedFeatureError(f"{name} is for isinstance only; layers are made by get_peft_model.")

    doc = f"What peft calls {name}; for `isinstance` only."
    return _Kind(name, (parent,), {"fits": staticmethod(fits), "__init__": refuse, "__doc__": doc})


def _layer_kind(name: str, *methods: PeftType, base: Callable[[Base], bool] = lambda base: True) -> type:
    return _kind(name, lambda x: isinstance(x, Layer) and x.method in methods and base(x.base))


def _conv(cls: type) -> Callable[[Base], bool]:
    return lambda base: isinstance(base, Conv) and isinstance(base.leaf, cls)


LAYER_KINDS = {
    "Linear": lambda base: type(base) in (Linear, Conv1D),
    "Embedding": lambda base: isinstance(base, Embedding),
    "Conv1d": _conv(nn.Conv1d),
    "Conv2d": _conv(nn.Conv2d),
    "Conv3d": _conv(nn.Conv3d),
    "MultiheadAttention": lambda base: isinstance(base, Attention),
    "ParamWrapper": lambda base: isinstance(base, Param),
    "Linear4bit": lambda base: type(base).__name__ == "Linear4bit",
    "Linear8bitLt": lambda base: type(base).__name__ == "Linear8bitLt",
}
AuxiliaryTrainingWrapper = _kind(
    "AuxiliaryTrainingWrapper", lambda x: isinstance(x, (ModulesToSaveWrapper, TrainableTokensWrapper)), nn.Module
)
DetachedShadowModel = _kind("DetachedShadowModel", lambda x: isinstance(x, backbone.Detached), nn.Module)


# ------------------------------------------------------------------------------------------------- what stands where
def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
    """How transformers gets from the keys of a checkpoint to those of a model with injected adapters.

    `weight_conversions` are the model's own: its renamings apply to adapters too, and those of its converters that
    stack the weights of experts, which then stack factors (model/experts.py). As in peft, both parameters of the
    experts are taken to have adapters, that of gate_up_proj inside of that of down_proj.
    """
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

    class Stack(ConversionOps):
        def __init__(self, of_A: bool):
            self.of_A = of_A

        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
            value = experts.stacked([input_dict.get(pattern, []) for pattern in source_patterns], self.of_A)
            if value is None:
                raise CheckpointError(f"The factors of the experts, {source_patterns}, do not go together.")
            return {target_patterns[0]: value}

    def factors(converter: Any) -> Iterator[Any]:
        place, _, parameter = converter.target_patterns[0].rpartition(".")
        inside = {"gate_up_proj": ".base_layer", "down_proj": ""}.get(parameter)
        for slot in ("lora_A", "lora_B") if inside is not None and experts.stacks(converter) else ():
            tail = f"{slot}.{adapter_name}.weight"
            sources = [f"{pattern.removesuffix('.weight')}.{tail}" for pattern in converter.source_patterns]
            yield WeightConverter(sources, f"{place}{inside}.{tail}", [Stack(slot == "lora_A")])

    kinds = [peft_config.peft_type] if peft_config is not None else list(ADAPTERS)
    return [
        WeightRenaming(r"^base_model\.model\.", ""),
        WeightRenaming(r"lora_magnitude_vector$", "lora_magnitude_vector.weight"),
        *(
            WeightRenaming(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}")
            for prefix in sorted({HOME.PEFT_TYPE_TO_PREFIX_MAPPING[kind] for kind in kinds})
        ),
        *(c for c in weight_conversions or () if isinstance(c, WeightRenaming)),
        *(f for c in weight_conversions or () if isinstance(c, WeightConverter) for f in factors(c)),
    ]


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadReport:
    """What peft's function of that name does: missing and unexpected keys are returned, for the caller to judge.

    Those that are missing are live keys of the adapter, the others stand as they were given. Tensors of the model's own
    that the checkpoint names, as the biases of an adapter that trained them, are written into the model. All else is
    refused as by minipeft's own function.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The checkpoint does not fit", PeftWarning)
        report = checkpoint.set_peft_model_state_dict(
            model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage, strict=False
        )
    prompt = model.peft_config[adapter_name].is_prompt_learning
    entries = () if prompt else checkpoint.entries_of_model(model, adapter_name)
    live = {state.strip(entry.saved): entry.live for entry in entries}
    given = {state.strip(state.unwrapped(key)): key for key in peft_model_state_dict}
    missing, unexpected = [live.get(key, key) for key in report[0]], [given.get(key, key) for key in report[1]]
    held = model.state_dict(keep_vars=True) if unexpected else {}
    if own := {key: peft_model_state_dict[key] for key in unexpected if key in held}:
        model.load_state_dict(own, strict=False)
    return LoadReport(missing, [key for key in unexpected if key not in own])


def _available(*names: str) -> Callable[[], bool]:
    return lambda: all(importlib.util.find_spec(name) is not None for name in names)


def _public(module: Any) -> dict[str, Any]:
    """What a module of minipeft defines or hands on under a name that does not begin with an underscore."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if name[0] != "_"]
    found = {name: getattr(module, name) for name in names}
    return {name: x for name, x in found.items() if getattr(x, "__module__", HOME.__name__).startswith(HOME.__name__)}


def _methods() -> Iterator[tuple[str, dict[str, Any]]]:
    """The folder of each method in peft, and what it offers."""
    everything = {name: getattr(HOME, name) for name in HOME.__all__}
    for kind, config in CONFIGS.items():
        if config.__module__.startswith(f"{HOME.__name__}.methods."):
            module = sys.modules[ADAPTERS.get(kind, [config])[0].__module__]
            offers = {n: x for n, x in everything.items() if getattr(x, "__module__", None) == module.__name__}
            for cls in (config, PROMPTS.get(kind) or tuner_class(kind)):
                if cls is not None:
                    offers[cls.__name__] = cls
            if kind in ADAPTERS:
                name = config.__name__.removesuffix("Config") + "Layer"
                kinds = (kind, PeftType.ADALORA) if kind == PeftType.LORA else (kind,)  # peft: an AdaLoraLayer is both
                offers[name] = _layer_kind(name, *kinds)
                table = f"TRANSFORMERS_MODELS_TO_{kind.value.replace('_', '')}_TARGET_MODULES_MAPPING"
                offers[table] = getattr(defaults, table)
                offers |= {name: _layer_kind(name, kind, base=fits) for name, fits in LAYER_KINDS.items()}
            yield module.__name__.rpartition(".")[2], offers


def offered() -> dict[str, dict[str, Any]]:
    """What each dotted path of peft offers, by name."""
    everything = {name: getattr(HOME, name) for name in HOME.__all__}
    tuners_utils = {**_public(functional), "BaseTunerLayer": Layer, "BaseTuner": BaseTuner}
    other = {
        **_public(utils),
        **{name: getattr(files, name) for name in ("CONFIG_NAME", "WEIGHTS_NAME", "SAFETENSORS_WEIGHTS_NAME")},
        "_get_submodules": utils._get_submodules,
        "infer_device": infer_device,
        "ModulesToSaveWrapper": ModulesToSaveWrapper,
        "TrainableTokensWrapper": TrainableTokensWrapper,
        "AuxiliaryTrainingWrapper": AuxiliaryTrainingWrapper,
        **{name: value for name, value in everything.items() if name.startswith("TRANSFORMERS_MODELS_TO_")},
    }
    types = {name: everything[name] for name in ("PeftType", "TaskType")}
    errors = {name: everything[name] for name in ("PeftError", "NoMatchingPeftModuleError")}
    saving = {name: value for name, value in everything.items() if name.endswith(("state_dict", "peft_weights"))}
    mapping = {name: value for name, value in everything.items() if name.startswith("PEFT_TYPE_TO_")}
    backends = {f"is_{name}_available": _available(library) for name, library in LIBRARIES.items()}
    paths: dict[str, dict[str, Any]] = {
        "peft": {**everything, "__version__": PEFT_VERSION},
        "peft.auto": {name: value for name, value in everything.items() if name.startswith("AutoPeftModel")},
        "peft.config": {name: everything[name] for name in ("PeftConfig", "PromptLearningConfig")}
        | {"PeftConfigMixin": everything["PeftConfig"]},
        "peft.peft_model": {name: value for name, value in everything.items() if name.startswith("Peft")}
        | _public(status),
        "peft.mixed_model": {"PeftMixedModel": everything["PeftMixedModel"]},
        "peft.mapping": {**mapping, **{n: everything[n] for n in ("get_peft_config", "inject_adapter_in_model")}},
        "peft.mapping_func": {"get_peft_model": everything["get_peft_model"]},
        "peft.import_utils": backends,
        "peft.functional": _public(functional),
        "peft.helpers": _public(helpers),
        "peft.optimizers": _public(optimizers),
        "peft.tuners": dict(everything),
        "peft.tuners.tuners_utils": tuners_utils,
        "peft.tuners.lycoris_utils": {"LycorisConfig": LycorisConfig},
        "peft.tuners.mixed": _public(mixed),
        "peft.tuners._buffer_dict": {"BufferDict": BufferDict},
        "peft.utils": {**other, **types, **errors, **saving, "PeftWarning": everything["PeftWarning"]},
        "peft.utils.other": other,
        "peft.utils.peft_types": types,
        "peft.utils.save_and_load": saving,
        "peft.utils.merge_utils": _public(merging),
        "peft.utils.constants": other,
        "peft.utils.error": errors,
        "peft.utils.warning": {"PeftWarning": everything["PeftWarning"]},
        "peft.utils.hotswap": _public(hotswap),
        "peft.utils.transformers_weight_conversion": {"build_peft_weight_mapping": build_peft_weight_mapping},
    }
    for name, offers in _methods():
        paths[f"peft.tuners.{name}"] = offers
    paths["peft.tuners.lora"].update(_public(lora_configs))
    for path, home, names in FURTHER:
        paths.setdefault(path, {}).update({name: getattr(home, name) for name in names.split()})
    for offers in paths.values():
        if "set_peft_model_state_dict" in offers:
            offers["set_peft_model_state_dict"] = set_peft_model_state_dict
    paths["peft.tuners.shadow"]["DetachedShadowModel"] = DetachedShadowModel
    return paths


def same_as() -> dict[str, str]:
    """Further dotted paths, and the one that offers the same."""
    found = {f"peft.tuners.{name}.{part}": f"peft.tuners.{name}" for name, _ in _methods() for part in PARTS}
    found |= {f"peft.optimizers.{name}": "peft.optimizers" for name in ("loraplus", "lorafa", "riemannian")}
    same = {"lora.bnb": "lora", "mixed.model": "mixed", "shadow.layers": "shadow"}
    return found | {f"peft.tuners.{path}": f"peft.tuners.{home}" for path, home in same.items()}


# ---------------------------------------------------------------------------------------------------------- installing
class _Installed(importlib.metadata.Distribution):
    """What `importlib.metadata` finds as the distribution peft."""

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: peft\nVersion: {PEFT_VERSION}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


class _Finder(importlib.metadata.DistributionFinder):
    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        if context is not None and context.name == "peft":
            yield _Installed()

    def find_spec(self, *args: Any) -> None:
        return None


def install() -> None:
    """Let `import peft`, and all that comes from it, find minipeft in this process. Once done it stays.

    Raises `ImportError`, with nothing changed, when the real peft is imported already, or when peft is not installed
    and transformers, accelerate or diffusers are imported already: they have noted that there is none.
    """
    if (present := sys.modules.get("peft")) is not None:
        if getattr(present, "__file__", None) == __file__:
            return
        raise ImportError("peft itself is imported already; call minipeft.compat.install() before anything imports it.")
    early = [name for name in LOOKS_ONCE if name in sys.modules]
    if early and importlib.util.find_spec("peft") is None:
        raise ImportError(f"Call minipeft.compat.install() before {', '.join(early)}: what they know now is: no peft.")
    modules: dict[str, ModuleType] = {}
    for path, offers in offered().items():
        module = ModuleType(path, f"What code that was written for {path} finds in minipeft.")
        module.__spec__ = ModuleSpec(path, None, origin=__file__, is_package=True)
        vars(module).update(__file__=__file__, __path__=[], **offers)
        if path.startswith("peft.utils"):
            vars(module)["__getattr__"] = defaults.__getattr__  # PEFT's tables of targets
        modules[path] = module
    modules |= {path: modules[home] for path, home in same_as().items() if path not in modules}
    for path, module in modules.items():
        head, _, last = path.rpartition(".")
        if head:
            vars(modules[head]).setdefault(last, module)
    sys.meta_path.insert(0, _Finder())
    sys.modules.update(modules)
