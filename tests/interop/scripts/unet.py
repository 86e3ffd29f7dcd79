"""diffusers' use of adapters on a small U-Net: `import peft` is whatever is there. Prints what it saw as JSON."""

import json
import sys
import tempfile
import warnings

import peft
import torch
from diffusers import UNet2DConditionModel, logging
from peft.tuners.lora import LoraLayer

warnings.simplefilter("ignore")
logging.set_verbosity_error()
FILE = {"weight_name": "pytorch_lora_weights.safetensors", "use_safetensors": True}
seen = []


def fresh():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=3, out_channels=3, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2,
    ).eval()  # fmt: skip


def config(seed, r=3, **fields):
    torch.manual_seed(seed)
    fields = {"target_modules": ["to_q", "to_v", "conv1"], "init_lora_weights": False, **fields}
    return peft.LoraConfig(r=r, lora_alpha=4, **fields)


def note(label, model, **more):
    g = torch.Generator().manual_seed(5)
    inputs = torch.randn(2, 3, 8, 8, generator=g), torch.tensor([3, 7]), torch.randn(2, 4, 8, generator=g)
    with torch.no_grad():
        out = model(*inputs).sample
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    seen.append({"label": label, "out": out.flatten()[:20].tolist(), "layers": len(layers), **more})


model = fresh()
note("bare", model)
model.add_adapter(config(1), "one")
note("added", model, active=model.active_adapters())
model.add_adapter(config(2, r=5), "two")
note("a second", model, active=model.active_adapters())
model.set_adapters(["one", "two"], [0.3, 0.6])
note("both, weighted", model, active=model.active_adapters())
model.set_adapter("one")
note("one", model)
model.disable_adapters()
note("disabled", model)
model.enable_adapters()
model.fuse_lora(lora_scale=0.5, adapter_names=["one"])
note("fused", model)
model.unfuse_lora()
note("unfused", model)
folder = tempfile.mkdtemp()
model.save_lora_adapter(folder, adapter_name="one")
loaded = fresh()
loaded.load_lora_adapter(folder, adapter_name="again", prefix=None, **FILE)
note("loaded", loaded, active=loaded.active_adapters())
with tempfile.TemporaryDirectory() as second:
    model.set_adapter("two")
    model.save_lora_adapter(second, adapter_name="two")
    loaded.load_lora_adapter(second, adapter_name="beside", prefix=None, **FILE)
note("loaded beside", loaded, active=loaded.active_adapters())
loaded.delete_adapters("again")
note("deleted", loaded)
loaded.unload_lora()
note("unloaded", loaded)
other = fresh()
other.add_adapter(config(3), "it")
swap = tempfile.mkdtemp()
other.save_lora_adapter(swap, adapter_name="it")
hot = fresh()
hot.load_lora_adapter(folder, adapter_name="it", prefix=None, **FILE)
hot.load_lora_adapter(swap, adapter_name="it", prefix=None, **FILE, hotswap=True)
note("swapped", hot)
padded = fresh()
padded.enable_lora_hotswap(target_rank=8)
padded.load_lora_adapter(folder, adapter_name="it", prefix=None, **FILE)
note("padded", padded)
padded.load_lora_adapter(swap, adapter_name="it", prefix=None, **FILE, hotswap=True)
note("padded, swapped", padded)
print()
json.dump({"library": peft.PeftModel.__module__.split(".")[0], "seen": seen}, sys.stdout)
