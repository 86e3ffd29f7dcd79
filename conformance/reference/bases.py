"""The base models of the cases, as data: layers in order, each `[name, kind, arguments]`, and the input's shape.

Square and non-square layers stand side by side, and the untargeted layer behind them makes gradients pass through.
Language models are a kind of their own, for prompts: `{"model": "causal_lm", ...}`; see models/language_models.py.
"""

from __future__ import annotations


def lin(name, i, o, bias=True):
    return [name, "Linear", {"in_features": i, "out_features": o, "bias": bias}]


def conv(name, d, i, o, k, **more):
    return [name, f"Conv{d}d", {"in_channels": i, "out_channels": o, "kernel_size": k, **more}]


def tanh(name):
    return [name, "Tanh", {}]


def net(*layers, shape=None, below=None, batch=3):
    """`shape`: of a float input; `below`: integer inputs in [0, below) of that shape."""
    given = {"shape": [batch, *shape]} if below is None else {"shape": [batch, *shape], "below": below}
    return {"layers": [list(x) for x in layers], "input": given}


def blocks(n):
    """`model.layers.<i>.q_proj/v_proj`: what layers_to_transform and patterns choose from."""
    rows = []
    for i in range(n):
        rows += [lin(f"model.layers.{i}.q_proj", 6, 6), tanh(f"model.layers.{i}.act"),
                 lin(f"model.layers.{i}.v_proj", 6, 6, bias=False)]
    return net(*rows, lin("head", 6, 4), shape=[6])


def states(argument, *layers, **given):
    """A net that shows its hidden states and is given its input by name; all layers but the head are in `model`."""
    *others, head = layers
    return {**net(*[[f"model.{name}", kind, args] for name, kind, args in others], head, **given), "states": argument}


def three(a, b, c):
    """Three layers of these names, and one behind them."""
    return net(lin(a, 8, 12), tanh("act1"), lin(b, 12, 12), tanh("act2"), lin(c, 12, 12), tanh("act3"),
               lin("head", 12, 4), shape=[5, 8])


def decoys(*names, **more):
    """Square layers under names that are easily taken for one another."""
    return {**net(*[lin(name, 8, 8) for name in names], shape=[8]), **more}


def of_type(base, model_type):
    """The same model, whose config says that it is of this `model_type`, as those of transformers do."""
    return {**base, "model_type": model_type}


def language_model(model, **more):
    return {"model": model, "vocab": 13, "hidden": 8, "heads": 2, "depth": 2,
            "input": {"shape": [2, 5], "below": 13}, **more}


TYPES = {"token_type_ids": {"values": [[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]]}}  # as a row's input

