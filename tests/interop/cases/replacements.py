"""Methods that put something in a layer's place: LN tuning and trainable tokens."""

from .. import bases as B
from .case import Refused, rows

ln = rows("ln_tuning", "LNTuningConfig", stacks=False)
tokens = rows("trainable_tokens", "TrainableTokensConfig", stacks=False)
WRAPPED = {"restore": "unload() leaves the wrappers of modules_to_save in the model"}

CASES = [
    ln("norm/plain", B.NORMS, target_modules=["ln", "plain"]),
    ln("norm/one", B.NORMS, target_modules=["plain"]),
    ln("norm/exclude", B.STACK, target_modules=["norm"], exclude_modules=["layers.0.norm"]),
    ln("norm/modules_to_save", B.STACK, target_modules=["norm"], modules_to_save=["head"], disputed=WRAPPED),
    ln("linear/plain", B.MLP, target_modules=["wide", "thin"]),
    ln("bert_seq/plain", B.BERT_SEQ, target_modules=["LayerNorm"], task_type="SEQ_CLS", disputed=WRAPPED),
    ln("llama/default", B.LLAMA, task_type="CAUSAL_LM"),
    tokens("embedding/plain", B.EMBEDDING, target_modules=["emb"], token_indices=[0, 3, 19], stacks=True,
           second={"token_indices": [1, 5]}),
    tokens("embedding/same_tokens", B.EMBEDDING, target_modules=["emb"], token_indices=[0, 3, 4]),
    tokens("embedding/unsorted", B.EMBEDDING, target_modules=["emb"], token_indices=[9, 2, 4]),
    tokens("embedding/init_false", B.EMBEDDING, target_modules=["emb"], token_indices=[1, 2], init_weights=False,
           fresh=False),
    tokens("embedding/padding", B.EMBEDDING_PAD, target_modules=["emb"], token_indices=[3, 4]),
    tokens("llama/default", B.LLAMA, token_indices=[3, 4, 9], task_type="CAUSAL_LM"),
    tokens("llama_tied/default", B.LLAMA_TIED, second=None, token_indices=[3, 4, 9], task_type="CAUSAL_LM"),
    tokens("bert/plain", B.BERT, target_modules=["word_embeddings"], token_indices=[3, 4, 9]),
]

REFUSED = [
    Refused("trainable_tokens/refused/norm", "TrainableTokensConfig", {"target_modules": ["ln"], "token_indices": [1]},
            B.NORMS, "run", "AttributeError"),
    Refused("trainable_tokens/refused/tied_second", "TrainableTokensConfig", {"token_indices": [3, 4]}, B.LLAMA_TIED,
            "second", "ValueError"),
    Refused("trainable_tokens/refused/out_of_range", "TrainableTokensConfig",
            {"target_modules": ["emb"], "token_indices": [25]}, B.EMBEDDING, "inject", "IndexError"),
]
