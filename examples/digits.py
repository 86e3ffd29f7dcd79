"""Adapt a small network from one half of the handwritten digits to the other half, by each method in turn.

    pip install "minipeft[examples]"
    python examples/digits.py

The network learns 0 to 4 of scikit-learn's digits. Frozen then, it is adapted to 5 to 9, whose answers are the same
five outputs: what it says of them before is a guess. Each adapter is trained, saved, loaded into a fresh copy of the
network and, where the method can be merged, merged into plain weights, which must answer alike. The accuracies are on
images kept apart from training.
"""

import argparse
import copy
import importlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LINEAR = ["hidden1", "hidden2", "head"]
LAYERS = ["conv", *LINEAR]
STEPS = 300


@dataclass
class Method:
    name: str
    config: str  # the class of its configuration
    options: dict = field(default_factory=dict)
    lr: float = 1e-2
    merges: bool = True
    inputs: dict = field(default_factory=dict)  # what the model is given beside the images, one value for each image


# A further method is a further line. The learning rates were chosen on a part of the training images.
METHODS = [
    Method("LoRA", "LoraConfig", {"r": 4, "target_modules": LAYERS}),
    Method("rsLoRA", "LoraConfig", {"r": 16, "use_rslora": True, "target_modules": LAYERS}, lr=3e-3),
    Method("PiSSA", "LoraConfig", {"r": 4, "init_lora_weights": "pissa", "target_modules": LINEAR}),
    Method("LoRA + new head", "LoraConfig", {"r": 2, "target_modules": LAYERS[:-1], "modules_to_save": ["head"]}, lr=3e-2),
    Method("DoRA", "LoraConfig", {"r": 4, "use_dora": True, "target_modules": LAYERS}),
    Method("AdaLoRA", "AdaLoraConfig", {"target_modules": LINEAR, "init_r": 6, "target_r": 3, "total_step": STEPS,
                                        "tinit": 50, "tfinal": 100, "deltaT": 5}),
    Method("IA3", "IA3Config", {"target_modules": LAYERS, "feedforward_modules": ["hidden2"]}, lr=0.2),
    Method("OFT", "OFTConfig", {"oft_block_size": 8, "target_modules": LINEAR}, lr=5e-2),
    Method("VeRA", "VeraConfig", {"r": 64, "target_modules": LINEAR}, lr=0.2),
    Method("LN tuning", "LNTuningConfig", {"target_modules": ["norm"]}, lr=0.3),
    Method("trainable tokens", "TrainableTokensConfig", {"target_modules": ["ink"], "token_indices": [*range(17)]}, lr=0.2),
    Method("Poly", "PolyConfig", {"r": 4, "n_tasks": 1, "n_skills": 2, "target_modules": ["hidden1"]}, lr=3e-2,
           merges=False, inputs={"task_ids": 0}),
]


class Reader(nn.Module):
    """Five outputs from images of 8 x 8 levels of ink, 0 to 16."""

    def __init__(self):
        super().__init__()
        self.ink = nn.Embedding(17, 8)
        self.conv = nn.Conv2d(8, 24, 3, stride=2, padding=1)
        self.hidden1 = nn.Linear(4 * 24, 64)
        self.norm = nn.LayerNorm(64)
        self.hidden2 = nn.Linear(4 * 64, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, image):  # (batch, 8, 8), whole numbers
        x = self.ink(image).movedim(-1, 1)  # (batch, 8, 8, 8)
        x = F.relu(self.conv(x)).movedim(1, -1).flatten(2)  # (batch, 4 rows, 96)
        x = F.relu(self.norm(self.hidden1(x))).flatten(1)  # (batch, 256)
        return self.head(F.relu(self.hidden2(x)))  # (batch, 5)


@dataclass
class Data:
    """Images (n, 8, 8) and labels (n,) 0 to 4, to train on and to test on."""

    train: tuple
    test: tuple

    @staticmethod
    def load(digits):
        bunch = load_digits()
        images, labels = (torch.tensor(a, dtype=torch.long) for a in (bunch.images, bunch.target))
        chosen = torch.isin(labels, torch.tensor(digits))
        images, labels = images[chosen], labels[chosen] - digits[0]
        rows = train_test_split(range(len(labels)), test_size=0.3, random_state=0, stratify=labels)
        return Data(*((images[r], labels[r]) for r in rows))


