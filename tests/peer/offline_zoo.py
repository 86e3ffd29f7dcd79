"""Offline stand-ins for the Hub models and data sets that PEFT's test suite loads.

Two parts:

* ``build(DIR)`` (or ``python offline_zoo.py --build DIR``) writes small randomly initialised models,
  tokenizers and LoRA checkpoints, in the layout of a Hugging Face Hub cache, under the ids that the
  test suite uses.  Every model is seeded from its id.  Needs torch, transformers, tokenizers and
  safetensors (diffusers for the one diffusion pipeline); never imports peft or minipeft.

* As a pytest plugin (``-p offline_zoo``, with ``PEER_ZOO=DIR``) it answers every request that
  huggingface_hub makes, in process, from that directory: known ids resolve, unknown ids get the Hub's
  own "repository not found" answer, and no socket is opened.  ``datasets.load_dataset`` gets small
  synthetic data for four ids and fails at once for the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import traceback
import zlib
from pathlib import Path
from urllib.parse import parse_qs, unquote

ENDPOINT_HOST = "huggingface.co"
TEXT = (
    "The quick brown fox jumps over the lazy dog. Hello world, this is a test of a tiny tokenizer. "
    "Python is a programming language. A good model is small, fast and correct. What are these? "
    "USER ASSISTANT Test per token normalization. 0 1 2 3 4 5 6 7 8 9."
)


# --------------------------------------------------------------------------------------------------
# building
# --------------------------------------------------------------------------------------------------


def _tokenizer(specials, *, bos=None, eos=None, pad=None, unk=None, add_bos=False, add_eos=False, extra=(), vocab=600):
    """A byte-level BPE tokenizer whose first ids are ``specials`` in the given order."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE(unk_token=unk))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator([TEXT] * 4, trainer)
    if extra:
        tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in extra])
    if add_bos or add_eos:
        seq = ([bos] if add_bos else []) + ["$A"] + ([eos] if add_eos else [])
        ids = [(t, tok.token_to_id(t)) for t in {bos if add_bos else eos, eos if add_eos else bos}]
        tok.post_processor = processors.TemplateProcessing(single=seq, special_tokens=ids)
    kwargs = {}
    for name, value in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad), ("unk_token", unk)):
        if value is not None:
            kwargs[name] = value
    return PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=512, **kwargs)


def _opt_tok():
    return _tokenizer(["<s>", "<pad>", "</s>", "<unk>"], bos="</s>", eos="</s>", pad="<pad>", unk="<unk>", add_bos=True)


def _llama_tok(pad=None):
    return _tokenizer(["<unk>", "<s>", "</s>"], bos="<s>", eos="</s>", unk="<unk>", pad=pad, add_bos=True)


def _gpt2_tok():
    return _tokenizer(["<|endoftext|>"], bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>")


def _bert_tok():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return _tokenizer(special, bos="[CLS]", eos="[SEP]", pad="[PAD]", unk="[UNK]")


def _t5_tok():
    return _tokenizer(["<pad>", "</s>", "<unk>"], eos="</s>", pad="<pad>", unk="<unk>", add_eos=True)


def _gemma_tok():
    return _tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>"], bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>", add_bos=True
    )


def _cfg(name, **kw):
    import transformers

    return getattr(transformers, name)(**kw)


VOCAB = 1024


def _opt(hidden=16, layers=5, heads=4, ffn=4, **kw):
    kw = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "word_embed_proj_dim": hidden,
        **kw,
    }
    return _cfg(
        "OPTConfig", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=ffn, **kw
    )


def _llama(hidden=16, inter=64, layers=2, heads=4, kv=4, **kw):
    kw = {"vocab_size": VOCAB, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, **kw}
    return _cfg(
        "LlamaConfig",
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        **kw,
    )


def _gpt2(**kw):
    base = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_inner": 37, "n_positions": 512}
    base.update(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return _cfg("GPT2Config", **{**base, **kw})


def _bertlike(name, **kw):
    base = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 512,
    }
    return _cfg(name, **{**base, **kw})


