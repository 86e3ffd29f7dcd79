"""Each method on a small model: what its count is tested on, and what its page shows."""

from __future__ import annotations

import ast
from collections import ChainMap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

import minipeft
from minipeft.core.config import CONFIGS, PeftConfig, PeftType
from minipeft.model.prompt import PROMPTS

IN, OUT = 24, 60
TARGETS = {"Linear": "q", "Whole": "norm", "Embedding": "words"}  # by the first kind of layer that a method adapts
VALUES: dict[str, Any] = {  # of the fields that the counts name, none of them a default
    "adapters": {"a": "", "b": "", "c": ""},
    "adapter_layers": 1,
    "adapter_len": 5,
    "block_size": 4,
    "boft_n_butterfly_factor": 2,
    "cpt_mask": [1, 1, 1, 1, 1],
    "cpt_token_ids": [4, 3, 2, 1, 0],
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4],
    "decompose_factor": 4,
    "depth": 2,
    "effective_rank": 10,
    "encoder_hidden_size": 7,
    "encoder_num_layers": 2,
    "feedforward_modules": [],
    "group_size": 6,
    "hidden_size": 7,
    "hybrid_r": 3,
    "init_r": 3,
    "mini_r": 5,
    "n_frequency": 7,
    "n_skills": 5,
    "n_splits": 2,
    "n_tasks": 3,
    "num_attention_heads": 2,
    "num_B": 3,
    "num_frozen_tokens": 2,
    "num_layers": 3,
    "num_ranks": 2,
    "num_tasks": 3,
    "num_transformer_submodules": 2,
    "num_vectors": 10,
    "num_virtual_tokens": 5,
    "oft_block_size": 4,
    "r": 6,
    "sparsity": 0.9,
    "task_type": "CAUSAL_LM",
    "theta_d_length": 50,
    "token_dim": 6,
    "token_indices": [1, 3, 4],
    "total_step": 10,
    "u": 5,
    "update_hidden_size": 5,
    "vector_length": 4,
    "xlora_size": 9,
}
CHOOSE: dict[str, Any] = {  # by class
    "AdaptionPromptConfig": {"target_modules": "attention"},
    "Arrow": {"arrow_config": {}},
    "BDLoRA": {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q"]}},
    "Bat": {"init_weights": "bat"},
    "DoRA": {"use_dora": True},
    "KaSA": {"kasa_config": {}},
    "MonteCLoRA": {"monteclora_config": {"num_samples": 3}},
    "OFT": {"r": 0},
    "QALoRA": {"use_qalora": True, "qalora_group_size": 1},  # a plain LoRA on these layers, as groups of one would be
    "Shadow": {"target_modules": r"layers\.\d+"},
}

def attention() -> nn.Module:
    """The weights of an attention module."""
    module = nn.ModuleDict({f"{name}_proj": nn.Linear(IN, IN) for name in "qkvo"})
    setattr(module, "head_dim", IN)  # noqa: B010, which no type of nn.Module has
    return module


class Blocks(nn.ModuleList):
    def forward(self, x, output_hidden_states=False):
        """It is never called, but X-LoRA looks at the arguments."""


def model(depth: int) -> nn.Module:
    """Layers of one size; the linear ones have a bias."""
    block = lambda: nn.ModuleDict({
        "q": nn.Linear(IN, OUT), "norm": nn.LayerNorm(OUT), "words": nn.Embedding(IN, OUT), "attention": attention(),
    })
    return Blocks(block() for _ in range(depth))


class Decoder(nn.Module):
    """Its blocks are linear layers; a shadow is one more of them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.Linear(IN, IN) for _ in range(config.num_hidden_layers))

    def forward(self, inputs_embeds):
        """It is never called."""


SHADOW = IN * IN + IN


def configuration(peft_type: PeftType, cls: type, fields: dict[str, str]) -> Any:
    """Small sizes, and `fields` as the form of the count says, where a value may be the name of another field."""
    config: Any = CONFIGS[peft_type]
    known = set(config.__dataclass_fields__)
    given = {name: value for name, value in VALUES.items() if name in known}
    target = TARGETS.get((getattr(cls, "bases", None) or ("none",))[0])
    given |= {"target_modules": [target]} if "target_modules" in known else {}
    given |= CHOOSE.get(cls.__name__, {})
    for name, value in fields.items():
        try:
            given[name] = ast.literal_eval(value)
        except ValueError:
            given[name] = given.get(value, value)
    return config(**given)


def values(config: PeftConfig) -> dict[str, Any]:
    """The values of the names in a count."""
    records = [vars(value) for value in vars(config).values() if hasattr(value, "__dataclass_fields__")]
    return {**ChainMap(vars(config), *records), "in": IN, "out": OUT, "dim": OUT, "shadow": SHADOW}


def save_loras(config: Any, depth: int, folder: Path) -> None:
    """Put a saved LoRA where the configuration is to find each of its adapters."""
    for name in config.adapters:
        config.adapters[name] = str(folder / name)
        lora = minipeft.LoraConfig(r=VALUES["r"], target_modules=["q"])
        minipeft.get_peft_model(model(depth), lora).save_pretrained(folder / name)


def adapted(peft_type: PeftType, config: Any, depth: int, folder: Path) -> nn.Module:
    """A small model with an adapter of that configuration, or for a prompt the module that holds it."""
    if hasattr(config, "adapters"):
        save_loras(config, depth, folder)
    if peft_type in PROMPTS:
        config.token_dim = VALUES["token_dim"]  # CPT reads it off the model
        words = nn.Embedding(12, config.token_dim)
        prompt: Any = PROMPTS[peft_type]
        return prompt(config, words) if prompt.reads_words else prompt(config)
    if peft_type == "SHADOW":
        decoder = Decoder(SimpleNamespace(hidden_size=IN, num_hidden_layers=depth))
        return minipeft.get_peft_model(decoder, config)
    return minipeft.get_peft_model(model(depth), config)


def trained(peft_type: PeftType, config: Any, depth: int, folder: Path) -> int:
    """How many parameters are trained."""
    return sum(p.numel() for p in adapted(peft_type, config, depth, folder).parameters() if p.requires_grad)
