"""Trains each prompt method, and LoRA, and reloads it. Written for peft; prints the losses as JSON."""

import json
import sys
import tempfile
import warnings

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
CAUSAL, SEQ2SEQ = peft.TaskType.CAUSAL_LM, peft.TaskType.SEQ_2_SEQ_LM
IDS = torch.arange(24).view(4, 6) * 7 % 31
TASKS = {"task_ids": torch.tensor([0, 1, 1, 0])}
CPT_TYPES = {"input_type_mask": torch.tensor([[1, 1, 2, 3, 3, 4]] * 4)}


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=4))


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=31, **sizes, decoder_start_token_id=0))


CASES = {
    "lora": (gpt2, peft.LoraConfig(task_type=CAUSAL, r=4, lora_dropout=0.1), {}),
    "prompt tuning": (gpt2, peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=3), {}),
    "prompt tuning, t5": (t5, peft.PromptTuningConfig(task_type=SEQ2SEQ, num_virtual_tokens=3), {}),
    "p-tuning": (gpt2, peft.PromptEncoderConfig(task_type=CAUSAL, num_virtual_tokens=3, encoder_hidden_size=8), {}),
    "p-tuning, lstm": (
        gpt2,
        peft.PromptEncoderConfig(
            task_type=CAUSAL,
            num_virtual_tokens=3,
            encoder_hidden_size=8,
            encoder_reparameterization_type=peft.PromptEncoderReparameterizationType.LSTM,
        ),
        {},
    ),
    "prefix tuning": (gpt2, peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=3), {}),
    "prefix tuning, t5": (t5, peft.PrefixTuningConfig(task_type=SEQ2SEQ, num_virtual_tokens=3), {}),
    "multitask": (
        t5,
        peft.MultitaskPromptTuningConfig(task_type=SEQ2SEQ, num_virtual_tokens=3, num_tasks=2, num_ranks=2),
        TASKS,
    ),
    "cpt": (
        gpt2,
        peft.CPTConfig(
            task_type=CAUSAL,
            cpt_token_ids=[5, 9, 6, 11],
            cpt_mask=[1] * 4,
            cpt_tokens_type_mask=[1, 2, 3, 4],
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.9,
            opt_projection_epsilon=1.0,
        ),
        CPT_TYPES,
    ),
    "cartridge": (gpt2, peft.CartridgeConfig(task_type=CAUSAL, num_virtual_tokens=3, num_frozen_tokens=1), {}),
}
seen = []
for label, (base, config, more) in CASES.items():
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS, **more}
    torch.manual_seed(2)
    losses = []
    for _ in range(5):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        end = model(**batch).loss.item()
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(base(), folder)
        losses += [end, again(**batch).loss.item()]
        tokens = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "task_ids")}
        tokens = again.generate(**tokens, max_new_tokens=4, do_sample=False).tolist() if label != "cpt" else []
        with again.disable_adapter():
            losses.append(again(**{k: v for k, v in batch.items() if k not in more}).loss.item())
    assert abs(losses[-3] - losses[-2]) < 1e-5, "reloaded it is what it was"
    counts = model.get_nb_trainable_parameters()
    seen.append({"label": label, "losses": losses, "counts": counts, "tokens": tokens})
json.dump({"library": peft.PeftModel.__module__.split(".")[0], "seen": seen}, sys.stdout)
