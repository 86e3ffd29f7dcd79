"""minipeft in the place of peft: for code that says `from peft.tuners.lora import LoraLayer`.

    import minipeft.compat

    minipeft.compat.install()  # before anything imports peft
    from transformers import Trainer  # finds minipeft where it looks for peft

or, for a whole script that stays as it is:

    python -m minipeft.compat script.py its arguments

What peft's own dotted paths offer then is what transformers, diffusers, accelerate and users' code import from them:

    peft                                     all that minipeft has; `__version__` is that of the reference, 0.21.2
    peft.config, peft.peft_model, peft.auto, peft.mixed_model, peft.mapping, peft.mapping_func, peft.import_utils
    peft.functional, peft.helpers, peft.optimizers
    peft.tuners.<method>                     configuration, model and layer class, also under .config, .model, .layer
    peft.tuners.lora.<conversion, corda, eva, intruders, loraga>    what prepares, initialises and converts LoRA
    peft.tuners.adamss.asa_callback, peft.tuners.cartridge.utils
    peft.tuners.tuners_utils                 BaseTuner, BaseTunerLayer, peft.functional, which modules are meant
    peft.utils, peft.utils.<other, peft_types, save_and_load, merge_utils, constants, error, warning>
    peft.utils.<integrations, loftq_utils>
    peft.utils.hotswap
    peft.utils.transformers_weight_conversion    for `model.load_adapter` of transformers

Layers then also have the slots of their method that are not in use, empty, as `lora_embedding_A` of a linear layer.
Classes of which minipeft has none of its own, such as `LoraLayer` or `peft.tuners.lora.Linear`, say by `isinstance`
what a layer is; they cannot be instantiated or derived from. Not offered, so that importing it fails: the layer classes
of quantisation backends but for bitsandbytes, and what peft keeps for itself (`update_layer`, `_create_and_replace`,
`register_peft_method`, ...; docs/peer.md has a list).
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    surface = importlib.import_module(".surface", __name__)  # which imports most of minipeft
    return getattr(surface, name)
