"""Adapt a small network from one half of the handwritten digits to the other half, by each method in turn.

    pip install "minipeft[examples]"
    python examples/digits.py

The network learns 0 to 4 of scikit-learn's digits. Frozen then, it is adapted to 5 to 9, whose answers are the same
five outputs: what it says of them before is a guess. Each adapter is trained, saved, loaded into a fresh copy of the
network and, where the method can be merged, merged into plain weights, which must answer alike. Two processes share the
methods, and the plot is drawn anew after each. Methods that are about tokens adapt a second network, a transformer that
reads an image row by row; those that are for decoders a third one, a small Llama that reads an image as a sentence and
says the digit as its next word; and QA-LoRA the first one after its layers were quantised. The accuracies are on images
kept apart from training.
"""

import argparse
import copy
import importlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
from adjustText import adjust_text
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HIDDEN = ["hidden1", "hidden2"]
LINEAR = [*HIDDEN, "head"]
LAYERS = ["conv", *LINEAR]
ROWS = {"task_type": "FEATURE_EXTRACTION", "token_dim": 8, "num_layers": 2, "num_attention_heads": 4}
TOLD = {"task_type": "CAUSAL_LM"}
WORDS, ASK = 17 + 1 + 5, 17  # levels of ink, a question, five answers
STEPS = 300


class Reader(nn.Module):
    """Five outputs from an image's 8 x 8 levels of ink, 0 to 16: a convolution, then layers over rows."""

    def __init__(self):
        super().__init__()
        self.ink = nn.Embedding(17, 8)
        self.conv = nn.Conv2d(8, 24, 3, stride=2, padding=1)
        self.hidden1 = nn.Linear(4 * 24, 64)
        self.norm = nn.LayerNorm(64)
        self.hidden2 = nn.Linear(4 * 64, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x):  # (batch, 8, 8)
        x = self.ink(x.long()).movedim(-1, 1)  # (batch, 8, 8, 8)
        x = F.relu(self.conv(x)).movedim(1, -1).flatten(2)  # (batch, 4 rows, 96)
        x = F.relu(self.norm(self.hidden1(x))).flatten(1)  # (batch, 256)
        return self.head(F.relu(self.hidden2(x)))  # (batch, 5)


class Config(dict):
    """What prompt learning asks of a transformer's configuration."""

    model_type, vocab_size = "rows", 0


