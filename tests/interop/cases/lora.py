"""LoRA on every kind of base layer, with every option."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
BIASED = ["square", "wide"]
CONVS = ["first", "same", "point"]


_row = rows("lora", "LoraConfig", r=4, lora_alpha=6)


def lora(id, base, targets=None, **given):
    given.setdefault("mixed", True)
    given.setdefault("second", {} if "rank_pattern" in given else {"r": 2, "lora_alpha": 3})
    return _row(id, base, **({} if targets is None else {"target_modules": targets}), **given)


IN_PLACE = "attention merges into in_proj_weight and subtracts again on every run, which leaves rounding behind"
HALF_GRADIENT = ("out_proj gets its delta twice, in running and in merging (W + 2 s B A), "
                 "and the gradients are those of one of the two")
ATTENTION = {"running writes": IN_PLACE, **dict.fromkeys(("gradients", "outputs", "merge"), HALF_GRADIENT)}
UNUSED = "torch's attention reads out_proj.weight and never runs the module, so the adapter acts only once merged"
SHARED = "two adapted layers look at one weight, so merging both adds each delta to both"

CASES = [
    # nn.Linear
    lora("linear/plain", B.MLP, LINEARS),
    lora("linear/2d", B.MLP_2D, LINEARS),
    lora("linear/one", B.MLP, ["wide"]),
    lora("linear/rslora", B.MLP, LINEARS, use_rslora=True),
    lora("linear/rank_above_width", B.MLP, LINEARS, r=16),
    lora("linear/bias_all", B.MLP, LINEARS, bias="all", **trained_bias()),
    lora("linear/bias_lora_only", B.MLP, LINEARS, bias="lora_only", **trained_bias()),
    lora("linear/lora_bias", B.MLP, BIASED, lora_bias=True),
    lora("linear/lora_bias_rslora", B.MLP, BIASED, lora_bias=True, use_rslora=True),
    lora("linear/dropout", B.MLP, LINEARS, lora_dropout=0.4, train=True),
    lora("linear/rank_pattern", B.MLP, LINEARS, rank_pattern={"wide": 3, "^thin": 2}),
    lora("linear/alpha_pattern", B.MLP, LINEARS, alpha_pattern={"square": 5}, rank_pattern={"square": 2}),
    lora("linear/fan_in_fan_out_corrected", B.MLP, LINEARS, fan_in_fan_out=True),
    # initialisations
    lora("linear/init_false", B.MLP, LINEARS, init_lora_weights=False, fresh=False),
    lora("linear/init_gaussian", B.MLP, LINEARS, init_lora_weights="gaussian"),
    lora("linear/init_orthogonal", B.MLP, LINEARS, init_lora_weights="orthogonal", exact_init=False),
    lora("linear/init_pissa", B.MLP, LINEARS, init_lora_weights="pissa", exact_init=False),
    lora("linear/init_pissa_rslora", B.MLP, LINEARS, init_lora_weights="pissa", use_rslora=True, exact_init=False),
    lora("linear/init_pissa_niter_4", B.MLP, LINEARS, init_lora_weights="pissa_niter_4", exact_init=False,
         disputed={"reload": "a random factorisation is taken off the base weight again on every load"}),
    lora("linear/init_olora", B.MLP, LINEARS, init_lora_weights="olora", exact_init=False),
    lora("linear/init_eva", B.MLP, LINEARS, init_lora_weights="eva"),  # A is set later: test_eva.py
    lora("linear/init_mica", B.MLP, LINEARS, init_lora_weights="mica", exact_init=False),
    lora("linear/init_mica_rslora", B.MLP, LINEARS, init_lora_weights="mica", use_rslora=True, exact_init=False),
    # targets
    lora("targets/regex", B.STACK, r".*\.(q|down)"),
    lora("targets/full_names", B.STACK, ["layers.0.q", "layers.3.up"]),
    lora("targets/all_linear", B.MLP, "all-linear"),
    lora("targets/all_linear_no_head", B.LLAMA, "all-linear", task_type="CAUSAL_LM"),
    lora("targets/exclude_list", B.STACK, ["q", "up"], exclude_modules=["layers.1.q", "layers.2.up"]),
    lora("targets/exclude_regex", B.STACK, ["q", "up"], exclude_modules=r".*layers\.[01]\..*"),
    lora("targets/layers_to_transform", B.LLAMA, ["q_proj", "down_proj"], layers_to_transform=[1]),
    lora("targets/layers_to_transform_int", B.STACK, ["q", "down"], layers_to_transform=2, layers_pattern="layers"),
    lora("targets/layers_pattern_list", B.STACK, ["q"], layers_to_transform=[0], layers_pattern=["layers", "h"]),
    lora("targets/rank_pattern_by_path", B.STACK, ["q", "up"], rank_pattern={r"layers\.[02]\.q": 2, "up": 3},
         alpha_pattern={"layers.1.q": 9}),
    lora("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    lora("targets/modules_to_save_several", B.STACK, ["q"], modules_to_save=["norm", "head"], mixed=False,
         stacks=False),
    lora("targets/modules_to_save_only_copied", B.MLP, LINEARS, modules_to_save=["head"], stacks=False),
    lora("targets/token_indices_list", B.LLAMA, ["q_proj"], trainable_token_indices=[1, 5, 9], stacks=False),
    lora("targets/token_indices_dict", B.STACK, ["q"], trainable_token_indices={"emb": [0, 7]}, stacks=False),
    lora("targets/token_indices_tied", B.LLAMA_TIED, ["q_proj"], trainable_token_indices=[1, 5, 9], stacks=False),
    lora("targets/tying_modules_to_save", B.LLAMA_TIED, ["q_proj"], modules_to_save=["embed_tokens"],
         ensure_weight_tying=True, mixed=False, stacks=False, second=None),  # peft does not tie a second adapter
    lora("targets/tying_embedding", B.LLAMA_TIED, ["q_proj", "embed_tokens"], ensure_weight_tying=True,
         second=None, disputed={"merge": SHARED}),
    lora("targets/tying_tokens", B.LLAMA_TIED, ["q_proj"], trainable_token_indices=[2, 3], ensure_weight_tying=True,
         stacks=False),
    lora("targets/layer_replication", B.LLAMA, ["q_proj", "down_proj"], layer_replication=[[0, 2], [1, 2]],
         fresh=False, second={"r": 2, "lora_alpha": 3, "layer_replication": None},
         disputed={"merge": SHARED, "restore": "unload() leaves the model with its replicated layers"}),
    lora("targets/default_of_model_type", B.LLAMA),
    # convolutions
    *[lora(f"{base.name}/plain", base, CONVS) for base in (B.CONV1D, B.CONV2D)],
    lora("conv3d/plain", B.CONV3D, ["first", "same"]),
    lora("conv3d/pointwise", B.CONV3D, ["point"], merges=False),
    *[lora(f"{base.name}/plain", base, CONVS, merges=False)
      for base in (B.CONV1D_GROUPS, B.CONV2D_GROUPS, B.CONV3D_GROUPS)],
    lora("conv2d_uneven/plain", B.CONV2D_UNEVEN, ["first", "point"]),
    lora("conv2d/rslora", B.CONV2D, CONVS, use_rslora=True),
    lora("conv2d/lora_bias", B.CONV2D, ["first", "point"], lora_bias=True),
    lora("conv2d/bias_all", B.CONV2D, CONVS, bias="all", **trained_bias()),
    lora("conv2d/gaussian", B.CONV2D, CONVS, init_lora_weights="gaussian"),
    lora("conv2d/init_false", B.CONV2D, CONVS, init_lora_weights=False, fresh=False),
    lora("conv2d/dropout", B.CONV2D, CONVS, lora_dropout=0.4, train=True),
    # embeddings
    lora("embedding/plain", B.EMBEDDING, ["emb"]),
    lora("embedding/padding", B.EMBEDDING_PAD, ["emb"]),
    lora("embedding/with_linear", B.EMBEDDING, ["emb", "lin"]),
    lora("embedding/init_false", B.EMBEDDING, ["emb"], init_lora_weights=False, fresh=False),
    lora("embedding/gaussian", B.EMBEDDING, ["emb"], init_lora_weights="gaussian"),
    lora("embedding/mica", B.EMBEDDING, ["emb"], init_lora_weights="mica", exact_init=False),
    lora("embedding/rslora", B.EMBEDDING, ["emb"], use_rslora=True),
    # transformers' Conv1D
    lora("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    lora("hf_conv1d/with_linear", B.HF_CONV1D, [*LINEARS, "head"], fan_in_fan_out=True),
    lora("hf_conv1d/lora_bias", B.HF_CONV1D, LINEARS, fan_in_fan_out=True, lora_bias=True),
    lora("hf_conv1d/mica", B.HF_CONV1D, LINEARS, fan_in_fan_out=True, init_lora_weights="mica", exact_init=False),
    lora("hf_conv1d/pissa", B.HF_CONV1D, LINEARS, fan_in_fan_out=True, init_lora_weights="pissa", exact_init=False),
    # nn.MultiheadAttention; no mixed batches here and on parameters, whose weight is one for all samples
    lora("attention/plain", B.ATTENTION, ["attn"], mixed=None, disputed=ATTENTION),
    lora("attention/out_proj", B.ATTENTION, ["out_proj"], mixed=None, disputed={"outputs": UNUSED}),
    lora("attention/no_bias", B.ATTENTION_NO_BIAS, ["attn"], mixed=None, disputed=ATTENTION),
    lora("attention/sequence_first", B.ATTENTION_SEQ_FIRST, ["attn"], mixed=None, disputed=ATTENTION),
    lora("attention/init_false", B.ATTENTION, ["attn"], init_lora_weights=False, fresh=False, mixed=None,
         disputed=ATTENTION),
    # a bare nn.Parameter
    lora("parameter/2d", B.BARE, [], target_parameters=["bare.weight"], mixed=None),
    lora("parameter/2d_with_linear", B.BARE, ["lin"], target_parameters=["bare.weight"], mixed=None),
    lora("parameter/of_linear", B.MLP, [], target_parameters=["wide.weight", "square.weight"], mixed=None),
    lora("parameter/3d", B.EXPERTS, [], target_parameters=["moe.up"], mixed=None),
    lora("parameter/3d_two", B.EXPERTS, [], target_parameters=["moe.up", "moe.down"], mixed=None),
    lora("parameter/3d_rslora", B.EXPERTS, [], target_parameters=["moe.down"], use_rslora=True, mixed=None),
    lora("parameter/3d_rank_pattern", B.EXPERTS, [], target_parameters=["moe.up", "moe.down"],
         rank_pattern={"moe.up": 2}, alpha_pattern={"moe.down": 5}, mixed=None),
    # transformers models
    lora("bert/plain", B.BERT, ["query", "value"], task_type="FEATURE_EXTRACTION"),
    lora("bert/embeddings", B.BERT, ["word_embeddings", "dense"]),
    lora("bert_seq/plain", B.BERT_SEQ, ["query", "value"], task_type="SEQ_CLS", stacks=False),
    lora("bert_token/plain", B.BERT_TOKEN, ["query", "value"], task_type="TOKEN_CLS", stacks=False),
    lora("bert_qa/plain", B.BERT_QA, ["query", "value"], task_type="QUESTION_ANS", stacks=False),
    lora("gpt2/plain", B.GPT2, ["c_attn", "c_proj"], task_type="CAUSAL_LM", fan_in_fan_out=True),
    lora("gpt2_seq/plain", B.GPT2_SEQ, ["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True, stacks=False),
    lora("t5/plain", B.T5, ["q", "v"], task_type="SEQ_2_SEQ_LM"),
    lora("llama/plain", B.LLAMA, ["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
]

DILATED = "RuntimeError"  # lora_A is built without the base layer's dilation
REFUSED = [
    *[Refused(f"lora/refused/{b.name}", "LoraConfig", {"target_modules": ["first"]}, b, "run", DILATED)
      for b in (B.CONV1D_DILATED, B.CONV2D_DILATED, B.CONV3D_DILATED)],
    Refused("lora/refused/layers_without_prefix", "LoraConfig",
            {"target_modules": ["q"], "layers_to_transform": [1]}, B.STACK, "inject", "ValueError"),
    Refused("lora/refused/olora_hf_conv1d", "LoraConfig",
            {"target_modules": ["wide"], "fan_in_fan_out": True, "init_lora_weights": "olora"}, B.HF_CONV1D,
            "run", "RuntimeError"),
    Refused("lora/refused/mica_dora", "LoraConfig",
            {"target_modules": ["wide"], "use_dora": True, "init_lora_weights": "mica"}, B.MLP, "inject", "ValueError"),
    Refused("lora/refused/mica_rank", "LoraConfig",
            {"target_modules": ["wide"], "r": 100, "init_lora_weights": "mica"}, B.MLP, "inject", "ValueError"),
    Refused("lora/refused/r0", "LoraConfig", {"r": 0, "target_modules": ["wide"]}, B.MLP, "inject", "ValueError"),
    Refused("lora/refused/parameter_dropout", "LoraConfig",
            {"target_parameters": ["wide.weight"], "lora_dropout": 0.1}, B.MLP, "inject", "ValueError"),
    Refused("lora/refused/parameter_bias", "LoraConfig",
            {"target_parameters": ["wide.weight"], "lora_bias": True}, B.MLP, "inject", "ValueError"),
    Refused("lora/refused/norm", "LoraConfig", {"target_modules": ["norm"]}, B.STACK, "inject", "ValueError"),
]