def run(model, images, method=None):
    """The five outputs for each image (batch, 5)."""
    if method is None or not method.inputs:
        return model(images)
    more = {name: torch.full((len(images),), value) for name, value in method.inputs.items()}
    return model.base_model(images, **more)  # PeftModel itself hands on what the network takes, no more


def train(model, data, lr, method=None, steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    reallocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)  # AdaLoRA moves its ranks
    images, labels = data
    model.train()
    for step in range(steps):
        batch = torch.randint(len(labels), (64,), generator=generator)
        F.cross_entropy(run(model, images[batch], method), labels[batch]).backward()
        optimizer.step()
        schedule.step()
        if reallocate:
            reallocate(step)
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def answers(model, data, method=None):
    return run(model, data[0], method)


def accuracy(outputs, data):
    return (outputs.argmax(-1) == data[1]).float().mean().item()


def same(a, b):
    """Whether two models give the same answers, their outputs equal to rounding."""
    return torch.equal(a.argmax(-1), b.argmax(-1)) and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def adapt(peft, method, network, data):
    """Train, save, load and merge one adapter; (method, parameters, before, after, reloaded, merged)."""
    torch.manual_seed(0)
    config = getattr(peft, method.config)(**method.options)
    model = peft.get_peft_model(copy.deepcopy(network), config)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    before = accuracy(answers(network, data.test), data.test)
    train(model, data.train, method.lr, method)
    running = answers(model, data.test, method)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(network), folder).eval()
    reloaded = same(running, answers(loaded, data.test, method))
    merged = same(running, answers(loaded.merge_and_unload(), data.test)) if method.merges else None
    return method.name, parameters, before, accuracy(running, data.test), reloaded, merged


def show(rows):
    yes = {True: "yes", False: "NO", None: "-"}
    print(f"{'method':18} {'trainable':>9} {'before':>7} {'after':>7}  reloaded == running  merged == running")
    for name, parameters, before, after, reloaded, merged in rows:
        print(f"{name:18} {parameters:9,} {before:7.1%} {after:7.1%}  {yes[reloaded]:19}  {yes[merged]}")


def plot(rows, full, path):
    """Accuracy after adaptation against trainable parameters; `full` is (parameters, accuracy) with all trained."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    rows = sorted(rows, key=lambda row: row[3])
    axes.scatter([r[1] for r in rows], [r[3] for r in rows], zorder=3)
    axes.scatter(*full, color="black", marker="s", zorder=3)
    for name, parameters, _, after, *_ in [*rows, ("all weights", full[0], 0, full[1])]:
        axes.annotate(name, (parameters, after), xytext=(5, 4), textcoords="offset points")
    axes.axhline(rows[0][2], color="grey", linestyle=":")
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy on digits 5 to 9, held out",
             title="A network that learned 0 to 4, adapted to 5 to 9")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=[m.name for m in METHODS],
                        choices=[m.name for m in METHODS])
    parser.add_argument("--library", default="minipeft", help="a module with PEFT's API")
    parser.add_argument("--plot", type=Path, default=Path("digits.png"))
    options = parser.parse_args()
    peft = importlib.import_module(options.library)

    torch.set_num_threads(1)  # the network is too small to be shared out
    torch.manual_seed(0)
    network, old, new = Reader(), Data.load(range(5)), Data.load(range(5, 10))
    train(network, old.train, 1e-2)
    print(f"the network reads {accuracy(answers(network, old.test), old.test):.1%} of 0 to 4")
    full = copy.deepcopy(network)
    train(full, new.train, 1e-2)
    chosen = [m for m in METHODS if m.name in options.methods]
    rows = []
    for method in (bar := tqdm(chosen, unit="method")):
        bar.set_description(method.name)
        rows.append(adapt(peft, method, network, new))
    show(rows)
    after = accuracy(answers(full, new.test), new.test)
    size = sum(p.numel() for p in full.parameters())
    print(f"{'all weights':18} {size:9,} {rows[0][2]:7.1%} {after:7.1%}")
    plot(rows, (size, after), options.plot)
    print(f"plot: {options.plot}")
    if any(r[4] is False or r[5] is False for r in rows):
        raise SystemExit("a reloaded or merged model answers differently")


if __name__ == "__main__":
    main()
