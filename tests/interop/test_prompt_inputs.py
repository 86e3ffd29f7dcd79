"""Prompts beyond the table: further inputs, ways to generate, ways to begin, AutoPeftModel, against peft."""

import copy
import warnings

import pytest
import torch

from . import harness as H

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

COMMON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
          "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}
GROUPED = {**COMMON, "num_key_value_heads": 2}
DECODERS = {
    "opt": ("OPTConfig", "OPTForCausalLM", {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2,
                                               "n_positions": 64, "pad_token_id": 0, "eos_token_id": 2}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "llama_head_dim": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "head_dim": 6}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 6}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        **GROUPED, "head_dim": 8, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2,
                                                  "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
}
SEQ2SEQ = {
    "t5": ("T5Config", "T5ForConditionalGeneration", {
        "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 4, "num_heads": 2, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {
        "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
        "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0,
        "forced_eos_token_id": None}),
}
PROMPTS = {
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 4, "num_tasks": 3}),
    "cpt": ("CPTConfig", {"cpt_token_ids": [4, 5, 6, 7], "cpt_tokens_type_mask": [1, 2, 3, 4]}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "projection": ("PrefixTuningConfig", {"num_virtual_tokens": 4, "prefix_projection": True}),
    "cartridge": ("CartridgeConfig", {"num_virtual_tokens": 9}),
}
TOLERANCE = 2e-5
decoders = pytest.mark.parametrize("base", DECODERS)
methods = pytest.mark.parametrize("method", PROMPTS)


def build(name, dtype=torch.float32):
    config, model, options = {**DECODERS, **SEQ2SEQ}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**options)).to(dtype).eval()


def pair(ref, lib, base, method, task="CAUSAL_LM", **more):
    name, options = PROMPTS[method]
    models = []
    for module in (ref, lib):
        H.seed(1)
        config = getattr(module, name)(task_type=task, **{**options, **more})
        models.append(module.get_peft_model(build(base), config).eval())
    H.same_names(models[1].state_dict(), models[0].state_dict())
    H.identical(models[1].state_dict(), models[0].state_dict())
    return models


def batch(left=True):
    """Three texts of 7 tokens, the first of 5 with padding on the left or on the right, or of 7 too (left=None)."""
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if left is not None:
        mask[0, slice(None, 2) if left else slice(5, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def with_tasks(method, inputs):
    return {**inputs, **({"task_ids": torch.tensor([0, 2, 1])} if method == "multitask" else {})}


def trained(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    (output["loss"] if "loss" in output else output["logits"].square().sum()).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach().clone() for k, v in H.tensors(output).items()} | grads


@decoders
@methods
def test_decoders(base, method, ref, lib):
    models, inputs = pair(ref, lib, base, method), with_tasks(method, batch())
    assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()
    labels, places = inputs["input_ids"], (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    embeds = models[0].get_input_embeddings()(labels).detach()
    variants = {
        "plain": inputs,
        "labels": {**inputs, "labels": labels},
        "no mask": {k: v for k, v in inputs.items() if k != "attention_mask"},
        "positions": {**inputs, "labels": labels} | ({} if base == "bloom" else {"position_ids": places}),
        "embeddings": {**{k: v for k, v in inputs.items() if k != "input_ids"}, "inputs_embeds": embeds},
    }
    for name, given in variants.items():
        want, got = (trained(model, given) for model in models)
        H.close(got, want, TOLERANCE if name != "plain" else 1e-4)


GENERATE = {
    "greedy": {}, "beams": {"num_beams": 3}, "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 10},
}


@decoders
@methods
def test_generate(base, method, ref, lib):
    """With padding only where peft does not count it among the positions: `test_a_padded_row_...`."""
    models, inputs = pair(ref, lib, base, method), with_tasks(method, batch())
    if method not in ("prefix_tuning", "projection", "cartridge"):
        inputs.update(batch(left=None))
    for options in GENERATE.values():
        tokens = []
        for model in models:
            H.seed(4)
            tokens.append(model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **options}))
        assert torch.equal(*tokens), options


@decoders
@methods
def test_a_padded_row_generates_what_it_does_alone(base, method, lib, is_ref):
    """Positions leave out the padding behind the prompt. Of a sliding window it takes its share, with a warning."""
    if is_ref:
        pytest.skip("with embeddings, peft's positions count the padding")
    model = H.move(pair(lib, lib, base, method)[0], 0.5)
    inputs = with_tasks(method, batch())
    alone = {k: v[:1] if k == "task_ids" else v[:1, 2:] for k, v in inputs.items()}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True,
               "return_dict_in_generate": True}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got, want = (model.generate(**given, **options).logits for given in (inputs, alone))
    said = [w for w in seen if "sliding window" in str(w.message)]
    if "sliding_window" in DECODERS[base][2]:
        assert len(said) == 1
    else:
        assert not said
        H.close({"logits": torch.stack(got)[:, :1]}, {"logits": torch.stack(want)}, TOLERANCE)


