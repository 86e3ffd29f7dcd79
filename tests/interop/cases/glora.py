"""GLoRA: scales and shifts of weight and bias, each low-rank, a vector, a number or nothing."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("glora", "GloraConfig", r=3, mixed=True)


def glora(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    glora("linear/plain", B.MLP, LINEARS, second={"r": 2}),
    glora("linear/2d", B.MLP_2D, LINEARS),
    glora("linear/vectors", B.MLP, LINEARS, config_A_B="vector", config_C="vector", config_D_E="vector"),
    glora("linear/constants", B.MLP, LINEARS, config_A_B="constant", config_C="none", config_D_E="constant"),
    glora("linear/bias_alone", B.MLP, ["square", "wide"], config_A_B="none", config_C="lora", config_D_E="none"),
    glora("linear/weight_alone", B.MLP, LINEARS, config_C="none", config_D_E="none"),
    glora("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    glora("linear/init_false_vectors", B.MLP, LINEARS, config_A_B="vector", config_C="vector", config_D_E="vector",
          init_weights=False, fresh=False),
    glora("linear/bias_all", B.MLP, LINEARS, bias="all", **trained_bias()),
    glora("linear/bias_glora_only", B.MLP, LINEARS, bias="glora_only", **trained_bias()),
    glora("targets/modules_to_save", B.STACK, ["q"], modules_to_save=["head"], stacks=False, mixed=False),
    glora("llama/default", B.LLAMA, None, task_type="CAUSAL_LM"),
]

REFUSED = [
    Refused("glora/refused/conv2d", "GloraConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "ValueError"),
    Refused("glora/refused/embedding", "GloraConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject", "ValueError"),
]
