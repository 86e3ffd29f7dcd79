"""Weights that several modules use or that are saved whole, beside adapters that change or are merged into them."""

import pytest
import torch
from torch import nn

from .bases import LLAMA_TIED


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 6), "lm_head": nn.Linear(6, 9)})

    def forward(self, ids):
        return self.model["lm_head"](self.model["embed_tokens"](ids))

    def get_input_embeddings(self):
        return self.model["embed_tokens"]

    def get_output_embeddings(self):
        return self.model["lm_head"]


@pytest.fixture(autouse=True)
def _not_for_peft(is_ref):
    if is_ref:
        pytest.skip("a promise of the module under test alone")


def test_merged_layers_are_saved_as_they_were(lib, tmp_path):
    """Whole embedding layers: what is merged into them would come back twice."""
    config = lib.LoraConfig(target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)
    model, ids = lib.get_peft_model(Words(), config), torch.arange(5)
    want = model(ids)
    model.merge_adapter()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    torch.testing.assert_close(lib.PeftModel.from_pretrained(Words(), tmp_path)(ids), want)


@pytest.mark.parametrize("kind", ["IA3Config", "BeftConfig"])
def test_a_shared_bias_is_not_written_to(kind, lib):
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    net[2].bias = net[0].bias
    fields = {"feedforward_modules": []} if kind == "IA3Config" else {}
    model = lib.get_peft_model(net, getattr(lib, kind)(target_modules=["0"], **fields))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)
    x = torch.linspace(-1, 1, 24).view(4, 6)
    want, before = model(x), {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(lib.MergeError, match="other modules use too"):
        model.merge_adapter()
    assert torch.equal(model(x), want)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_a_tied_head_leaves_the_embedding(start, lib):
    ids = torch.tensor([[3, 4, 5]])
    net = LLAMA_TIED.build().eval()
    want, words = net(ids).logits, net.get_input_embeddings().weight.clone()
    config = lib.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=start)
    with pytest.warns(UserWarning, match="untied"):
        model = lib.get_peft_model(net, config)
    torch.testing.assert_close(model(ids).logits, want)
    assert torch.equal(net.get_input_embeddings().weight, words) and not net.config.tie_word_embeddings


def test_a_copy_of_a_merged_layer_begins_with_what_it_was(lib):
    net, x = nn.Sequential(nn.LayerNorm(6)), torch.linspace(-1, 1, 24).view(4, 6)
    want = net(x)
    model = lib.get_peft_model(net, lib.LNTuningConfig(target_modules=["0"]), "a")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    model.merge_adapter()
    model.add_adapter("b", lib.LNTuningConfig(target_modules=["0"]))
    model.set_adapter("b")
    assert torch.equal(model(x), want)
