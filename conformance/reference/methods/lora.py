"""LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685, eq. 3; rsLoRA: https://arxiv.org/abs/2312.03732."""

import numpy as np

from ..bases import TYPES
from ..method import KEY, Fault, Laws, Method, Row, Tensors
from ..numpy_model import sites, stored
from ..rules import of_pattern


def rank(site, c):
    return of_pattern(c.get("rank_pattern"), site.path, c.get("r", 8))


def scaling(site, c):
    return strength_of(c, site.path, rank(site, c))


def strength_of(c, path, r):
    """The scale on a layer whose factors have the rank r; `path` may be the saved key of one of them."""
    path = path.removeprefix(KEY).rpartition(".lora_")[0] or path
    alpha = of_pattern(c.get("alpha_pattern"), path, c.get("lora_alpha", 8))
    return alpha / (np.sqrt(r) if c.get("use_rslora") else r)


def names(site):
    return ("lora_embedding_A", "lora_embedding_B") if site.kind == "Embedding" else ("lora_A.weight", "lora_B.weight")


def shapes(site, c):
    a, b = names(site)
    r, ones = rank(site, c), [1] * len(site.kernel)
    if site.kind == "Experts":
        experts, o, i = site.W.shape
        return {a: (r * experts, i), b: (o, r * experts)}
    bias = {"lora_B.bias": (site.out,)} if c.get("lora_bias") else {}
    bias |= {"lora_diag": (r,)} if c.get("kasa_config") else {}
    return {a: (r, site.inp, *site.kernel), b: (site.out, r // site.args.get("groups", 1), *ones), **bias}


def delta(site, t):
    """B A, unscaled, in the layout of W."""
    a, b = names(site)
    A, B = t[a], t[b]
    if "lora_diag" in t:  # KaSA
        B = B * t["lora_diag"]
    if site.kind == "Experts":
        experts = site.W.shape[0]
        A, B = A.reshape(experts, -1, A.shape[1]), B.reshape(B.shape[0], -1, experts)
        return np.einsum("ore,eri->eoi", B, A)
    return np.einsum("or,r...->o...", B.reshape(B.shape[0], -1), A)


def truncated(base, weights, r, targets):
    """KaSA: the base weights without the `r` smallest singular values of each target."""
    found = dict(weights)
    for path, site in sites(base, weights).items():
        if path in targets:
            u, s, v = np.linalg.svd(site.W, full_matrices=False)
            found[site.weight] = stored(site, (u[:, :-r] * s[:-r]) @ v[:-r])
    return found


def kasa_penalty(tensors, c):
    """KaSA: beta |E|^2 + gamma (|A A^T - I| + |B^T B - I|), over all layers."""
    def off(M):
        return np.linalg.norm(M - np.eye(len(M)))

    total = 0.0
    for path in sorted(k.removesuffix(".lora_diag") for k in tensors if k.endswith(".lora_diag")):
        A, B, E = (np.asarray(tensors[f"{path}.{slot}"], np.float64) for slot in (
            "lora_A.weight", "lora_B.weight", "lora_diag"))
        total += c["kasa_config"]["beta"] * (E**2).sum() + c["kasa_config"]["gamma"] * (off(A @ A.T) + off(B.T @ B))
    return total


def formula(site, t, c):
    s = scaling(site, c)
    b = site.b
    if "lora_B.bias" in t:
        b = (0 if b is None else b) + s * t["lora_B.bias"]
    return site.W + s * delta(site, t), b


def run(site, t, c, x, inputs):
    """Grouped convolutions: A sees all channels, so the sum is no grouped convolution and cannot be merged."""
    if site.args.get("groups", 1) == 1:
        return None
    from ..numpy_model import conv

    down = conv(x, t["lora_A.weight"], None, {**site.args, "groups": 1})
    up = conv(down, t["lora_B.weight"], None, {"groups": site.args["groups"]})
    return conv(x, site.W, site.b, site.args) + scaling(site, c) * up


def unscaled(formula):
    def wrong(site, t, c):
        W, b = formula(site, t, c)
        return site.W + (W - site.W) / site.args.get("embed_scale", 1), b

    return wrong


def without_types(o, right, inputs, adapter_names=None):
    return right({k: v for k, v in inputs.items() if k != "token_type_ids"}, adapter_names)


def lora(**more):
    return {"r": 4, "lora_alpha": 6, "target_modules": ["up", "mid"], **more}


def task(task_type):
    return lora(task_type=task_type, target_modules=["q_proj", "v_proj", "mlp"], r=2, lora_alpha=1)


C, E = ["c1", "c2"], ["emb"]
EXACT = ("float64", "float32")  # through two blocks of a transformer, bfloat16 rounds by more than its tolerance
MASK = {"attention_mask": {"values": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]}}
SQUARE = "B is square, so its shape does not tell rows from columns"
ROWS = [
    Row("linear/plain", "mlp", lora(), "core", second=lora(r=2, lora_alpha=3)),
    Row("linear/rslora", "mlp", lora(use_rslora=True), "core"),
    Row("linear/lora-bias", "mlp", lora(lora_bias=True), "core"),
    Row("linear/no-base-bias", "mlp-nobias", lora(), "core"),
    Row("linear/tokens", "mlp-tokens", lora(r=3, lora_alpha=7)),
    Row("linear/rank-one", "mlp", lora(r=1, lora_alpha=1)),
    Row("linear/rank-above-width", "mlp", lora(r=12, lora_alpha=5)),
    Row("linear/rank-is-width", "mlp", lora(r=10, lora_alpha=7), note=SQUARE),
    Row("linear/bias-all", "mlp", lora(bias="all")),
    Row("linear/bias-lora-only", "mlp", lora(bias="lora_only")),
    Row("linear/regex", "mlp", lora(target_modules=r"(up|head)")),
    Row("linear/all-linear", "mlp", lora(target_modules="all-linear")),
    Row("linear/exclude", "mlp", lora(target_modules="all-linear", exclude_modules=["mid"])),
    Row("linear/modules-to-save", "mlp", lora(modules_to_save=["head"]), "core"),
    Row("linear/buffer-to-save", "buffer", lora(modules_to_save=["norm"])),
    Row("linear/rank-pattern", "blocks", lora(target_modules=["q_proj", "v_proj"], rank_pattern={
        "model.layers.1.q_proj": 3, "v_proj": 2}), "core"),
    Row("linear/alpha-pattern", "blocks", lora(target_modules=["q_proj", "v_proj"], alpha_pattern={
        "layers.2.v_proj": 16, "q_proj": 3})),
    Row("linear/layers-to-transform", "blocks", lora(target_modules=["q_proj"], layers_to_transform=[0, 2])),
    Row("linear/layers-pattern", "blocks", lora(target_modules=["v_proj"], layers_to_transform=1,
                                                layers_pattern="layers")),
    Row("conv1d/plain", "conv1d", lora(target_modules=C), "core"),
    Row("conv2d/plain", "conv2d", lora(target_modules=C), "core"),
    Row("conv2d/strided", "conv2d-strided", lora(target_modules=C, r=3, use_rslora=True)),
    Row("conv2d/lora-bias", "conv2d", lora(target_modules=C, lora_bias=True)),
    Row("conv2d/groups", "conv2d-groups", lora(target_modules=C), merges=False,
        note="A sees the channels of all groups, so no grouped kernel equals the sum"),
    Row("conv2d/one-by-one", "conv2d-1x1", lora(target_modules=C)),
    Row("conv3d/plain", "conv3d", lora(target_modules=C)),
    Row("embedding/plain", "embedding", lora(target_modules=E), "core"),
    Row("embedding/rslora", "embedding", lora(target_modules=E, use_rslora=True)),
    Row("embedding/scaled", "embedding-scaled", lora(target_modules=E)),
    Row("conv1d-hf/plain", "gpt", lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), "core"),
    Row("attention/plain", "attention", lora(target_modules=["attn"]), "core",
        disputed="the reference adds out_proj's delta twice: MultiheadAttention.merge adds it itself and then calls "
                 "out_proj.merge, which adds it again; forward merges likewise "
                 "(https://github.com/huggingface/peft/pull/3774)"),
    Row("parameter/matrix", "parameter", lora(target_modules=[], target_parameters=["router.weight"])),
    Row("parameter/two-of-a-module", "parameters", lora(target_modules=[], target_parameters=[
        "pair.up", "pair.down"])),
    Row("parameter/experts", "experts", lora(target_modules=[], target_parameters=["experts.weight"])),
    Row("parameter/experts-transposed", "experts-transposed", lora(target_modules=[], target_parameters=[
        "experts.weight"])),
    Row("tokens/with-lora", "tokens-mlp", lora(trainable_token_indices={"embed_tokens": [1, 4, 7]})),
    Row("tokens/scaled", "embedding-scaled", lora(target_modules=["head"], trainable_token_indices={"emb": [2, 7]})),
    Row("causal-lm/masked", "causal-lm", task("CAUSAL_LM"), dtypes=EXACT, inputs=MASK),
    Row("encoder/features", "encoder", task("FEATURE_EXTRACTION"), dtypes=EXACT, inputs=MASK),
    Row("encoder/sequence", "encoder-sequence", task("SEQ_CLS"), dtypes=EXACT, inputs=MASK),
    Row("encoder/token-types", "encoder-types", task("SEQ_CLS"), dtypes=EXACT, inputs={**MASK, **TYPES}),
    Row("encoder/tokens", "encoder-tokens", task("TOKEN_CLS"), dtypes=EXACT, inputs=MASK),
    Row("encoder/answers", "encoder-answers", task("QUESTION_ANS"), dtypes=EXACT, inputs=MASK),
    Row("encoder-decoder/plain", "encoder-decoder", task("SEQ_2_SEQ_LM"), dtypes=EXACT, inputs={
        **MASK, "decoder_input_ids": [[2, 4], 13], "decoder_attention_mask": {"values": [[1, 1, 1, 1], [1, 1, 0, 0]]}}),
]


