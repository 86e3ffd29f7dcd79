"""PVeRA: VeRA with a random latent vector while training; merged, it is the mean."""

from .. import bases as B
from .case import Refused, rows, trained_bias

LINEARS = ["square", "wide", "thin"]
_row = rows("pvera", "PveraConfig", r=6)


def pvera(id, base, targets, **given):
    return _row(id, base, target_modules=targets, **given)


CASES = [
    pvera("linear/plain", B.MLP, LINEARS, train=True),
    pvera("linear/2d", B.MLP_2D, LINEARS),
    pvera("linear/key", B.MLP, LINEARS, projection_prng_key=77),
    pvera("linear/not_saved", B.MLP, LINEARS, save_projection=False),
    pvera("linear/d_initial", B.MLP, LINEARS, d_initial=0.7),
    pvera("linear/init_false", B.MLP, LINEARS, init_weights=False, fresh=False),
    pvera("linear/dropout", B.MLP, LINEARS, pvera_dropout=0.4, train=True),
    pvera("linear/generator_seed", B.MLP, LINEARS, generator_seed=5, train=True),
    pvera("linear/bias_pvera_only", B.MLP, LINEARS, bias="pvera_only", **trained_bias()),
    pvera("targets/modules_to_save", B.STACK, ["q", "up"], modules_to_save=["head"], stacks=False),
    pvera("hf_conv1d/plain", B.HF_CONV1D, LINEARS, fan_in_fan_out=True, train=True),
    pvera("llama/plain", B.LLAMA, ["q_proj", "down_proj"], task_type="CAUSAL_LM", train=True),
]

REFUSED = [
    Refused("pvera/refused/embedding", "PveraConfig", {"target_modules": ["emb"]}, B.EMBEDDING, "inject", "ValueError"),
    Refused("pvera/refused/conv2d", "PveraConfig", {"target_modules": ["first"]}, B.CONV2D, "inject", "ValueError"),
]
