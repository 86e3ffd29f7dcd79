"""Adapt a plain module, save the adapter, load it into the same base, and merge it."""

import tempfile

import torch
from torch import nn

import minipeft as peft

base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "2"]))
model.print_trainable_parameters()

x, y = torch.randn(64, 16), torch.randn(64, 2)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(100):
    (model(x) - y).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
running = model(x)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    model = peft.PeftModel.from_pretrained(model.unload(), folder)
assert torch.equal(model(x), running)

merged = model.merge_and_unload()  # plain nn.Linear layers again
assert torch.allclose(merged(x), running, atol=1e-5)
