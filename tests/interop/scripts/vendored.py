"""Every layer method, each alone in a package of its own, in a process that has no minipeft.

vendored.py FOLDER: the parent of the package `copies`; prints what was done, as JSON.
"""

import importlib
import json
import pickle
import sys
import tempfile
import warnings
from pathlib import Path

FOLDER = Path(sys.argv[1])
for name in ("minipeft", "conformance", "peft"):
    sys.modules[name] = None
sys.path.insert(0, str(FOLDER))

import torch  # noqa: E402
from torch import nn  # noqa: E402

MORE = {
    "adalora": {"total_step": 10}, "c3a": {"block_size": 4}, "fourierft": {"n_frequency": 8},
    "ia3": {"feedforward_modules": []},
    "miss": {"r": 4}, "psoft": {"r": 4}, "randlora": {"r": 2}, "road": {"group_size": 2}, "shira": {"r": 2},
    "supertuning": {"sparsity": 0.5}, "trainable_tokens": {"token_indices": [1, 3]},
    "vblora": {"vector_length": 4, "num_vectors": 8, "topk": 2}, "waveft": {"n_frequency": 8},
    "dora": {"use_dora": True},
}  # fmt: skip
TARGETS = {"ln_tuning": ["norm"], "trainable_tokens": ["words"]}
TASKS = {"task_ids": torch.zeros(4, dtype=torch.long)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(16, 8), nn.LayerNorm(12)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x):
        return self.norm(self.two(torch.tanh(self.one(self.words(x)))))


def whole_life(name, P):
    """Put in, train a step, merge, save, load, mix."""
    config = next(getattr(P, n) for n in P.__all__ if n.endswith("Config") and hasattr(getattr(P, n), "from_peft_type")
                  and getattr(P, n)._method is not None)
    batch, given = torch.randint(16, (4, 3)), TASKS if name == "poly" else {}
    net = Net().eval()
    bare = net(batch).detach()
    P.inject_adapter_in_model(config(target_modules=TARGETS.get(name, ["one", "two"]), **MORE.get(name, {})), net)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.5)
    for _ in range(2):  # a factor that is zero at the start lets the other move only after it
        with P.mixed_batch(net, **given):
            (net(batch) * torch.linspace(-1, 1, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        with P.mixed_batch(net, **given):
            y = net(batch)
        assert (y - bare).abs().max() > 1e-4, "training changed nothing"
        P.save_adapter(net, folder)
        try:
            P.merge(net)
            assert (net(batch) - y).abs().max() < 1e-4, "merging is not running"
            P.unmerge(net)
        except P.MergeError:
            assert name in ("poly", "lily")
        copied = pickle.loads(pickle.dumps(net))
        with P.mixed_batch(copied, **given):
            assert torch.equal(copied(batch), y)
        assert torch.equal(P.unload(net)(batch), bare)
        P.load_adapter(net, folder, "again")
        with P.mixed_batch(net, **given):
            assert (net(batch) - y).abs().max() < 1e-5, "loading lost something"
        with P.mixed_batch(net, ["again", "__base__"] * 2, **given):
            assert torch.allclose(net(batch)[1::2], bare[1::2], atol=1e-5)


warnings.simplefilter("ignore")
done = []
for path in sorted((FOLDER / "copies").iterdir()):
    if (path / "VENDORED.md").exists():
        try:
            whole_life(path.name.removeprefix("only_"), importlib.import_module(f"copies.{path.name}"))
        except Exception as error:
            raise AssertionError(path.name) from error
        done.append(path.name)

one, other = (sys.modules[f"copies.only_{name}"] for name in ("lora", "dora"))
assert one.LoraConfig is not other.LoraConfig
try:
    one.inject_adapter_in_model(one.LoraConfig(target_modules=["one"], use_dora=True), Net())
except one.NotIncludedError as error:
    assert "use_dora" in str(error)
else:
    raise AssertionError("a variant that is not there was ignored")
try:
    one.inject_adapter_in_model(one.LoraConfig(target_modules=["one"], init_lora_weights="corda"), Net())
except one.NotIncludedError as error:
    assert "corda" in str(error)
else:
    raise AssertionError("a start that is not there was ignored")
assert not [name for name in sys.modules if name.startswith(("minipeft.", "transformers"))]
print(json.dumps(done))