class Block(nn.Module):
    """A transformer's block over x (batch, time, width), with (key, value) from before x if there are any."""

    heads = 4

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, past=None):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)  # (batch, heads, virtual + time, -1)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class RowReader(nn.Module):
    """Five outputs from an image as 8 tokens, its rows: a transformer, called as those of transformers are."""

    config = Config()
    device = torch.device("cpu")

    def __init__(self, width=32, depth=2):
        super().__init__()
        self.row = nn.Linear(8, width)
        self.place = nn.Parameter(torch.randn(8, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.answer = nn.Parameter(torch.randn(1, width))
        self.head = nn.Linear(width, 5)

    def get_input_embeddings(self):
        return self.row

    def forward(self, inputs_embeds, past_key_values=None, output_hidden_states=False, **unused):
        """(batch, 5) of (batch, virtual rows + 8, 8)."""
        x = self.row(inputs_embeds / 16)  # (batch, time, width)
        x = torch.cat([x[:, :-8], x[:, -8:] + self.place, self.answer.expand(len(x), 1, -1)], 1)
        for block, past in zip(self.blocks, past_key_values or [None] * len(self.blocks)):
            x = block(x, past)
        y = self.head(x[:, -1])  # (batch, 5)
        return SimpleNamespace(logits=y, hidden_states=[x]) if output_hidden_states else y


def llama():
    """A small decoder of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.1, use_cache=False, attn_implementation="eager"))


class BaseQuantLinear(nn.Module):
    SUPPORTS_METHODS = ("gptq",)


class FourBits(BaseQuantLinear):
    """A linear layer in numbers from 0 to 15, W = scale (q - zero), with a scale and a zero for each 8 inputs.

    It stands in for a layer of gptqmodel, so that the library is not needed; adapters know those by their base class.
    """

    group = 8

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        W = linear.weight.detach().t().unflatten(0, (-1, self.group))  # (groups, 8, out)
        low, high = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
        scale = (high - low) / 15
        zero = (-low / scale).round()
        self.register_buffer("scales", scale)
        self.register_buffer("zeros", zero)
        self.register_buffer("qweight", (W / scale + zero).round().clamp(0, 15).to(torch.uint8))

    def dequantize_weight(self):
        return (self.scales * (self.qweight - self.zeros)).flatten(0, 1)  # (in, out)

    def forward(self, x):
        return x @ self.dequantize_weight() + self.bias


sys.modules.setdefault("gptqmodel.nn_modules.qlinear", SimpleNamespace(BaseQuantLinear=BaseQuantLinear))


def quantised(model, names):
    """A copy of a model in which the linear layers of these names are quantised."""
    made = copy.deepcopy(model)
    for module in [*made.modules()]:
        for name, child in module.named_children():
            if name in names:
                setattr(module, name, FourBits(child))
    return made


@dataclass
class Method:
    name: str
    config: str  # the class of its configuration
    options: dict = field(default_factory=dict)
    lr: float = 1e-2
    merges: bool = True
    inputs: dict = field(default_factory=dict)  # what the model is given beside the images, one value for each image
    network: str = "Reader"
    experts: tuple = ()  # what to adapt to first: the method chooses among LoRA adapters for these answers
    examples: int = 0  # of each digit, for a method whose prompt begins as examples
    steps: int = STEPS


# A further method is a further line. The learning rates were chosen on a part of the training images.
METHODS = [
    Method("LoRA", "LoraConfig", {"r": 4, "target_modules": LAYERS}),
    Method("rsLoRA", "LoraConfig", {"r": 16, "use_rslora": True, "target_modules": LAYERS}, lr=3e-3),
    Method("PiSSA", "LoraConfig", {"r": 4, "init_lora_weights": "pissa", "target_modules": LINEAR}),
    Method("LoRA + new head", "LoraConfig", {"r": 2, "target_modules": LAYERS[:-1], "modules_to_save": ["head"]},
           lr=3e-2),
    Method("DoRA", "LoraConfig", {"r": 4, "use_dora": True, "target_modules": LAYERS}),
    Method("BD-LoRA", "LoraConfig", {"r": 8, "target_modules": HIDDEN,
                                     "use_bdlora": {"nblocks": 2, "target_modules_bd_a": HIDDEN}}),
    Method("KaSA", "LoraConfig", {"r": 4, "kasa_config": {}, "target_modules": HIDDEN}),
    Method("MonteCLoRA", "LoraConfig", {"r": 4, "monteclora_config": {}, "target_modules": LINEAR}),
    Method("VeLoRA", "LoraConfig", {"r": 4, "velora_config": {"num_groups": 8, "init_type": "random"},
                                    "target_modules": LINEAR}),
    Method("AdaLoRA", "AdaLoraConfig", {"target_modules": LINEAR, "init_r": 6, "target_r": 3, "total_step": STEPS,
                                        "tinit": 50, "tfinal": 100, "deltaT": 5}),
    Method("AdaMSS", "AdamssConfig", {"r": 32, "num_subspaces": 4, "subspace_rank": 4, "target_modules": LINEAR,
                                      "use_asa": True, "asa_target_subspaces": 8, "init_warmup": 50,
                                      "final_warmup": 200, "mask_interval": 10}, lr=3e-2),
    Method("IA3", "IA3Config", {"target_modules": LAYERS, "feedforward_modules": ["hidden2"]}, lr=0.2),
    Method("OFT", "OFTConfig", {"oft_block_size": 8, "target_modules": LINEAR}, lr=5e-2),
    Method("VeRA", "VeraConfig", {"r": 64, "target_modules": LINEAR}, lr=0.2),
    Method("LN tuning", "LNTuningConfig", {"target_modules": ["norm"]}, lr=0.3),
    Method("trainable tokens", "TrainableTokensConfig", {"target_modules": ["ink"], "token_indices": [*range(17)]},
           lr=0.2),
    Method("BEFT", "BeftConfig", {"target_modules": LAYERS}, lr=1.0),
    Method("BOFT", "BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": HIDDEN},
           lr=5e-2),
    Method("C3A", "C3AConfig", {"block_size": 32, "target_modules": HIDDEN}, lr=3.0),
    Method("DEFT", "DeftConfig", {"r": 4, "target_modules": LINEAR}),
    Method("DeLoRA", "DeloraConfig", {"r": 4, "delora_lambda": 15, "target_modules": LINEAR}, lr=3e-2),
    Method("FourierFT", "FourierFTConfig", {"n_frequency": 300, "scaling": 50.0, "target_modules": HIDDEN}, lr=0.3),
    Method("FRoD", "FrodConfig", {"progressbar": False, "target_modules": LINEAR}, lr=5e-2),
    Method("GLoRA", "GloraConfig", {"r": 4, "target_modules": LINEAR}),
    Method("GraLoRA", "GraloraConfig", {"r": 4, "gralora_k": 2, "target_modules": HIDDEN}),
    Method("HiRA", "HiraConfig", {"r": 4, "target_modules": LAYERS}, lr=5e-2),
    Method("HRA", "HRAConfig", {"r": 4, "target_modules": LAYERS}, lr=5e-2),
    Method("LoHa", "LoHaConfig", {"r": 4, "target_modules": LAYERS}, lr=3e-2),
    Method("LoKr", "LoKrConfig", {"r": 4, "target_modules": LAYERS}, lr=3e-2),
    Method("MiSS", "MissConfig", {"r": 16, "target_modules": HIDDEN}),
    Method("MiSS (bat)", "MissConfig", {"r": 16, "init_weights": "bat", "target_modules": HIDDEN}, lr=3e-3),
    Method("OSF", "OSFConfig", {"effective_rank": 32, "target_modules": HIDDEN}, lr=3e-3),
    Method("PEANuT", "PeanutConfig", {"r": 4, "target_modules": LINEAR}),
    Method("PSOFT", "PsoftConfig", {"r": 16, "target_modules": HIDDEN}, lr=0.1),
    Method("PVeRA", "PveraConfig", {"r": 64, "target_modules": LINEAR}, lr=0.2),
    Method("RandLoRA", "RandLoraConfig", {"r": 16, "target_modules": LINEAR}, lr=2e-2),
    Method("RoAd", "RoadConfig", {"group_size": 2, "target_modules": LAYERS[:-1]}, lr=0.1),
    Method("SHiRA", "ShiraConfig", {"r": 4, "target_modules": LINEAR}),
    Method("Super-Tuning", "SupertuningConfig", {"target_modules": LINEAR}, lr=1.0),
    Method("TinyLoRA", "TinyLoraConfig", {"r": 32, "target_modules": LINEAR}, lr=0.3),
    Method("Uni-LoRA", "UniLoraConfig", {"r": 4, "theta_d_length": 200, "target_modules": LINEAR}, lr=0.3),
    Method("VB-LoRA", "VBLoRAConfig", {"r": 4, "num_vectors": 30, "vector_length": 32, "init_vector_bank_bound": 0.5,
                                       "target_modules": HIDDEN}, lr=0.2),
    Method("WaveFT", "WaveFTConfig", {"n_frequency": 300, "scaling": 25.0, "target_modules": HIDDEN}, lr=3e-2),
    Method("Lily", "LilyConfig", {"r": 4, "num_B": 2, "target_modules": HIDDEN}, merges=False),
    Method("Poly", "PolyConfig", {"r": 4, "n_tasks": 1, "n_skills": 2, "target_modules": ["hidden1"]}, lr=3e-2,
           merges=False, inputs={"task_ids": 0}),
    Method("QA-LoRA", "LoraConfig", {"r": 4, "lora_alpha": 32, "use_qalora": True, "qalora_group_size": 8,
                                     "target_modules": HIDDEN}, lr=3e-3, merges=False, network="4-bit Reader"),
    Method("aLoRA", "LoraConfig", {"r": 4, "alora_invocation_tokens": [0],
                                   "target_modules": ["query", "value", "up", "down"]},
           merges=False, inputs={"alora_offsets": 5}, network="RowReader"),  # the image's lower half, and the answer
    Method("Arrow", "LoraConfig", {"arrow_config": {"top_k": 2, "rng_seed": 0},
                                   "target_modules": ["query", "value", "up", "down"]},
           merges=False, network="RowReader", experts=((0, 1), (2, 3), (3, 4))),  # it learns nothing after its experts
    Method("X-LoRA", "XLoraConfig", {"hidden_size": 32, "layerwise_scalings": True}, lr=3e-2,
           merges=False, network="RowReader", experts=((0, 1), (2, 3), (3, 4))),
    Method("prompt tuning", "PromptTuningConfig", ROWS | {"num_virtual_tokens": 8}, lr=1.0,
           merges=False, network="RowReader"),
    Method("multitask prompts", "MultitaskPromptTuningConfig",
           ROWS | {"task_type": "SEQ_CLS", "num_virtual_tokens": 8, "num_tasks": 1, "num_ranks": 2}, lr=0.3,
           merges=False, inputs={"task_ids": 0}, network="RowReader"),
    Method("P-tuning", "PromptEncoderConfig", ROWS | {"num_virtual_tokens": 8, "encoder_hidden_size": 32},
           merges=False, network="RowReader"),
    Method("cartridge", "CartridgeConfig", ROWS | {"num_virtual_tokens": 8, "token_dim": 32}, lr=1.0,
           merges=False, network="RowReader"),
    Method("prefix tuning", "PrefixTuningConfig", ROWS | {"num_virtual_tokens": 8, "token_dim": 32}, lr=0.3,
           merges=False, network="RowReader"),
    Method("adaption prompt", "AdaptionPromptConfig", TOLD | {"adapter_len": 8, "adapter_layers": 3}, lr=0.1,
           merges=False, network="Llama"),
    Method("Shadow", "ShadowConfig", TOLD | {"r": 8, "shadow_alpha": 1.0}, merges=False, network="Llama"),
    Method("CPT", "CPTConfig", TOLD | {"opt_projection_epsilon": 20.0, "opt_projection_format_epsilon": 20.0}, lr=0.1,
           merges=False, network="Llama", examples=1, steps=STEPS // 3),
]


@dataclass
class Data:
    """Images (n, 8, 8) and labels (n,) 0 to 4, to train on and to test on; and how a network is asked about them."""

    train: tuple
    test: tuple
    batch = 64

    @classmethod
    def load(cls, digits):
        bunch = load_digits()
        images, labels = torch.tensor(bunch.images, dtype=torch.float32), torch.tensor(bunch.target)
        chosen = torch.isin(labels, torch.tensor(digits))
        images, labels = images[chosen], labels[chosen] - digits[0]
        rows = train_test_split(range(len(labels)), test_size=0.3, random_state=0, stratify=labels)
        return cls(*((cls.read(images[r]), labels[r]) for r in rows))

    @staticmethod
    def read(images):
        return images

    def run(self, model, x, method=None):
        """The five outputs (batch, 5)."""
        more = given(method, x)
        return (model.base_model if more else model)(x, **more)  # PeftModel itself hands on what the network takes

    def loss(self, model, x, labels, method=None):
        return F.cross_entropy(self.run(model, x, method), labels)


class Rows(Data):
    """The same, for a network that is called as those of transformers are."""

    targets = ["query", "value", "up", "down"]  # of LoRA

    def run(self, model, x, method=None):
        return model(inputs_embeds=x, **given(method, x))


class Sentences(Data):
    """The same, each image as 17 words: the mean ink of every 2 x 2 pixels, row by row, and the question."""

    @staticmethod
    def read(images):
        return F.pad(F.avg_pool2d(images[:, None], 2).round().long().flatten(1), (0, 1), value=ASK)

    def run(self, model, x, method=None):
        return model(input_ids=x, **given(method, x)).logits[:, -1, ASK + 1:]

    def loss(self, model, x, labels, method=None):
        words = torch.cat([x, ASK + 1 + labels[:, None]], 1)
        unasked = words.index_fill(1, torch.arange(x.shape[1]), -100)
        return model(input_ids=words, labels=unasked, **given(method, x)).loss


def given(method, x):
    """What the model is given beside the input x."""
    return {name: torch.full((len(x),), value) for name, value in method.inputs.items()} if method else {}


def train(model, data, lr, method=None, steps=STEPS):
    """Train what is to be trained; the median processor time of a step, in seconds."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    reallocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)  # AdaLoRA, AdaMSS
    x, labels = data.train
    times = []
    model.train()
    for step in range(steps):
        started = time.process_time()
        batch = torch.randint(len(labels), (data.batch,), generator=generator)
        data.loss(model, x[batch], labels[batch], method).backward()
        optimizer.step()
        schedule.step()
        if reallocate:
            reallocate(step)
        optimizer.zero_grad()
        times.append(time.process_time() - started)
    model.eval()
    return statistics.median(times)


@torch.no_grad()
def answers(model, data, method=None):
    return data.run(model, data.test[0], method)


def accuracy(outputs, data):
    return (outputs.argmax(-1) == data.test[1]).float().mean().item()


def same(a, b):
    """Whether two models give the same answers, their outputs equal to rounding."""
    return torch.equal(a.argmax(-1), b.argmax(-1)) and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def save_experts(peft, method, network, data, folder):
    """A LoRA adapter for some of the answers each, as {name: folder}, and the time of a step."""
    saved, times = {}, []
    for number, labels in enumerate(method.experts):
        model = peft.get_peft_model(copy.deepcopy(network), peft.LoraConfig(r=4, target_modules=data.targets))
        chosen = torch.isin(data.train[1], torch.tensor(labels))
        part = replace(data, train=tuple(tensor[chosen] for tensor in data.train))
        times.append(train(model, part, 1e-2, steps=method.steps // 3))
        saved[str(number)] = str(Path(folder, "experts", str(number)))
        model.save_pretrained(saved[str(number)])
    return saved, statistics.median(times)


def routed(peft, method, network, folders):
    """A copy of the network with Arrow's router before saved LoRA adapters, which are all that was trained."""
    model = peft.create_arrow_model(copy.deepcopy(network), folders, peft.ArrowConfig(**method.options["arrow_config"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".task_" in name)
    return model


def examples(data, number):
    """CPT's lists for some images of each digit: the words, and whether one is ink, question or answer."""
    words, labels = data.train
    rows = torch.cat([(labels == label).nonzero()[:number, 0] for label in range(5)])
    told = torch.cat([words[rows], ASK + 1 + labels[rows, None]], 1)
    kinds = torch.tensor([2] * (told.shape[1] - 2) + [3, 4]) + 4 * torch.arange(len(rows))[:, None]
    return {"cpt_token_ids": told.flatten().tolist(), "cpt_mask": [1] * told.numel(),
            "cpt_tokens_type_mask": kinds.flatten().tolist()}


@dataclass
class Row:
    """What came of one method."""

    name: str
    parameters: int  # trained
    before: float  # accuracy of the frozen network
    after: float
    reloaded: bool  # the saved adapter answers alike
    merged: bool | None  # so do merged weights; None where there are none
    step: float  # seconds of a processor

    def __str__(self):
        yes = {True: "yes", False: "NO", None: "-"}
        return (f"{self.name:18} {self.parameters:9,} {self.before:7.1%} {self.after:7.1%} {1e3 * self.step:6.1f} ms  "
                f"{yes[self.reloaded]:19}  {yes[self.merged]}")


HEAD = f"{'method':18} {'trainable':>9} {'before':>7} {'after':>7} {'a step':>9}  reloaded == running  merged"


def adapted(peft, method, network, data, folder):
    """A copy of the network adapted by the method, and the time of a step; `folder` is for what is saved."""
    torch.manual_seed(0)
    options = dict(method.options)
    if method.experts:
        experts, step = save_experts(peft, method, network, data, folder)
        if "arrow_config" in options:
            return routed(peft, method, network, list(experts.values())).eval(), step
        options["adapters"] = experts
    if method.examples:
        options |= examples(data, method.examples)
    config = getattr(peft, method.config)(**options)
    model = peft.get_peft_model(copy.deepcopy(network), config)
    return model, train(model, data, method.lr, method, method.steps)


def adapt(library, method, network, data):
    """Train, save, load and merge one adapter."""
    torch.set_num_threads(1)  # the networks are too small to be shared out
    peft = importlib.import_module(library)
    with tempfile.TemporaryDirectory() as folder:
        model, step = adapted(peft, method, network, data, folder)
        running = answers(model, data, method)
        model.save_pretrained(folder)
        if "arrow_config" in method.options:
            folders = sorted(str(path) for path in Path(folder).glob("task_*"))
            loaded = routed(peft, method, network, folders).eval()
        else:
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(network), folder).eval()
        return Row(
            method.name,
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            accuracy(answers(network, data), data),
            accuracy(running, data),
            same(running, answers(loaded, data, method)),
            same(running, answers(loaded.merge_and_unload(), data)) if method.merges else None,
            step,
        )


def plot(rows, full, path, complete=True):
    """Accuracy after adaptation against trainable parameters; `full` is (parameters, accuracy) with all trained.

    `complete`: no row is still to come, so that it pays to move the names apart.
    """
    figure, axes = plt.subplots(figsize=(12, 8), layout="constrained")
    rows = sorted(rows, key=lambda row: row.after)
    axes.scatter([r.parameters for r in rows], [r.after for r in rows], zorder=3)
    axes.scatter(*full, color="black", marker="s", zorder=3)
    axes.axhline(0.2, color="grey", linestyle=":")
    axes.text(full[0], 0.2, "a guess", ha="right", va="bottom", color="grey")
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy on digits 5 to 9, held out",
             title="A network that learned 0 to 4, adapted to 5 to 9")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.margins(0.08)
    named = [(r.parameters, r.after, r.name) for r in rows] + [(*full, "all weights")]
    labels = [axes.text(x, y, name, fontsize=8) for x, y, name in named]
    if complete:
        adjust_text(labels, ax=axes, arrowprops={"arrowstyle": "-", "color": "grey"}, expand=(1.3, 1.6))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def load():
    """Each network by name, as it learned the first half of the digits, and both halves as it reads them."""
    found = {}
    for name, made, kind in (("Reader", Reader, Data), ("RowReader", RowReader, Rows), ("Llama", llama, Sentences)):
        old, new = kind.load(range(5)), kind.load(range(5, 10))
        torch.manual_seed(0)
        found[name] = made(), old, new
        train(found[name][0], old, 1e-2)
    reader, old, new = found["Reader"]
    return found | {"4-bit Reader": (quantised(reader, HIDDEN), old, new)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=[m.name for m in METHODS],
                        choices=[m.name for m in METHODS])
    parser.add_argument("--library", default="minipeft", help="a module with PEFT's API")
    parser.add_argument("--plot", type=Path, default=Path("report/digits.png"))
    options = parser.parse_args()

    torch.set_num_threads(1)
    networks = load()
    for name, (network, old, _) in networks.items():
        print(f"{name} reads {accuracy(answers(network, old), old):.1%} of 0 to 4")
    network, _, new = networks["Reader"]
    full = copy.deepcopy(network)
    step = train(full, new, 1e-2)
    before, after = (accuracy(answers(model, new), new) for model in (network, full))
    size = sum(p.numel() for p in full.parameters())
    print(HEAD)
    rows = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        chosen = [m for m in METHODS if m.name in options.methods]
        jobs = [pool.submit(adapt, options.library, m, networks[m.network][0], networks[m.network][2]) for m in chosen]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="method"):
            rows.append(job.result())
            tqdm.write(str(rows[-1]))
            plot(rows, (size, after), options.plot, len(rows) == len(jobs))
    print(Row("all weights", size, before, after, True, None, step))
    print(f"plot: {options.plot}")
    if any(r.reloaded is False or r.merged is False for r in rows):
        raise SystemExit("a reloaded or merged model answers differently")


if __name__ == "__main__":
    main()