def wrong(**config):
    """The formula under another config."""
    return {"formula": lambda site, t, c: formula(site, t, {**c, **config})}


def swapped(site, t, c):
    """B's and A's roles changed: (A^T B^T)^T read with the wrong axis, possible where the layer is square."""
    D = delta(site, t)
    return site.W + scaling(site, c) * (np.swapaxes(D, 0, 1) if D.shape[0] == D.shape[1] else D), site.b


def scaled(change):
    """The formula with another scale, computed from the right one."""
    def wrong_scale(site, t, c):
        s, r = scaling(site, c), rank(site, c)
        return formula(site, t, {**c, "lora_alpha": change(s) * r, "use_rslora": False, "alpha_pattern": {}})

    return {"formula": wrong_scale}


def b_by_columns(site, t, c):
    b = names(site)[1]
    B = t[b]
    return formula(site, {**t, b: B.reshape(B.shape[1], B.shape[0], *B.shape[2:]).swapaxes(0, 1)}, c)


def b_transposed(site, t, c):
    """A^T B for A^T B^T: an error, unless r is the number of outputs."""
    a, b = names(site)
    return site.W + scaling(site, c) * (t[a].swapaxes(0, -1) @ t[b]).swapaxes(0, -1), site.b


def alpha_only(site, t, c):
    return site.W + c.get("lora_alpha", 8) * delta(site, t), formula(site, t, c)[1]


