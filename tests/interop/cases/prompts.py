"""Prompt tuning and prefix tuning on every task class."""

from .. import bases as B
from .case import rows

prompt = rows("prompt_tuning", "PromptTuningConfig", num_virtual_tokens=3, fresh=False, merges=False, stacks=False)
prefix = rows("prefix_tuning", "PrefixTuningConfig", num_virtual_tokens=3, fresh=False, merges=False, stacks=False)
projected = rows("prefix_tuning", "PrefixTuningConfig", num_virtual_tokens=3, prefix_projection=True,
                 encoder_hidden_size=10, fresh=False, merges=False, stacks=False)

TASKS = [
    (B.BERT, "FEATURE_EXTRACTION"),
    (B.BERT_SEQ, "SEQ_CLS"),
    (B.BERT_TOKEN_BARE, "TOKEN_CLS"),
    (B.BERT_QA, "QUESTION_ANS"),
    (B.GPT2, "CAUSAL_LM"),
    (B.LLAMA, "CAUSAL_LM"),
    (B.T5, "SEQ_2_SEQ_LM"),
]

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
]