def _t5(**kw):
    base = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_ff": 37,
        "d_kv": 8,
        "num_layers": 5,
        "num_decoder_layers": 5,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return _cfg("T5Config", **{**base, **kw})


def _qwen3_moe(**kw):
    base = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _cfg("Qwen3MoeConfig", **{**base, **kw})


def _llava():
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 32,
    }
    text = _llama(layers=2).to_dict()
    return _cfg("LlavaConfig", vision_config=vision, text_config=text, image_token_index=1000, image_seq_length=17)


def _recipes():
    """id -> dict(model=(class name, config factory), tokenizer=factory, ...)."""
    P, H, T = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"
    r = {}

    def add(ids, cls, config, tokenizer=None, **kw):
        for i in [ids] if isinstance(ids, str) else ids:
            r[i] = dict(cls=cls, config=config, tokenizer=tokenizer, **kw)

    # decoders
    # the salt picks a model on which a LoKr adapter is well approximated by rank 8 whatever its seed, and whose
    # greedy generations differ between adapters (a few tests assert such things of the real model)
    add(P + "tiny-random-OPTForCausalLM", "OPTForCausalLM", _opt, _opt_tok, salt="1")
    add(P + "opt-tokenizer-revision", "OPTForCausalLM", _opt, _opt_tok)
    add(
        [P + "opt-125m", "facebook/opt-125m"],
        "OPTForCausalLM",
        lambda: _opt(hidden=768, layers=12, heads=12, ffn=768, vocab_size=2048),
        _opt_tok,
    )
    add(
        [T + "tiny-random-LlamaForCausalLM", P + "tiny-random-LlamaForCausalLM", H + "tiny-random-LlamaForCausalLM"],
        "LlamaForCausalLM",
        _llama,
        _llama_tok,
    )
    add(
        T + "tiny-LlamaForSequenceClassification-3.2",
        "LlamaForSequenceClassification",
        lambda: _llama(hidden=32, inter=64, heads=4, kv=2, pad_token_id=0),
        lambda: _llama_tok("<unk>"),
    )
    add(
        [P + "tiny-random-gpt2", H + "tiny-random-gpt2", P + "tiny-random-GPT2LMHeadModel", "openai-community/gpt2"],
        "GPT2LMHeadModel",
        _gpt2,
        _gpt2_tok,
    )
    # in full size: one test counts its parameters
    add(
        "gpt2",
        "GPT2LMHeadModel",
        lambda: _cfg("GPT2Config"),
        _gpt2_tok,
        dtype="bfloat16",
    )
    add(
        P + "tiny-random-GPTJForCausalLM",
        "GPTJForCausalLM",
        lambda: _cfg(
            "GPTJConfig",
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=5,
            n_head=4,
            rotary_dim=4,
            n_inner=64,
            n_positions=512,
            bos_token_id=0,
            eos_token_id=0,
        ),
        _gpt2_tok,
    )
    add(
        P + "tiny-random-GPTNeoXForCausalLM",
        "GPTNeoXForCausalLM",
        lambda: _bertlike("GPTNeoXConfig", bos_token_id=0, eos_token_id=0),
        _gpt2_tok,
    )
    add(
        [P + "tiny-random-BloomForCausalLM", "bigscience/bloomz-560m"],
        "BloomForCausalLM",
        lambda: _cfg(
            "BloomConfig", vocab_size=VOCAB, hidden_size=32, n_layer=5, n_head=4, bos_token_id=1, eos_token_id=2
        ),
        _llama_tok,
    )
    add(
        [P + "tiny-dummy-qwen2", T + "tiny-Qwen2ForCausalLM-2.5"],
        "Qwen2ForCausalLM",
        lambda: _cfg(
            "Qwen2Config",
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=0,
        ),
        _gpt2_tok,
    )
    # the point of this one is an embedding that is larger than the tokenizer's vocabulary
    add(
        "Qwen/Qwen2-0.5B",
        "Qwen2ForCausalLM",
        lambda: _cfg(
            "Qwen2Config",
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=True,
        ),
        _gpt2_tok,
    )
    add(
        T + "tiny-Qwen3ForCausalLM",
        "Qwen3ForCausalLM",
        lambda: _cfg(
            "Qwen3Config",
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            bos_token_id=0,
            eos_token_id=0,
        ),
        _gpt2_tok,
    )
    add([T + "tiny-Qwen3MoeForCausalLM", H + "tiny-qwen3-moe"], "Qwen3MoeForCausalLM", _qwen3_moe, _gpt2_tok)
    add(
        H + "tiny-random-Gemma3ForCausalLM",
        "Gemma3ForCausalLM",
        lambda: _cfg(
            "Gemma3TextConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"],
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        ),
        _gemma_tok,
    )
    add(
        P + "tiny-random-gemma4-E2B",
        "Gemma4ForCausalLM",
        lambda: _cfg(
            "Gemma4TextConfig",
            vocab_size=VOCAB,
            vocab_size_per_layer_input=VOCAB,
            hidden_size=32,
            hidden_size_per_layer_input=8,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            global_head_dim=16,
            num_kv_shared_layers=2,
            sliding_window=128,
            layer_types=[
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        ),
        _gemma_tok,
    )
    add(
        H + "tiny-random-MistralForCausalLM",
        "MistralForCausalLM",
        lambda: _cfg(
            "MistralConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
        ),
        _llama_tok,
    )
    add(
        H + "Mixtral-tiny",
        "MixtralForCausalLM",
        lambda: _cfg(
            "MixtralConfig",
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=512,
        ),
        _llama_tok,
        dtype="float16",
    )
    add(
        T + "tiny-Llama4ForCausalLM",
        "Llama4ForCausalLM",
        lambda: _cfg(
            "Llama4TextConfig",
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            intermediate_size_mlp=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            num_local_experts=4,
            num_experts_per_tok=1,
            max_position_embeddings=512,
            attention_chunk_size=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        _llama_tok,
    )
    add(
        T + "tiny-GptOssForCausalLM",
        "GptOssForCausalLM",
        lambda: _cfg(
            "GptOssConfig",
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        _llama_tok,
    )
    add(
        "tiiuae/falcon-mamba-tiny-dev",
        "FalconMambaForCausalLM",
        lambda: _cfg(
            "FalconMambaConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            state_size=8,
            time_step_rank=4,
        ),
        _gpt2_tok,
    )
    add(
        T + "tiny-NemotronHForCausalLM-nano",
        "NemotronHForCausalLM",
        lambda: _cfg(
            "NemotronHConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=2,
            chunk_size=16,
            n_routed_experts=4,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
            num_experts_per_tok=2,
            layers_block_type=["mamba", "attention", "mamba", "moe"],
        ),
        _gpt2_tok,
    )
    # encoders
    add(
        [P + "tiny-random-BertModel", H + "tiny-random-BertModel", "bert-base-uncased"],
        "BertModel",
        lambda: _bertlike("BertConfig", type_vocab_size=16),
        _bert_tok,
    )
    add(
        P + "tiny-random-BertForSequenceClassification",
        "BertForSequenceClassification",
        lambda: _bertlike("BertConfig", type_vocab_size=16),
        _bert_tok,
    )
    add(P + "tiny-random-RobertaModel", "RobertaModel", lambda: _bertlike("RobertaConfig"), _opt_tok)
    add(
        P + "tiny-random-RobertaForSequenceClassification",
        "RobertaForSequenceClassification",
        lambda: _bertlike("RobertaConfig"),
        _opt_tok,
    )
    add(P + "tiny-random-DebertaModel", "DebertaModel", lambda: _bertlike("DebertaConfig"), _bert_tok)
    add(P + "tiny-random-DebertaV2Model", "DebertaV2Model", lambda: _bertlike("DebertaV2Config"), _bert_tok)
    # encoder-decoders
    names = [P + "tiny-random-t5", P + "tiny-random-T5ForConditionalGeneration"]
    add(names, "T5ForConditionalGeneration", _t5, _t5_tok)
    add(
        P + "tiny-random-T5ForConditionalGeneration-calibrated",
        "T5ForConditionalGeneration",
        lambda: _t5(initializer_factor=0.5),
        _t5_tok,
    )
    add(
        ["google/flan-t5-small", "google/flan-t5-base"],
        "T5ForConditionalGeneration",
        lambda: _t5(
            d_model=256, d_kv=64, d_ff=128, num_layers=8, num_decoder_layers=8, feed_forward_proj="gated-gelu"
        ),
        _t5_tok,
    )
    add(
        P + "tiny-random-BartForConditionalGeneration",
        "BartForConditionalGeneration",
        lambda: _cfg(
            "BartConfig",
            vocab_size=VOCAB,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=4,
            decoder_ffn_dim=4,
            max_position_embeddings=512,
        ),
        _opt_tok,
    )
    add(
        [P + "tiny-random-WhisperForConditionalGeneration", "openai/whisper-large"],
        "WhisperForConditionalGeneration",
        lambda: _cfg(
            "WhisperConfig",
            vocab_size=VOCAB,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=4,
            decoder_ffn_dim=4,
            num_mel_bins=80,
            max_source_positions=30,
            max_target_positions=40,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=2,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
    )
    # vision, text and image
    add(
        P + "tiny-clip-text-2",
        "CLIPTextModel",
        lambda: _cfg(
            "CLIPTextConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=5,
            num_attention_heads=4,
            projection_dim=32,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=2,
        ),
    )
    add(
        [P + "tiny-random-ResNetForImageClassification", "microsoft/resnet-18"],
        "ResNetForImageClassification",
        lambda: _cfg(
            "ResNetConfig", embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], num_labels=3
        ),
        image_processor=True,
    )
    add(
        [P + "tiny-LlavaForConditionalGeneration", H + "tiny-random-LlavaForConditionalGeneration"],
        "LlavaForConditionalGeneration",
        _llava,
        lambda: _tokenizer(
            ["<unk>", "<s>", "</s>", "<pad>"],
            bos="<s>",
            eos="</s>",
            unk="<unk>",
            pad="<pad>",
            add_bos=True,
            extra=["<image>"],
        ),
        llava=True,
    )
    add(
        T + "tiny-Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        lambda: _cfg(
            "Qwen2_5_VLConfig",
            text_config={
                "vocab_size": VOCAB,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 10000.0},
            },
            vision_config={
                "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 4,
                "out_hidden_size": 16, "fullatt_block_indexes": [1]
            },
            image_token_id=1000,
            video_token_id=1001,
            vision_start_token_id=1002,
            vision_end_token_id=1003,
        ),
    )
    return r


def _adapters():
    """LoRA checkpoints: id -> (base id, adapter config entries, module names, rank, folder)."""
    P = "peft-internal-testing/"
    opt, t5 = P + "tiny-random-OPTForCausalLM", P + "tiny-random-T5ForConditionalGeneration"
    opt_mods = [f"model.decoder.layers.{i}.self_attn.{p}" for i in range(5) for p in ("q_proj", "v_proj")]
    big_mods = [f"model.decoder.layers.{i}.self_attn.{p}" for i in range(12) for p in ("q_proj", "v_proj")]
    t5_mods = [f"encoder.block.{i}.layer.0.SelfAttention.{p}" for i in range(5) for p in ("q", "v")]
    t5_mods += [f"decoder.block.{i}.layer.0.SelfAttention.{p}" for i in range(5) for p in ("q", "v")]
    t5_mods += [f"decoder.block.{i}.layer.1.EncDecAttention.{p}" for i in range(5) for p in ("q", "v")]
    gpt_mods = [f"transformer.h.{i}.attn.c_attn" for i in range(5)]
    heads = [f"model.{s}.layers.{i}.self_attn" for s in ("encoder", "decoder") for i in range(2)]
    whisper = [f"{head}.{p}" for head in heads for p in ("q_proj", "v_proj")]
    whisper += [f"model.decoder.layers.{i}.encoder_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")]
    bert = [f"encoder.layer.{i}.attention.self.{p}" for i in range(5) for p in ("query", "value")]
    qv, cq, bqv = ["q_proj", "v_proj"], ["c_attn"], ["query", "value"]
    return {
        P + "tiny-OPTForCausalLM-lora": (opt, "CAUSAL_LM", qv, opt_mods),
        P + "tiny-opt-lora-revision": (opt, "CAUSAL_LM", qv, opt_mods),
        "ybelkada/test-st-lora": (opt, "CAUSAL_LM", qv, opt_mods),
        P + "test-lora-subfolder": (opt, "CAUSAL_LM", qv, opt_mods, "test"),
        P + "tiny-random-OPTForCausalLM-extended-vocab": (opt, "CAUSAL_LM", qv, opt_mods),
        P + "tiny_OPTForSequenceClassification-lora": (opt, "SEQ_CLS", qv, list(opt_mods)),
        P + "tiny_OPTForQuestionAnswering-lora": (opt, "QUESTION_ANS", qv, opt_mods),
        P + "tiny_OPTForFeatureExtraction-lora": (opt, "FEATURE_EXTRACTION", qv, [m[len("model."):] for m in opt_mods]),
        P + "tiny_T5ForSeq2SeqLM-lora": (t5, "SEQ_2_SEQ_LM", ["q", "v"], t5_mods),
        P + "tiny_GPT2ForTokenClassification-lora": (P + "tiny-random-gpt2", "TOKEN_CLS", cq, gpt_mods),
        P + "gpt2-lora-random": ("gpt2", "CAUSAL_LM", cq, [f"transformer.h.{i}.attn.c_attn" for i in range(12)]),
        P + "opt-125m-dummy-lora": (P + "opt-125m", "CAUSAL_LM", qv, big_mods),
        P + "tiny-random-BertModel-lora": (P + "tiny-random-BertModel", "FEATURE_EXTRACTION", bqv, bert),
        P + "tiny_WhisperForConditionalGeneration-lora": (
            P + "tiny-random-WhisperForConditionalGeneration",
            None,
            qv,
            whisper,
        ),
    }


