"""transformers' own use of adapters: `import peft` is whatever is there. Prints what it saw as JSON."""

import json
import sys
import tempfile
import warnings

import peft
import torch
import transformers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
IDS = torch.arange(12).view(2, 6) * 5 % 31
seen = []


def fresh(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **fields)).eval()


def config(**fields):
    return LoraConfig(**{"r": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **fields})


def note(label, model, **more):
    """What the model computes now, and what it holds."""
    with torch.no_grad():
        loss = model(input_ids=IDS, labels=IDS).loss.item()
    kinds = [sum(isinstance(m, k) for m in model.modules()) for k in (LoraLayer, BaseTunerLayer, ModulesToSaveWrapper)]
    trained = sorted(name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name)
    seen.append({"label": label, "loss": loss, "kinds": kinds, "trained": trained, **more})


def move(model, name):
    """Move every trained tensor of an adapter. (peft trains `modules_to_save` of others along.)"""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and f".{name}" in key:
                parameter.add_(0.1)


model = fresh()
torch.manual_seed(1)
model.add_adapter(config(modules_to_save=["lm_head"]), "one")
note("added", model, active=model.active_adapters())
torch.manual_seed(2)
model.add_adapter(config(r=5, use_rslora=True, modules_to_save=["lm_head"]), "two")
note("a second", model, active=model.active_adapters())
move(model, "two")
note("moved", model)
model.set_adapter("one")
note("set", model)
model.disable_adapters()
note("disabled", model)
model.enable_adapters()
note("enabled", model)
folders = {}
for name in ("one", "two"):
    model.set_adapter(name)
    folders[name] = tempfile.mkdtemp()
    model.save_pretrained(folders[name])
    state = model.get_adapter_state_dict(name)
    note(f"saved {name}", model, keys=sorted(state), total=sum(t.double().abs().sum().item() for t in state.values()))
model.delete_adapter("one")
note("deleted", model, left=sorted(model.peft_config))
for name in ("one", "two"):
    loaded = fresh()
    info = loaded.load_adapter(folders[name], adapter_name="mine")
    note(f"loaded {name}", loaded, missing=sorted(info.missing_keys), unexpected=sorted(info.unexpected_keys))
loaded.load_adapter(folders["one"], adapter_name="other", is_trainable=True)
note("loaded beside, not active", loaded, active=loaded.active_adapters())
loaded.set_adapter("other")
note("loaded beside", loaded)
loaded = fresh()
loaded.load_adapter(adapter_state_dict=state, peft_config=peft.PeftConfig.from_pretrained(folders["two"]))
note("from a state dict", loaded)
wrapped = peft.PeftModel.from_pretrained(fresh(), folders["two"])
note("read as a PeftModel", wrapped)
base = tempfile.mkdtemp()
fresh().save_pretrained(base)
again = LlamaForCausalLM.from_pretrained(base)
again.load_adapter(folders["two"])
note("on a base model from disk", again)

both = fresh()
for seed, name in enumerate(("one", "two")):
    torch.manual_seed(seed)
    both.add_adapter(config(), name)
    folders[name] = tempfile.mkdtemp()
    both.save_pretrained(folders[name])
both.set_adapter(["one", "two"])
note("both", both, active=both.active_adapters())

swapped = fresh()
swapped.load_adapter(folders["one"], adapter_name="it")
note("before the swap", swapped)
swapped.load_adapter(folders["two"], adapter_name="it", hotswap=True)
note("swapped", swapped)

tied = fresh(tie_word_embeddings=True)
torch.manual_seed(5)
tied.add_adapter(config(target_modules=["q_proj"], trainable_token_indices=[1, 4]))
move(tied, "default")
note("tied", tied)
folder = tempfile.mkdtemp()
tied.save_pretrained(folder)
loaded = fresh(tie_word_embeddings=True)
loaded.load_adapter(folder)
note("tied, loaded", loaded)
whole = peft.get_peft_model(fresh(tie_word_embeddings=True), config(r=2)).merge_and_unload()
whole.save_pretrained(folder := tempfile.mkdtemp())
again = LlamaForCausalLM.from_pretrained(folder)
note("tied, merged and saved", again, same=again.lm_head.weight is again.model.embed_tokens.weight)


def of_experts():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)).eval()


def as_in_transformers_4():
    """An adapter with factors of its own for each expert."""
    shapes = {"self_attn.o_proj": (16, 16), "block_sparse_moe.gate": (3, 16)}
    for at in range(3):
        for name in ("w1", "w2", "w3"):
            shapes[f"block_sparse_moe.experts.{at}.{name}"] = (16, 24) if name == "w2" else (24, 16)
    return {
        f"base_model.model.model.layers.{layer}.{name}.lora_{slot}.weight": torch.randn(shape) / 3
        for layer in range(2)
        for name, (out, size) in shapes.items()
        for slot, shape in (("A", (2, size)), ("B", (out, 2)))
    }


for targets in (["o_proj", "gate", "w1", "w2", "w3"], "all-linear"):
    experts = of_experts()
    experts.add_adapter(config(target_modules=targets))
    note(f"on experts: {targets}", experts)
torch.manual_seed(3)
experts = of_experts()
info = experts.load_adapter(
    adapter_state_dict=as_in_transformers_4(),
    peft_config=LoraConfig(r=2, target_modules=["o_proj", "gate", "w1", "w2", "w3"]),
)
note("from a file for experts", experts, missing=sorted(info.missing_keys), unexpected=sorted(info.unexpected_keys))
json.dump({"library": peft.PeftModel.__module__.split(".")[0], "seen": seen}, sys.stdout)
