"""IA3: a learned scale on the outputs, or on the inputs of feed-forward modules."""

from .. import bases as B
from .case import Refused, rows

LINEARS = ["square", "wide", "thin"]
CONVS = ["first", "same", "point"]
_row = rows("ia3", "IA3Config")


def ia3(id, base, targets, feedforward=(), **given):
    return _row(id, base, target_modules=targets, feedforward_modules=list(feedforward), **given)


CASES = [
    ia3("linear/plain", B.MLP, LINEARS),
    ia3("linear/2d", B.MLP_2D, LINEARS),
    ia3("linear/feedforward", B.MLP, LINEARS, ["wide", "thin"]),
    ia3("linear/all_feedforward", B.MLP, LINEARS, LINEARS),
    ia3("linear/init_false", B.MLP, LINEARS, ["wide"], init_ia3_weights=False, fresh=False),
    ia3("linear/fan_in_fan_out_corrected", B.MLP, LINEARS, fan_in_fan_out=True),
    ia3("targets/regex", B.STACK, r".*\.(q|down)"),
    ia3("targets/exclude", B.STACK, ["q", "down"], ["down"], exclude_modules=["layers.0.down"]),
    ia3("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False),
    ia3("targets/all_linear", B.MLP, "all-linear"),
    ia3("conv2d/plain", B.CONV2D, CONVS),
    ia3("conv2d/feedforward", B.CONV2D, CONVS, ["same", "point"]),
    ia3("conv2d_groups/plain", B.CONV2D_GROUPS, CONVS),
    ia3("conv2d_groups/feedforward", B.CONV2D_GROUPS, CONVS, ["same", "point"]),
    ia3("conv2d_dilated/plain", B.CONV2D_DILATED, ["first", "point"]),
    ia3("conv3d/plain", B.CONV3D, CONVS),
    ia3("conv3d/feedforward", B.CONV3D, CONVS, ["same", "point"]),
    ia3("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True),
    ia3("hf_conv1d/feedforward", B.HF_CONV1D, LINEARS, ["wide", "thin"], fan_in_fan_out=True),
    ia3("bert_seq/plain", B.BERT_SEQ, ["key", "value", "output.dense"], ["output.dense"],
        task_type="SEQ_CLS", stacks=False),
    ia3("t5/default", B.T5, None, task_type="SEQ_2_SEQ_LM"),
    ia3("llama/plain", B.LLAMA, ["k_proj", "v_proj", "down_proj"], ["down_proj"], task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("ia3/refused/feedforward_not_target", "IA3Config",
            {"target_modules": ["wide"], "feedforward_modules": ["thin"]}, B.MLP, "inject", "ValueError"),
    Refused("ia3/refused/conv1d", "IA3Config", {"target_modules": ["first"], "feedforward_modules": []}, B.CONV1D,
            "inject", "ValueError"),
    Refused("ia3/refused/embedding", "IA3Config", {"target_modules": ["emb"], "feedforward_modules": []}, B.EMBEDDING,
            "inject", "ValueError"),
    Refused("ia3/refused/attention", "IA3Config", {"target_modules": ["attn"], "feedforward_modules": []}, B.ATTENTION,
            "inject", "ValueError"),
]
