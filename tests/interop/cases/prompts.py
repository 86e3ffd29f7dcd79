"""Prompts on every task class."""

from dataclasses import replace

import torch

from .. import bases as B
from .case import rows

prompt = rows("prompt_tuning", "PromptTuningConfig", num_virtual_tokens=3, fresh=False, merges=False, stacks=False)
prefix = rows("prefix_tuning", "PrefixTuningConfig", num_virtual_tokens=3, fresh=False, merges=False, stacks=False)
projected = rows("prefix_tuning", "PrefixTuningConfig", num_virtual_tokens=3, prefix_projection=True,
                 encoder_hidden_size=10, fresh=False, merges=False, stacks=False)

ptuning = rows("p_tuning", "PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=10, fresh=False,
               merges=False, stacks=False)
multitask = rows("multitask_prompt_tuning", "MultitaskPromptTuningConfig", num_virtual_tokens=3, num_tasks=3,
                 num_ranks=2, fresh=False, merges=False, stacks=False, scale=0.3,
                 inputs={"task_ids": torch.tensor([2, 0, 1, 2])})
cpt = rows("cpt", "CPTConfig", task_type="CAUSAL_LM", cpt_token_ids=[5, 9, 6, 11, 4, 8], cpt_mask=[1] * 6,
           cpt_tokens_type_mask=[1, 2, 3, 4, 5, 8], opt_projection_epsilon=2.0, opt_projection_format_epsilon=1.0,
           disputed={"running writes": "the projection is written into the weights by every forward, in eval mode too"},
           fresh=False, merges=False, stacks=False)
cartridge = rows("cartridge", "CartridgeConfig", num_virtual_tokens=3, fresh=False, merges=False, stacks=False)

TASKS = [
    (B.BERT, "FEATURE_EXTRACTION"),
    (B.BERT_SEQ, "SEQ_CLS"),
    (B.BERT_TOKEN_BARE, "TOKEN_CLS"),
    (B.BERT_QA, "QUESTION_ANS"),
    (B.GPT2, "CAUSAL_LM"),
    (B.LLAMA, "CAUSAL_LM"),
    (B.T5, "SEQ_2_SEQ_LM"),
]

T5_LABELS = replace(B.T5, draw=lambda g: {k: v for k, v in B.T5.draw(g).items() if k != "decoder_input_ids"})
# peft passes task_ids on in these only, and without decoder_input_ids only
TASKS_WITH_IDS = [*[t for t in TASKS if t[1] in ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM")], (T5_LABELS, "SEQ_2_SEQ_LM")]

DISABLE = "disable_adapter() of a prompt raises UnboundLocalError on a model that cannot generate"


def tasks(row, variant):
    return [row(f"{b.name}/{variant}", b, task_type=t, disputed={"disabled": DISABLE} if "bert" in b.name else {})
            for b, t in TASKS]


CASES = [
    *tasks(prompt, "plain"),
    prompt("t5/one_submodule", B.T5, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1),
    prompt("gpt2/sample_vocab", B.GPT2, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB"),
    *tasks(prefix, "plain"),
    *tasks(projected, "projection"),
    prefix("gpt2/zero", B.GPT2, task_type="CAUSAL_LM", init_weights="zero"),
    projected("gpt2/projection_zero", B.GPT2, task_type="CAUSAL_LM", init_weights="zero"),
    *tasks(ptuning, "plain"),
    ptuning("gpt2/lstm", B.GPT2, task_type="CAUSAL_LM", encoder_reparameterization_type="LSTM"),
    ptuning("t5/lstm", B.T5, task_type="SEQ_2_SEQ_LM", encoder_reparameterization_type="LSTM"),
    *[multitask(f"{b.name}/plain", b, task_type=t, disputed={"disabled": DISABLE} if "bert" in b.name else {},
                mixed=None if b is T5_LABELS else False) for b, t in TASKS_WITH_IDS],  # no labels, no decoder input
    *tasks(cartridge, "plain"),
    cartridge("gpt2/two_frozen", B.GPT2, task_type="CAUSAL_LM", num_frozen_tokens=2),
    cartridge("gpt2/none_frozen", B.GPT2, task_type="CAUSAL_LM", num_frozen_tokens=0),
    cpt("gpt2/plain", B.GPT2),
    cpt("llama/plain", B.LLAMA),
    cpt("gpt2/decay", B.GPT2, opt_weighted_loss_type="decay", opt_loss_decay_factor=0.7),
]