AUTO_MAPPING = {
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": {
        "base_model_class": "WhisperForConditionalGeneration",
        "parent_library": "transformers.models.whisper.modeling_whisper",
    }
}
REVISIONS = {
    "peft-internal-testing/tiny-opt-lora-revision": ["test"],
    "peft-internal-testing/opt-tokenizer-revision": ["test", "v1"],
    "peft-internal-testing/tiny-random-BertModel": ["v2.0.0"],
}


def _commit(repo_id: str) -> str:
    return hashlib.sha1(repo_id.encode()).hexdigest()


def _repo_folder(hub: Path, repo_id: str) -> Path:
    return hub / ("models--" + repo_id.replace("/", "--"))


def _place(hub: Path, repo_id: str, src: Path):
    folder = _repo_folder(hub, repo_id)
    snapshot = folder / "snapshots" / _commit(repo_id)
    if folder.exists():
        shutil.rmtree(folder)
    snapshot.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "blobs").mkdir()
    shutil.copytree(src, snapshot)
    for rev in ["main", *REVISIONS.get(repo_id, [])]:
        (folder / "refs" / rev).write_text(_commit(repo_id))


def _save_image_processor(out: Path):
    (out / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ConvNextImageProcessor",
                "do_resize": True,
                "do_normalize": True,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "crop_pct": 0.875,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
                "resample": 3,
                "size": {"shortest_edge": 64},
            }
        )
    )


