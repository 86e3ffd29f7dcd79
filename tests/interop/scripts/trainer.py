"""transformers' Trainer: checkpoints, resuming, and the best checkpoint at the end. Prints the losses as JSON.

`python trainer.py best worst`: which of AdaLoRA's checkpoints to have at the end, the others with the best.
"""

import json
import sys
import tempfile
import warnings

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
STEPS, STOP = 6, 3
ROWS = [{"input_ids": r, "labels": r} for r in (torch.arange(96).view(12, 8) * 11 % 29)]


def model(config):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=4))
    torch.manual_seed(1)
    return peft.get_peft_model(base, config)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == STOP


class Allocate(TrainerCallback):
    """AdaLoRA's budget, while the gradients are there."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


def train(model, folder, callbacks=(), resume=None, **options):
    options = {"save_strategy": "steps", "save_steps": STOP, **options}
    arguments = TrainingArguments(
        folder, max_steps=STEPS, learning_rate=2e-2, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=True, seed=3, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses, trainer.evaluate()["eval_loss"]


def lora(**fields):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, init_lora_weights=False, **fields)


def ada():
    """Without the regularisation, which is not the same for the pruned adapter."""
    steps = {"total_step": STEPS, "tinit": 1, "tfinal": 2, "orth_reg_weight": 0.0}
    return peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=6, target_r=2, target_modules=["c_attn"], **steps)


CASES = {
    "lora": lora,
    "lora, whole head": lambda: lora(modules_to_save=["lm_head"], target_modules=["c_attn"]),
    "lora, whole embedding": lambda: lora(modules_to_save=["wte"], target_modules=["c_attn"]),
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def frozen(adapted):
    """Whether the model under an adapter gives what it gave before any training."""
    ids, fresh = torch.stack([row["input_ids"] for row in ROWS]), model(lora())
    with torch.no_grad(), adapted.eval().disable_adapter(), fresh.eval().disable_adapter():
        return torch.equal(adapted(input_ids=ids).logits, fresh(input_ids=ids).logits)


seen = []
for label, config in CASES.items():
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        _, losses, end = train(model(config()), whole)
        train(model(config()), broken, [Stop()])
        trainer, resumed, end_resumed = train(model(config()), broken, resume=f"{broken}/checkpoint-{STOP}")
    left = frozen(trainer.model)
    seen.append({"label": label, "losses": [*losses, end], "resumed": [*resumed, end_resumed], "frozen": left})

# what Trainer makes of a prompt whose network is not saved
config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True)
options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": STOP}
with tempfile.TemporaryDirectory() as folder:
    try:
        train(model(config), folder, **options)
    except RuntimeError as error:
        seen.append({"label": "a prompt's network", "said": str(error)[:60]})

for which in sys.argv[1:]:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": which == "worst"}
    with tempfile.TemporaryDirectory() as folder:
        trainer, losses, end = train(model(ada()), folder, [Allocate()], **best)
    found = min if which == "best" else max
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][:STEPS]
    at = trainer.state.best_model_checkpoint.rpartition("-")[2]
    seen.append({"label": f"adalora, {which}", "losses": losses, "kept": [end, found(evaluated)], "at": at})
print()
json.dump({"library": peft.PeftModel.__module__.split(".")[0], "seen": seen}, sys.stdout)
