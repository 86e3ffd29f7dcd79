"""EVA in two processes, each with half of every batch: the same matrices as in one. Arguments: rank, store."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[3]))
import minipeft

rank, store = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
data = [torch.randn(40, 12) * torch.linspace(3, 0.1, 12) for _ in range(5)]
config = minipeft.LoraConfig(r=3, init_lora_weights="eva", target_modules=["0", "2"])
options = {
    "forward_fn": lambda model, x: model(x),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
    "show_progress_bar": False,
}
alone = minipeft.get_eva_state_dict(net, data, config, **options)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
half = [x[rank * 20 : (rank + 1) * 20] for x in data]
together = minipeft.get_eva_state_dict(net, half, config, **options)
apart = minipeft.get_eva_state_dict(net, half, config, gather_distributed_inputs=False, **options)
dist.barrier()
dist.destroy_process_group()
for name, A in alone.items():
    torch.testing.assert_close(together[name], A, rtol=1e-5, atol=1e-5)
assert any(apart[name].shape != A.shape or (apart[name] - A).abs().max() > 1e-3 for name, A in alone.items())
print("same")