BASES = {
    "one-layer": net(lin("up", 64, 64), shape=[64]),
    "mlp": net(lin("up", 6, 10), tanh("act1"), lin("mid", 10, 10), tanh("act2"), lin("head", 10, 4), shape=[6]),
    "mlp-narrowing": net(lin("up", 10, 6), tanh("act1"), lin("mid", 6, 6), tanh("act2"), lin("head", 6, 4), shape=[10]),
    "mlp-nobias": net(lin("up", 6, 10, False), tanh("act1"), lin("mid", 10, 10, False), tanh("act2"),
                      lin("head", 10, 4), shape=[6]),
    "mlp-tokens": net(lin("up", 6, 10), tanh("act1"), lin("mid", 10, 10), tanh("act2"), lin("head", 10, 4),
                      shape=[5, 6]),
    "wide": net(lin("up", 48, 96), tanh("act1"), lin("mid", 96, 96), tanh("act2"), lin("head", 96, 4), shape=[48]),
    "mlp-even": net(lin("up", 8, 12), tanh("act1"), lin("mid", 12, 12), tanh("act2"), lin("head", 12, 4), shape=[8]),
    "mlp-even-tokens": net(lin("up", 8, 12), tanh("act1"), lin("mid", 12, 12), tanh("act2"), lin("head", 12, 4),
                           shape=[5, 8]),
    "names": three("up", "mid", "low"),
    "awkward-names": three("default", "weight", "lora"),
    "blocks": blocks(3),
    "conv1d": net(conv("c1", 1, 4, 6, 3, padding=1), tanh("act1"), conv("c2", 1, 6, 6, 3, stride=2), tanh("act2"),
                  conv("head", 1, 6, 2, 1), shape=[4, 9], batch=2),
    "conv2d": net(conv("c1", 2, 4, 6, 3, padding=1), tanh("act1"), conv("c2", 2, 6, 6, 3, stride=2), tanh("act2"),
                  conv("head", 2, 6, 2, 1), shape=[4, 6, 7], batch=2),
    "conv2d-dilated": net(conv("c1", 2, 4, 6, [3, 2], padding=[2, 1], dilation=2, stride=[1, 2]), tanh("act1"),
                          conv("c2", 2, 6, 4, 1, bias=False), tanh("act2"), conv("head", 2, 4, 2, 1),
                          shape=[4, 7, 6], batch=2),
    "conv2d-strided": net(conv("c1", 2, 4, 6, [3, 2], padding=[2, 1], stride=[1, 2]), tanh("act1"),
                          conv("c2", 2, 6, 6, 2, bias=False), tanh("act2"), conv("head", 2, 6, 2, 1),
                          shape=[4, 5, 6], batch=2),
    "conv1d-gaps": net(conv("c1", 1, 4, 6, 3, stride=2, dilation=2, padding=2), tanh("act1"), conv("head", 1, 6, 2, 1),
                       shape=[4, 13], batch=2),
    "conv2d-gaps": net(conv("c1", 2, 4, 6, 3, stride=[1, 2], dilation=[2, 1], padding=[0, 1]), tanh("act1"),
                       conv("head", 2, 6, 2, 1), shape=[4, 7, 6], batch=2),
    "conv3d-gaps": net(conv("c1", 3, 3, 4, 2, stride=[1, 2, 1], dilation=[1, 1, 2], padding=[0, 1, 0]), tanh("act1"),
                       conv("head", 3, 4, 2, 1), shape=[3, 4, 5, 6], batch=2),
    "conv2d-groups": net(conv("c1", 2, 4, 8, 3, padding=1, groups=2), tanh("act1"), conv("c2", 2, 8, 8, 3, groups=4),
                         tanh("act2"), conv("head", 2, 8, 2, 1), shape=[4, 5, 6], batch=2),
    "conv2d-small": net(conv("c1", 2, 2, 6, [2, 1]), tanh("act1"), conv("head", 2, 6, 2, 1), shape=[2, 3, 1], batch=12),
    "conv2d-1x1": net(conv("c1", 2, 4, 8, 1), tanh("act1"), conv("c2", 2, 8, 8, 1, stride=2), tanh("act2"),
                      conv("head", 2, 8, 2, 1), shape=[4, 5, 6], batch=2),
    "conv3d": net(conv("c1", 3, 3, 4, 3, padding=1), tanh("act1"), conv("c2", 3, 4, 4, [1, 2, 2], stride=[1, 2, 1]),
                  tanh("act2"), conv("head", 3, 4, 2, 1), shape=[3, 3, 4, 4], batch=2),
    "embedding": net(["emb", "Embedding", {"num_embeddings": 12, "embedding_dim": 7}], tanh("act1"),
                     ["sq", "Linear", {"in_features": 7, "out_features": 4, "bias": True}], shape=[5], below=12),
    "embedding-padded": net(["emb", "Embedding", {"num_embeddings": 12, "embedding_dim": 8, "padding_idx": 0}],
                            tanh("act1"), lin("head", 8, 4), shape=[5], below=12),
    "embedding-scaled": net(["emb", "Embedding", {"num_embeddings": 12, "embedding_dim": 8, "embed_scale": 2.5}],
                            tanh("act1"), lin("head", 8, 4), shape=[5], below=12),
    "gpt": net(["c_attn", "Conv1D", {"nf": 10, "nx": 6}], tanh("act1"), ["c_proj", "Conv1D", {"nf": 10, "nx": 10}],
               tanh("act2"), lin("head", 10, 4), shape=[5, 6]),
    "gpt-even": net(["c_attn", "Conv1D", {"nf": 12, "nx": 8}], tanh("act1"), ["c_proj", "Conv1D", {"nf": 12, "nx": 12}],
                    tanh("act2"), lin("head", 12, 4), shape=[5, 8]),
    "attention": net(lin("into", 6, 8), ["attn", "MultiheadAttention", {"embed_dim": 8, "num_heads": 2}],
                     lin("head", 8, 4), shape=[5, 6]),
    "experts": net(lin("into", 6, 8), tanh("act1"), ["experts", "Experts", {"shape": [3, 10, 8]}], tanh("act2"),
                   lin("head", 10, 4), shape=[5, 6]),
    "experts-transposed": net(lin("into", 6, 8), tanh("act1"), ["experts", "Experts", {
        "shape": [3, 8, 10], "is_transposed": True}], tanh("act2"), lin("head", 10, 4), shape=[5, 6]),
    "parameter": net(lin("into", 6, 8), tanh("act1"), ["router", "Matrix", {"shape": [10, 8]}], tanh("act2"),
                     lin("head", 10, 4), shape=[5, 6]),
    "parameters": net(lin("into", 6, 8), tanh("act1"), ["pair", "Pair", {"shape": [10, 8]}], tanh("act2"),
                      lin("head", 8, 4), shape=[5, 6]),
    "norm": net(lin("into", 6, 10), ["norm", "LayerNorm", {"normalized_shape": 10}], tanh("act1"),
                lin("mid", 10, 8), ["norm2", "LayerNorm", {"normalized_shape": 8}], lin("head", 8, 4), shape=[5, 6]),
    "buffer": net(lin("up", 6, 10), ["norm", "Centred", {"features": 10}], tanh("act1"), lin("mid", 10, 10),
                  tanh("act2"), lin("head", 10, 4), shape=[6]),
    "tokens-mlp": net(["embed_tokens", "Embedding", {"num_embeddings": 12, "embedding_dim": 8}], lin("up", 8, 10),
                      tanh("act1"), lin("mid", 10, 10), tanh("act2"), lin("head", 10, 4), shape=[5], below=12),
    "words": {**net(["wte", "Embedding", {"num_embeddings": 12, "embedding_dim": 8}], tanh("act1"), lin("mid", 8, 8),
                    tanh("act2"), lin("head", 8, 4), shape=[5], below=12), "output": "head", "input_layer": "wte"},
    "states": states("inputs_embeds", lin("up", 6, 10), tanh("act1"), lin("mid", 10, 10), tanh("act2"),
                     lin("head", 10, 4), shape=[5, 6]),
    "states-words": states("input_ids", ["emb", "Embedding", {"num_embeddings": 12, "embedding_dim": 6}],
                           lin("mid", 6, 10), tanh("act"), lin("head", 10, 4), shape=[5], below=12),
    "decoys": decoys(
        "up", "setup", "upper", "model.layers.0.up", "model.layers.0.mid", "model.layers.0.experts.1.up",
        "model.layers.1.up", "model.layers.1.mid", "model.layers.1.experts.0.up", "model.layers.1.downup",
        "model.layers.10.up", "model.blocks.1.up", "h.1.up", "head", "model.head", "overhead"),
    "decoys-output": decoys("up", "model.lm_head", "lm_head", "score", "head", output="lm_head"),
    "decoys-classifier": decoys("up", "model.score", "score", "classifier", "lm_head", output=None),
    "decoys-many": decoys(*(f"{part}.layers.{i}.{name}" for part in ("model", "encoder") for i in range(7)
                            for name in ("q", "k"))),
    "decoys-parameters": net(*[[name, "Matrix", {"shape": [8, 8]}] for name in (
        "experts", "preexperts", "model.experts", "model.layers.0.experts", "model.layers.1.myexperts")],
        lin("up", 8, 8), shape=[8]),
    "architectures": decoys(*(f"block.0.{name}" for name in (
        "Wqkv", "c_attn", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc1", "fc2", "fc_in", "fc_out", "gate_proj",
        "in_proj", "k", "k_proj", "key", "key_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "o", "o_proj", "out_proj",
        "output", "q", "q_proj", "qkv_proj", "query", "query_key_value", "query_proj", "r_proj", "receptance",
        "up_proj", "v", "v_proj", "value", "value_proj", "w2", "wi", "wi_0", "wi_1", "wo")), "block.1.output.dense"),
    "conv1d-hf-wide": net(["c_attn", "Conv1D", {"nf": 60, "nx": 36}], tanh("act1"), lin("head", 60, 4), shape=[36]),
    "causal-lm": language_model("causal_lm"),
    "causal-lm-grouped": language_model("causal_lm", kv_heads=1, head_dim=6),
    "causal-lm-tied": language_model("causal_lm", tied=True),
    "encoder": language_model("encoder", task="FEATURE_EXTRACTION", positions=17),
    "encoder-sequence": language_model("encoder", task="SEQ_CLS", positions=17),
    "encoder-tokens": language_model("encoder", task="TOKEN_CLS", positions=17),
    "encoder-answers": language_model("encoder", task="QUESTION_ANS", positions=17),
    "encoder-types": language_model("encoder", task="SEQ_CLS", positions=17, types=2),
    "encoder-types-features": language_model("encoder", task="FEATURE_EXTRACTION", positions=17, types=2),
    "encoder-decoder": language_model("encoder_decoder", positions=17),
    "decoder-llama": language_model("decoder", names="llama", kv_heads=1, depth=3),
    "decoder-grouped": language_model("decoder", names="llama", heads=4, kv_heads=2, depth=3),
    "decoder-gpt2": language_model("decoder", names="gpt2", depth=3),
    "decoder-three": language_model("decoder", names="llama", kv_heads=1, depth=3,
                                    input={"shape": [3, 5], "below": 13}),
}