def _save_llava_processor(out: Path, tokenizer):
    from transformers import CLIPImageProcessor, LlavaProcessor

    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True
    )
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(out)


def _build_model(repo_id: str, recipe: dict, out: Path):
    import torch
    import transformers

    config = recipe["config"]()
    tokenizer = recipe["tokenizer"]() if recipe["tokenizer"] else None
    if recipe.get("llava"):
        config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    salt = os.environ.get("PEER_ZOO_SALT") or recipe.get("salt", "")
    torch.manual_seed(zlib.crc32(f"{repo_id}{salt}".encode()) & 0x7FFFFFFF)
    model = getattr(transformers, recipe["cls"])(config).eval()
    if recipe.get("dtype"):
        model = model.to(getattr(torch, recipe["dtype"]))
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    if recipe.get("image_processor"):
        _save_image_processor(out)
    if recipe.get("llava"):
        _save_llava_processor(out, tokenizer)


def _build_adapter(repo_id: str, spec: tuple, recipes: dict, out: Path):
    import torch
    import transformers
    from safetensors.torch import save_file

    base_id, task, targets, modules, *sub = spec
    rank = 8
    torch.manual_seed(zlib.crc32(repo_id.encode()) & 0x7FFFFFFF)
    base = getattr(transformers, recipes[base_id]["cls"])(recipes[base_id]["config"]())
    lookup = dict(base.named_modules())
    state = {}
    for name in modules:
        layer = lookup.get(name) or lookup.get("model." + name)
        weight = layer.weight
        conv1d = type(layer).__name__ == "Conv1D"
        n_in, n_out = (weight.shape[0], weight.shape[1]) if conv1d else (weight.shape[1], weight.shape[0])
        key = f"base_model.model.{name}"
        state[f"{key}.lora_A.weight"] = torch.randn(rank, n_in) * 0.02
        state[f"{key}.lora_B.weight"] = torch.randn(n_out, rank) * 0.02
    config = {
        "auto_mapping": AUTO_MAPPING.get(repo_id),
        "base_model_name_or_path": base_id,
        "bias": "none",
        "fan_in_fan_out": targets == ["c_attn"],
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        "target_modules": targets,
        "task_type": task,
    }
    if task == "SEQ_CLS":
        config["modules_to_save"] = ["score"]
        state["base_model.model.score.weight"] = torch.randn(2, recipes[base_id]["config"]().hidden_size) * 0.02
    if task == "QUESTION_ANS":
        config["modules_to_save"] = ["qa_outputs"]
        state["base_model.model.qa_outputs.weight"] = torch.randn(2, recipes[base_id]["config"]().hidden_size) * 0.02
        state["base_model.model.qa_outputs.bias"] = torch.zeros(2)
    if task == "TOKEN_CLS":
        config["modules_to_save"] = ["classifier", "score"]
        state["base_model.model.classifier.weight"] = torch.randn(2, recipes[base_id]["config"]().hidden_size) * 0.02
        state["base_model.model.classifier.bias"] = torch.zeros(2)
    dest = out / sub[0] if sub else out
    dest.mkdir(parents=True, exist_ok=True)
    if "extended-vocab" in repo_id:
        # an adapter saved next to a tokenizer that has more tokens than the base model has embeddings
        extra = [f"<extra_{i}>" for i in range(VOCAB)]
        tok = _tokenizer(
            ["<s>", "<pad>", "</s>", "<unk>"], bos="</s>", eos="</s>", pad="<pad>", unk="<unk>", extra=extra
        )
        tok.save_pretrained(dest)
    (dest / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(state, dest / "adapter_model.safetensors", metadata={"format": "pt"})


def _build_sd_pipe(out: Path):
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        block_out_channels=[32, 64],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            bos_token_id=0,
            eos_token_id=2,
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=5,
            pad_token_id=1,
            vocab_size=1000,
        )
    )
    words = ["<|startoftext|>", "<|endoftext|>"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = words + list(letters) + [c + "</w>" for c in letters]
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
        (Path(tmp) / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(tmp, model_max_length=77)
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = PNDMScheduler(**betas, skip_prk_steps=True)
        pipe = StableDiffusionPipeline(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.save_pretrained(out, safe_serialization=True)


def _build_flux2(out: Path):
    import torch
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(2)
    model = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
    )
    model.save_pretrained(out / "transformer", safe_serialization=True)


def stamp() -> str:
    """Changes whenever this file or the libraries that write the models change."""
    import torch
    import transformers

    h = hashlib.sha256(Path(__file__).read_bytes())
    h.update(f"{torch.__version__} {transformers.__version__}".encode())
    return h.hexdigest()[:16]


def build(zoo: str | os.PathLike, only=None, verbose=True) -> dict:
    """Write all stand-ins under ``zoo`` (skipped when they are already there and up to date)."""
    zoo = Path(zoo)
    hub = zoo / "hub"
    mark = zoo / "built.json"
    if only is None and mark.is_file():
        have = json.loads(mark.read_text())
        if have.get("stamp") == stamp():
            return have
    hub.mkdir(parents=True, exist_ok=True)
    recipes, built, failed = _recipes(), [], {}
    jobs = [(i, lambda out, i=i, rec=rec: _build_model(i, rec, out)) for i, rec in recipes.items()]
    jobs += [(i, lambda out, i=i, s=s: _build_adapter(i, s, recipes, out)) for i, s in _adapters().items()]
    jobs += [("hf-internal-testing/tiny-sd-pipe", _build_sd_pipe), ("hf-internal-testing/tiny-flux2", _build_flux2)]
    for repo_id, job in jobs:
        if only and repo_id not in only:
            continue
        with tempfile.TemporaryDirectory() as tmp:
            out = Path(tmp) / "repo"
            out.mkdir()
            try:
                job(out)
                _place(hub, repo_id, out)
                built.append(repo_id)
            except Exception as exc:  # a model class this transformers lacks: its tests drop out
                failed[repo_id] = f"{type(exc).__name__}: {exc}"[:500]
                if verbose:
                    traceback.print_exc()
    result = {"stamp": stamp(), "built": built, "failed": failed}
    if only is None:
        mark.write_text(json.dumps(result, indent=1))
    if verbose:
        print(f"zoo: {len(built)} repositories in {hub}, {len(failed)} failed {sorted(failed)}", file=sys.stderr)
    return result


# --------------------------------------------------------------------------------------------------
# answering the Hub's requests
# --------------------------------------------------------------------------------------------------


class FakeHub:
    """Answers the few Hub routes that huggingface_hub uses for reading, from a cache folder."""

    def __init__(self, hub: Path, response_cls):
        self.hub = Path(hub)
        self.Response = response_cls

    def snapshot(self, repo_id: str, revision: str | None = None):
        folder = _repo_folder(self.hub, repo_id)
        ref = folder / "refs" / (revision or "main")
        commit = ref.read_text().strip() if ref.is_file() else (revision or "")
        path = folder / "snapshots" / commit
        return (path, commit) if commit and path.is_dir() else (None, None)

    def missing(self, request, code="RepoNotFound", message="Repository not found"):
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        return self.Response(404, headers=headers, json={"error": message}, request=request)

    def files(self, root: Path):
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    def __call__(self, request):
        path = unquote(request.url.path).lstrip("/")
        parts = path.split("/")
        if request.url.host != ENDPOINT_HOST:
            return self.missing(request, message=f"offline: {request.url.host}")
        if parts[:2] == ["api", "models"]:
            return self.api(request, parts[2:])
        if "resolve" in parts:
            k = parts.index("resolve")
            repo_id, revision, name = "/".join(parts[:k]), parts[k + 1], "/".join(parts[k + 2 :])
            root, commit = self.snapshot(repo_id, revision)
            if root is None:
                if _repo_folder(self.hub, repo_id).is_dir():
                    return self.missing(request, "RevisionNotFound", "Revision not found")
                return self.missing(request)
            target = root / name
            if not target.is_file():
                return self.missing(request, "EntryNotFound", "Entry not found")
            data = target.read_bytes()
            etag = '"' + hashlib.sha1(data).hexdigest() + '"'
            headers = {"X-Repo-Commit": commit, "ETag": etag, "Content-Length": str(len(data))}
            if request.method == "HEAD":
                return self.Response(200, headers=headers, request=request)
            return self.Response(200, headers=headers, content=data, request=request)
        return self.missing(request)

    def api(self, request, parts):
        n = 2 if len(parts) > 1 and _repo_folder(self.hub, "/".join(parts[:2])).is_dir() else 1
        repo_id, rest = "/".join(parts[:n]), parts[n:]
        revision = rest[1] if len(rest) > 1 and rest[0] in ("revision", "tree") else None
        root, commit = self.snapshot(repo_id, revision)
        if root is None:
            return self.missing(request)
        if rest and rest[0] == "tree":
            prefix = "/".join(rest[2:])
            recursive = parse_qs(request.url.query.decode()).get("recursive", ["false"])[0].lower() in ("1", "true")
            entries = []
            for name in self.files(root):
                inside = name[len(prefix) :].lstrip("/") if prefix and name.startswith(prefix + "/") else name
                if prefix and not name.startswith(prefix + "/"):
                    continue
                if recursive or "/" not in inside:
                    size = (root / name).stat().st_size
                    entries.append({"type": "file", "path": name, "size": size, "oid": _commit(name)})
            if prefix and not entries:
                return self.missing(request, "EntryNotFound", "Entry not found")
            return self.Response(200, json=entries, request=request)
        if rest and rest[0] != "revision":
            return self.missing(request, "EntryNotFound", "not offered offline")
        info = {
            "_id": commit[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["transformers", "safetensors"],
            "siblings": [{"rfilename": n} for n in self.files(root)],
        }
        return self.Response(200, json=info, request=request)


def _patch_hub(hub: Path):
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    http = getattr(_http, "httpx2", None) or _http.httpx
    handler = FakeHub(hub, http.Response)

    def factory():
        return http.Client(
            transport=http.MockTransport(handler),
            event_hooks={"request": [_http.hf_request_event_hook]},
            follow_redirects=True,
            timeout=None,
        )

    huggingface_hub.set_client_factory(factory)
    constants.HF_HUB_OFFLINE = False
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if hasattr(constants, name):
            setattr(constants, name, str(hub))


def _synthetic_dataset(path, name=None, split=None):
    import numpy as np
    from datasets import Dataset, DatasetDict

    rng = np.random.default_rng(0)
    words = TEXT.replace(".", "").replace(",", "").split()

    def sentence(n):
        return " ".join(rng.choice(words, size=n).tolist())

    if path == "ybelkada/english_quotes_copy":
        rows = [{"quote": sentence(12), "author": sentence(2), "tags": ["a", "b"]} for _ in range(64)]
        out = DatasetDict({"train": Dataset.from_list(rows)})
    elif path == "nyu-mll/glue" and name == "sst2":
        rows = [{"sentence": sentence(6), "label": int(i % 2), "idx": i} for i in range(32)]
        out = DatasetDict({k: Dataset.from_list(rows) for k in ("train", "validation", "test")})
    elif path == "scikit-learn/iris":
        scale = rng.normal(size=(150, 2)) @ rng.normal(size=(2, 4)) + 0.1 * rng.normal(size=(150, 4)) + 5
        cols = ["SepalLengthCm", "SepalWidthCm", "PetalLengthCm", "PetalWidthCm"]
        data = {c: scale[:, i].round(2).tolist() for i, c in enumerate(cols)}
        out = DatasetDict({"train": Dataset.from_dict({**data, "Species": ["a", "b", "c"] * 50})})
    elif path == "huggingface/cats-image":
        from PIL import Image

        image = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        out = {"test": {"image": [image]}}
    else:
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (offline stand-in)")
    return out[split] if split else out


def _patch_datasets():
    try:
        import datasets
    except ImportError:
        return

    def load_dataset(path, name=None, *args, split=None, **kwargs):
        return _synthetic_dataset(path, name, split)

    datasets.load_dataset = load_dataset


def activate(zoo: str | os.PathLike):
    hub = Path(zoo) / "hub"
    if not hub.is_dir():
        raise RuntimeError(f"no offline zoo in {zoo}: run `python offline_zoo.py --build {zoo}` first")
    os.environ["HF_HUB_CACHE"] = str(hub)
    os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ.pop("TRANSFORMERS_OFFLINE", None)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    _patch_hub(hub)
    _patch_datasets()


if os.environ.get("PEER_ZOO") and __name__ != "__main__":
    activate(os.environ["PEER_ZOO"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", metavar="DIR", required=True)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    outcome = build(args.build, args.only)
    sys.exit(1 if outcome["failed"] else 0)