PLAIN = ("linear/plain",)
FAULTS = (
    Fault("alpha-not-over-r", "the scale is alpha, not alpha / r", {"formula": alpha_only},
          spares=("linear/rank-one", "conv2d/groups"), link="https://github.com/Blaizzy/mlx-vlm/issues/845"),
    Fault("unscaled", "there is no scale, B A is added as it is", scaled(lambda s: 1.0), cases=PLAIN),
    Fault("scaled-twice", "the scale is applied twice", scaled(lambda s: s**2), cases=PLAIN),
    Fault("scale-inverse", "the scale is r / alpha, the inverse of what it should be", scaled(lambda s: 1 / s),
          cases=PLAIN),
    Fault("rslora-always", "the scale is alpha / sqrt(r), whatever use_rslora says", wrong(use_rslora=True),
          cases=PLAIN),
    Fault("b-transposed", "B is used where B^T belongs", {"formula": b_transposed},
          cases=("linear/rank-is-width", "linear/plain")),
    Fault("b-by-columns", "B's numbers are read as those of a matrix (r, out)", {"formula": b_by_columns}, cases=PLAIN),
    Fault("rslora-ignored", "use_rslora is read as False", wrong(use_rslora=False),
          cases=("linear/rslora", "embedding/rslora", "conv2d/strided"),
          link="https://github.com/NVIDIA/TensorRT-LLM/issues/1668"),
    Fault("transposed", "the delta of a square layer is transposed", {"formula": swapped},
          cases=("linear/plain", "conv1d-hf/plain", "linear/rank-pattern")),
    Fault("embed-scale-ignored", "what is added to a scaled embedding is not scaled", {"formula": unscaled(formula)},
          cases=("embedding/scaled",)),
    Fault("token-types-lost", "token_type_ids do not reach the model", {"forward": without_types},
          caught_by=("forward",), cases=("encoder/token-types",)),
    Fault("rank-pattern-ignored", "alpha is divided by r where rank_pattern gives another rank",
          wrong(rank_pattern={}), cases=("linear/rank-pattern",),
          link="https://github.com/huggingface/diffusers/pull/14409"),
    Fault("alpha-pattern-ignored", "alpha_pattern is not read", wrong(alpha_pattern={}),
          cases=("linear/alpha-pattern",), link="https://github.com/MakazhanAlpamys/Soup/issues/803"),
    Fault("bias-dropped", "lora_B's bias is not added",
          {"formula": lambda site, t, c: (formula(site, t, c)[0], site.b)},
          cases=("linear/lora-bias", "conv2d/lora-bias")),
    Fault("bias-unscaled", "lora_B's bias is added without the scale",
          {"formula": lambda site, t, c: (formula(site, t, c)[0], None if site.b is None else
                                          site.b + t.get("lora_B.bias", 0))},
          cases=("linear/lora-bias", "conv2d/lora-bias")),
    Fault("kernel-flipped", "the kernel of A is flipped, convolution for cross-correlation",
          {"formula": lambda site, t, c: formula(site, {k: np.flip(v, tuple(range(2, v.ndim))) for k, v in t.items()}
                                                 if site.kernel else t, c)},
          cases=("conv1d/plain", "conv2d/plain", "conv3d/plain")),
)

METHOD = Method(
    name="lora", peft_type="LORA", title="LoRA", paper="https://arxiv.org/abs/2106.09685",
    equation="W' = W + (alpha / r) B A", rows=ROWS, shapes=shapes, formula=formula, run=run, faults=FAULTS,
    tensors=Tensors(neutral={"lora_B.weight": 0.0, "lora_B.bias": 0.0, "lora_embedding_A": 0.0}),
    laws=Laws(draw={"r": [1, 2, 5], "lora_alpha": [1, 3, 8], "use_rslora": [False, True],
                    "target_modules": [["up", "mid"]]},
              draw_fresh={"r": [2, 4],
                          "init_lora_weights": [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]},
              mixed_batch=True, scales=True),
)
