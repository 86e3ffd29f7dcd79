"""Shadow on decoders of several kinds."""

from .. import bases as B
from .case import Refused, rows

META = {"low memory": "low_cpu_mem_usage=True raises NotImplementedError: the shadow is on the meta device"}
WRAPPED = {**META, "restore": "unload() leaves the wrappers of modules_to_save in the model"}
_row = rows("shadow", "ShadowConfig", r=3, merges=False, stacks=False, own_loss=True, disputed=META)


def shadow(id, base, **given):
    return _row(id, base, **{"task_type": "CAUSAL_LM", **given})


CASES = [
    shadow("llama/plain", B.LLAMA),
    shadow("llama/no_task", B.LLAMA, task_type=None),
    shadow("llama/narrow", B.LLAMA, shadow_hidden_size=8, shadow_intermediate_size=12, shadow_num_hidden_layers=2,
           second={"r": 2, "shadow_hidden_size": None}),
    shadow("llama/heads", B.LLAMA_GROUPED, shadow_num_attention_heads=1, update_hidden_size=5, shadow_alpha=0.7),
    shadow("llama/own_embeddings", B.LLAMA, share_embeddings=False, auxiliary_loss_weight=0.5),
    shadow("llama/no_loss", B.LLAMA, auxiliary_loss_weight=0),
    shadow("llama/init_false", B.LLAMA, init_weights=False, fresh=False),
    shadow("llama/random_while_training", B.LLAMA, train=True, shadow_dropout=0.5),
    shadow("llama/no_dropout", B.LLAMA, train=False, shadow_dropout=0.0),
    shadow("llama/some_blocks", B.LLAMA_DEEP, target_modules=["layers.1", "layers.2"]),
    shadow("llama/regex", B.LLAMA_DEEP, target_modules=r".*layers\.[01]$"),
    shadow("llama/exclude", B.LLAMA_DEEP, exclude_modules=["layers.2"]),
    shadow("llama/modules_to_save", B.LLAMA, modules_to_save=["lm_head"], disputed=WRAPPED),
    shadow("llama_seq/classifier", B.LLAMA_SEQ, task_type="SEQ_CLS", second=None, disputed=WRAPPED),
    shadow("llama_bare/plain", B.LLAMA_BARE, task_type="FEATURE_EXTRACTION"),
    shadow("mistral/plain", B.MISTRAL),
    shadow("gpt2/plain", B.GPT2),
    shadow("opt/plain", B.OPT),
    shadow("qwen3/plain", B.QWEN3),
    shadow("gemma3/plain", B.GEMMA3),
]


def refused(id, error, base=B.LLAMA, step="inject", **given):
    return Refused(f"shadow/refused/{id}", "ShadowConfig", {"r": 3, **given}, base, step, error)


REFUSED = [
    refused("r", "ValueError", r=0),
    refused("encoder", "AttributeError", base=B.BERT),
    refused("merge", "NotImplementedError", step="merge"),
    refused("linear", "AttributeError", target_modules=["q_proj"], step="run"),
    refused("gap", "AttributeError", base=B.LLAMA_DEEP, target_modules=["layers.0", "layers.2"], step="run"),
    refused("second_classifier", "ValueError", base=B.LLAMA_SEQ, task_type="SEQ_CLS", step="second"),
]
