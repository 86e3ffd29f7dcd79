"""Adaption prompts (LLaMA-Adapter) on the attention of Llama, Mistral and GPT-2."""

from .. import bases as B
from .case import Refused, rows

STAYS = "modules of an adapter that is not active are kept outside the model, so `model.double()` misses them"
_row = rows("adaption_prompt", "AdaptionPromptConfig", adapter_len=3, adapter_layers=2, merges=False, stacks=False,
            disputed={"moved": STAYS, "restore": "there is no unload()"})


def prompt(id, base, **given):
    return _row(id, base, **{"task_type": "CAUSAL_LM", **given})


CASES = [
    prompt("llama/plain", B.LLAMA),
    prompt("llama/one_layer", B.LLAMA, adapter_layers=1, second={"adapter_layers": 2, "adapter_len": 4}),
    prompt("llama/no_task", B.LLAMA, task_type=None),
    prompt("llama_grouped/plain", B.LLAMA_GROUPED, adapter_len=4),
    prompt("llama_bare/plain", B.LLAMA_BARE, task_type="FEATURE_EXTRACTION"),
    prompt("llama_seq/plain", B.LLAMA_SEQ, task_type="SEQ_CLS"),
    prompt("mistral/plain", B.MISTRAL),
    prompt("mistral/named", B.MISTRAL, target_modules="self_attn", adapter_layers=1),
    prompt("gpt2/plain", B.GPT2),
    prompt("gpt2/one_layer", B.GPT2, adapter_layers=1, adapter_len=1),
]


def refused(id, error, base=B.LLAMA, step="inject", **given):
    config = {"adapter_len": 3, "adapter_layers": 2, **given}
    return Refused(f"adaption_prompt/refused/{id}", "AdaptionPromptConfig", config, base, step, error)


REFUSED = [
    refused("layers", "ValueError", adapter_layers=5),
    refused("model_type", "ValueError", base=B.BERT),
    refused("no_len", "TypeError", adapter_len=None),
    refused("no_layers", "TypeError", adapter_layers=None),
    refused("name", "ValueError", target_modules="attention"),
    refused("not_attention", "AttributeError", target_modules="mlp"),
    refused("merge", "AttributeError", step="merge"),
]