@pytest.mark.parametrize("base", ["llama", "gpt2", "gemma3"])
@methods
def test_generate_where_peft_fails(base, method, lib, is_ref):
    """Without a cache, and with one of fixed size: the same tokens as with a growing one."""
    if is_ref:
        pytest.skip("peft raises for most of these")
    model = pair(lib, lib, base, method)[0]
    inputs = with_tasks(method, batch())
    options = {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), want)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), want)
    unpadded = {k: v[:1] if k == "task_ids" else v[:1, 2:] for k, v in inputs.items()}  # transformers drops its mask
    want = model.generate(**unpadded, **options)
    assert torch.equal(model.generate(**unpadded, **options, cache_implementation="static"), want)


@pytest.mark.parametrize("base", SEQ2SEQ)
@pytest.mark.parametrize("method", [m for m in PROMPTS if m != "cpt"])
def test_encoder_decoders(base, method, ref, lib):
    models, inputs = pair(ref, lib, base, method, "SEQ_2_SEQ_LM"), with_tasks(method, batch(left=False))
    labels = torch.randint(3, 40, (3, 5), generator=torch.Generator().manual_seed(9))
    later = torch.ones_like(labels)
    later[1, 3:] = 0
    variants = [{"labels": labels}, {"labels": labels, "decoder_attention_mask": later}]
    if method != "multitask":  # there peft raises when the decoder's input is given
        variants.append({"decoder_input_ids": labels, "decoder_attention_mask": later})
    for more in variants:
        want, got = (trained(model, {**inputs, **more}) for model in models)
        H.close(got, want, 1e-4)
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        options = {"max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(*(model.generate(**inputs, **options) for model in models)), options


# ------------------------------------------------------------------------------------------------------ ways to begin
def tokenizer(folder, words=40):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {f"w{i}": i for i in range(words - 1)} | {"[UNK]": words - 1}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    made.save_pretrained(str(folder))
    return made


@pytest.mark.parametrize("method", ["prompt_tuning", "multitask"])
@pytest.mark.parametrize("text", ["w7 w8", "w3 w4 w5 w6 w7 w8 w9"], ids=["short", "long"])
def test_a_prompt_begins_as_a_text(method, text, ref, lib, tmp_path):
    tokenizer(tmp_path)
    models = pair(ref, lib, "llama", method, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
                  tokenizer_name_or_path=str(tmp_path), tokenizer_kwargs={"trust_remote_code": True})
    words = models[1].word_embeddings.weight
    numbers = [int(word[1:]) for word in text.split()]
    assert torch.equal(models[1].prompt_encoder["default"].embedding.weight, words[(numbers * 4)[:4]])


@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_multitask_prompt_begins_with_another(how, ref, lib, tmp_path):
    source = H.move(pair(ref, lib, "llama", "multitask")[0])
    source.save_pretrained(str(tmp_path))
    options = {"prompt_tuning_init": how, "prompt_tuning_init_task": 2, "num_tasks": 1}
    pair(ref, lib, "llama", "multitask", **options,
         prompt_tuning_init_state_dict_path=str(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("method", ["cartridge", "prefix_tuning"])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_prefix_begins_as_a_text(method, base, ref, lib, tmp_path):
    made, text = tokenizer(tmp_path), " ".join(f"w{i}" for i in range(3, 15))
    models = pair(ref, lib, base, method)
    both = [m.initialize_kv_prefix_from_text(model, made, text=text) for m, model in zip((ref, lib), models)]
    H.close({"loaded": both[1]}, {"loaded": both[0]}, TOLERANCE)
    want, got = (H.run(model, batch()) for model in models)
    H.close({"logits": got["logits"]}, {"logits": want["logits"]}, TOLERANCE)


def test_composed_cartridges(ref, lib, tmp_path):
    model = H.move(pair(ref, lib, "llama", "cartridge")[0])
    model.save_pretrained(str(tmp_path / "a"))
    H.move(model).save_pretrained(str(tmp_path / "b"))
    for module, name in ((ref, "want"), (lib, "got")):
        module.compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / name)
    (got, got_config), (want, want_config) = H.stored(tmp_path / "got"), H.stored(tmp_path / "want")
    H.identical(got, want)
    H.same_config(got_config, want_config)


@pytest.mark.parametrize("kind", ["none", "decay"])
def test_cpt_trains_the_same(kind, ref, lib):
    """Several steps, in which the projection takes part."""
    options = {"opt_weighted_loss_type": kind, "opt_loss_decay_factor": 0.7, "cpt_token_ids": [4, 5, 6, 7, 8, 9],
               "cpt_tokens_type_mask": [1, 2, 4, 5, 6, 8]}
    models, inputs = pair(ref, lib, "llama", "cpt", **options), batch()
    types = torch.tensor([[1, 1, 2, 2, 3, 4, 4]]).expand(3, -1)
    losses = []
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        model.train()
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**inputs, labels=inputs["input_ids"], input_type_mask=types.clone()).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    H.close({"losses": torch.stack(losses[1])}, {"losses": torch.stack(losses[0])}, TOLERANCE)
    H.close(H.snapshot(models[1]), H.snapshot(models[0]), TOLERANCE)


# ------------------------------------------------------------------------------------------------------ AutoPeftModel
@pytest.mark.parametrize("method", ["prompt_tuning", "lora", "no_task"])
def test_auto(method, ref, lib, tmp_path):
    base = build("llama")
    base.save_pretrained(str(tmp_path / "base"))
    base = type(base).from_pretrained(str(tmp_path / "base"))
    task = None if method == "no_task" else "CAUSAL_LM"
    if method == "prompt_tuning":
        config = ref.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
    else:
        config = ref.LoraConfig(task_type=task, target_modules=["q_proj"])
    model = H.move(ref.get_peft_model(base, config)).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    name = "AutoPeftModel" if method == "no_task" else "AutoPeftModelForCausalLM"
    want, got = (getattr(m, name).from_pretrained(str(tmp_path / "adapter")).eval() for m in (ref, lib))
    assert type(got).__name__ == type(want).__name__
    H.close(H.run(got, batch()), H.run(want, batch()), TOLERANCE)
    other = "AutoPeftModelForSeq2SeqLM" if method != "no_task" else "AutoPeftModelForCausalLM"
    for module in (ref, lib):
        if method != "no_task":
            for wrong in (other, "AutoPeftModel"):
                with pytest.raises(ValueError):
                    getattr(module, wrong).from_pretrained(str(tmp_path / "adapter"))
        else:
            with pytest.raises(ValueError, match="allowlist"):
                module.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"), import_allowlist=["torch"])
        with pytest.raises(OSError):
            module.AutoPeftModel()


def test_auto_makes_room_for_new_tokens(lib, ref, tmp_path):
    build("llama").save_pretrained(str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    model = ref.get_peft_model(base, ref.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    tokenizer(tmp_path / "adapter", words=44)
    for module in (ref, lib):
        loaded = module.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
        assert loaded.get_input_embeddings().weight.shape[0] == 44


def test_base_weights(ref, lib):
    models = []
    for module in (ref, lib):
        H.seed(0)
        models.append(module.get_peft_model(build("t5"), module.LoraConfig(
            target_modules=["q", "v"], modules_to_save=["lm_head"], task_type="SEQ_2_SEQ_LM")))
    want, got = ref.get_base_model_state_dict(models[0]), lib.get_base_model_state_dict(models[1])
    H.identical(got, want)
    new = {k: v + 1 for k, v in copy.deepcopy(want).items()}
    for module, model in zip((ref, lib), models):
        module.set_base_model_state_dict(model, new)
    H.identical(models[1].state_dict(), models[0].state_dict())
