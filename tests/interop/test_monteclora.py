"""MonteCLoRA while it trains: draws, gradients, loss, checkpoints. Outputs are in the table of cases."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from . import bases as B
from . import harness as H
from .cases import each_case
from .cases.monteclora import LINEARS, OTHER, STRONG, monteclora

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
of_monteclora = each_case(lambda c: c.method == "monteclora")
PLAIN = monteclora("training/plain", B.MLP, LINEARS)
ENTROPY = monteclora("training/entropy", B.MLP, LINEARS, monteclora_config={**STRONG, "use_entropy": True})


def trained(model, batch, weight=1.0):
    """Loss, MonteCLoRA's part of it, and gradients of a pass in training mode, by name."""
    H.seed(5)
    out = H.tensors(model.train()(**batch))
    extra = model.base_model._get_monteclora_loss()
    loss = sum((v * torch.sin(v + 1)).sum() for v in out.values()) + weight * extra
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "extra": extra.detach(), **grads}


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "monteclora" in k}


def moments(model):
    return {k: v for k, v in state(model).items() if k.endswith(("gaussian_var_prior", "expert_weights"))}


@DTYPES
@of_monteclora
def test_training(case, dtype, lib, ref):
    """Loss, gradients and what the buffers hold, as in peft, over more passes than the buffer has draws for."""
    if case.base.float32_inside and dtype == torch.float64:
        pytest.skip("compared in float32")
    tolerance = max(1e-6, 10 * H.TOLERANCE[dtype])
    theirs, ours = H.pair(ref, lib, case)
    if dtype == torch.bfloat16:  # the base alone: peft cannot train adapters that are in bfloat16 too
        theirs, ours = (H.adapt(module, case, dtype=dtype) for module in (ref, lib))
        H.copy_values(H.move(theirs, case.scale), ours)
    else:
        theirs, ours = theirs.to(dtype), ours.to(dtype)
    batch, extras = H.inputs(case, dtype), []
    for _ in range(5):
        want, got = trained(theirs, batch, 1e3), trained(ours, batch, 1e3)
        H.close(got, want, tolerance)
        H.close(moments(ours), moments(theirs), tolerance)
        extras.append(want["extra"].item())
    assert case.kwargs["monteclora_config"]["num_samples"] == 1 or len(set(extras)) > 3
    assert any(n.endswith("std_prior") and g.abs().max() > 1e-6 for n, g in want.items())


@pytest.mark.parametrize("r, samples", [(1, 1), (3, 2), (8, 4)])
def test_draws(r, samples, lib, ref):
    """The whole buffer at equal seed: that of the start, and that of the first refill."""
    given = {"num_samples": samples, "buffer_size": 7}
    case = monteclora("training/draws", B.MLP, ["wide"], r=r, monteclora_config=given)
    theirs, ours = (H.adapt(module, case).base_model.model.wide.lora_monteclora_sampler["default"].train()
                    for module in (ref, lib))
    for refilled in (False, True):
        if refilled:
            for sampler in (theirs, ours):
                H.seed(3)
                for _ in range(8):
                    sampler()
        Z, u, S = ours.buffer
        assert len(theirs.sampler.buffer) == len(Z) == 7
        for i, drawn in enumerate(theirs.sampler.buffer):
            assert torch.equal(Z[i], drawn["z_mvn"]) and torch.equal(u[i], drawn["z_dirichlet"])
            torch.testing.assert_close(S[i], drawn["z_wishart"].diag(), rtol=1e-6, atol=1e-6)


def test_limits(lib, ref):
    """Variances and concentrations that are next to nothing are raised to a least value, and get no gradient."""
    models = H.pair(ref, lib, PLAIN, torch.float64)
    found = []
    for model in models:
        for name, p in model.named_parameters():
            if name.endswith("std_prior"):
                p.data[:2] = -9.0
            elif name.endswith("expert_weights_prior"):
                p.data[:1] = -16.0
        found.append(trained(model, H.inputs(PLAIN, torch.float64), 1e3) | moments(model))
    assert any(n.endswith("gaussian_var_prior") and v[0, 0] == 1e-3 for n, v in found[0].items())
    H.close(found[1], found[0], 1e-6)


def test_formula(lib):
    """The perturbation and the loss, in plain numbers, from the draws that are in use."""
    case = monteclora("training/formula", B.MLP, ["wide"], monteclora_config=OTHER)
    model = H.move(H.adapt(lib, case)).double().train()
    layer = model.base_model.model.wide
    A, Bw = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    sampler = layer.lora_monteclora_sampler["default"]
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)).double()
    y = layer(x)
    Z, u, S = (drawn[0].double() for drawn in sampler.buffer)
    rho, a, N, r = sampler.std_prior, sampler.expert_weights_prior.exp(), 5, 4
    V = torch.clamp(torch.exp(rho) ** 2 * S, min=1e-3)
    D = [(1 / a[n]) * (1 - 2 / N) + sum(1 / a[k] for k in range(N)) / N**2 + 1e-6 for n in range(N)]
    logits = torch.stack([D[n] ** 0.5 * u[n] + a[n].log() - sum(a[k].log() for k in range(N)) / N for n in range(N)])
    w = logits.exp() / logits.exp().sum()
    noisy = A + sum(0.2 * w[n] * (Z[n] * V.sqrt()).T for n in range(N))
    torch.testing.assert_close(y, layer.base_layer(x) + 1.5 * x @ noisy.T @ Bw.T, rtol=1e-6, atol=1e-6)
    b = 0.1 * torch.ones_like(a)
    inverse = torch.distributions.kl_divergence(*map(torch.distributions.Dirichlet, (a, b)))
    dirichlet = inverse + 2 * (a.lgamma() - b.lgamma()).sum()  # the sign as in PEFT
    normal = torch.distributions.MultivariateNormal
    gaussian = N * torch.distributions.kl_divergence(normal(0 * rho, V.diag()), normal(0 * rho, torch.eye(r).double()))
    wishart = 0.5 * r * (torch.exp(2 * rho).sum() - 2 * rho.sum() - r)
    want = 1e-5 * (dirichlet + wishart + gaussian) + (w * w).sum()
    torch.testing.assert_close(model.base_model._get_monteclora_loss(), want, rtol=1e-6, atol=1e-9)


def test_loss_of_which_adapters(lib, ref):
    """The mean over layers of the active adapters, or of those named; 0.0 in eval mode and without MonteCLoRA."""
    models = H.pair(ref, lib, ENTROPY, torch.float64, second=True)
    found = []
    for model in models:
        tuner = model.train().base_model
        H.seed(4)
        before = tuner._get_monteclora_loss()
        tuner.set_adapter(["default", "other"])
        model(**H.inputs(ENTROPY, torch.float64))
        asked = [None, "other", ["default"], ["default", "other"]]
        values = [before, *(tuner._get_monteclora_loss(names) for names in asked)]
        found.append({str(i): v.detach() for i, v in enumerate(values)})
        assert model.eval().base_model._get_monteclora_loss() == 0.0
    assert len({v.item() for v in found[0].values()}) == 4
    H.close(found[1], found[0], 1e-6)
    plain = lib.get_peft_model(B.MLP.build(), lib.LoraConfig(target_modules=LINEARS)).train()
    assert plain.base_model._get_monteclora_loss() == 0.0


def test_loss_is_finite_with_many_samples(lib, ref):
    """In peft the gamma function of the sum overflows."""
    case = monteclora("training/many", B.MLP, ["wide"], monteclora_config={"num_samples": 40, "buffer_size": 1})
    losses = [H.adapt(module, case).train().base_model._get_monteclora_loss() for module in (ref, lib)]
    assert lib is ref or not torch.isfinite(losses[0]), "peft does: the comment in monteclora.py is wrong"
    losses[1].backward()
    assert torch.isfinite(losses[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, lib, is_ref):
    """The pass that runs again sees the same draws. (In peft it sees the next ones.)"""
    if is_ref:
        pytest.skip("peft draws again")
    results = []
    for through in (True, False):
        model = H.move(H.adapt(lib, ENTROPY)).train()
        x = H.inputs(ENTROPY)["x"].requires_grad_()
        for _ in range(3):
            out = checkpoint(model, x, use_reentrant=reentrant) if through else model(x)
            (out.sin().sum() + model.base_model._get_monteclora_loss()).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | moments(model))
    H.close(*results, 1e-5)


def test_checkpoint_both_ways(lib, ref, tmp_path):
    """The trained tensors and the two moments are saved, nothing of the draws; either side goes on from there."""
    theirs, ours = H.pair(ref, lib, ENTROPY)
    for model in (theirs, ours):
        trained(model, H.inputs(ENTROPY))
        model.eval()
    want, got = H.saved(theirs, tmp_path / "theirs")[0], H.saved(ours, tmp_path / "ours")[0]
    H.close(got, want, 1e-5)
    ends = {k.partition("lora_monteclora_sampler.")[2] for k in want if "sampler" in k}
    assert ends == {"std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights"}
    for module, path, model in ((lib, "theirs", theirs), (ref, "ours", ours)):
        again = module.PeftModel.from_pretrained(ENTROPY.base.build(), tmp_path / path, is_trainable=True)
        H.identical(state(again), state(model))
        loss = again.train().base_model._get_monteclora_loss()
        loss.backward()
        H.close({"loss": loss.detach()}, {"loss": model.train().base_model._get_monteclora_loss().detach()}, 1e-5)
        trained(again, H.inputs(ENTROPY))
        assert H.differ(moments(again), moments(model), 1e-3), "new draws"


def test_copies_after_training(lib):
    """A model that has trained can be copied, and the copy draws as it does."""
    model = H.move(H.adapt(lib, PLAIN))
    trained(model, H.inputs(PLAIN))
    twin = copy.deepcopy(model)
    H.close(trained(twin, H.inputs(PLAIN)), trained(model, H.inputs(PLAIN)), 1e-6)


def test_eval_draws_nothing(lib):
    """Nor does merging: the perturbation is gone, in training mode too."""
    model = H.move(H.adapt(lib, PLAIN))
    batch, before = H.inputs(PLAIN), torch.get_rng_state()
    plain = H.run(model, batch)
    model.train().merge_adapter()
    H.close(H.run(model, batch), plain, 1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.at == -1 for m in model.modules() if type(m).__name__ == "MontecloraSampler")


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_weighted(kind, lib, ref):
    """Combined as LoRAs are."""
    case, outs = monteclora("training/weighted", B.MLP, LINEARS, second={}), []
    for model in H.pair(ref, lib, case, second=True):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=kind,
                                   **({"density": 0.5} if kind == "ties" else {}))
        model.set_adapter("sum")
        outs.append(H.run(model, H.inputs(case)))
    H.close(outs[1], outs[0], 1e-4)


class Trainer:
    """What transformers' Trainer has of it."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        out = model(**inputs)
        loss = out.square().mean() * kwargs.get("factor", 1)
        return (loss, out) if return_outputs else loss


def test_trainer_mixin(lib, ref):
    helpers = [__import__(f"{module.__name__}.helpers", fromlist=["x"]) for module in (ref, lib)]
    found = []
    for module, model in zip(helpers, H.pair(ref, lib, ENTROPY, torch.float64)):
        trainer = type("Mixed", (module.MontecloraTrainerMixin, Trainer), {})()
        alone = trainer.compute_loss(model.train(), H.inputs(ENTROPY, torch.float64), factor=3)
        both, out = trainer.compute_loss(model, H.inputs(ENTROPY, torch.float64), return_outputs=True)
        found.append({"alone": alone.detach(), "both": both.detach(), "out": out.detach()})
        assert both - out.square().mean() > 0.1, "entropy"
    H.close(found[1], found[0], 1e-6)


def test_quantised_layer(lib, is_ref):
    """On bitsandbytes' layers too; in peft it is a plain LoRA there, without a word."""
    if is_ref:
        pytest.skip("peft leaves it out")
    model, x = H.on_four_bits(lib, monteclora_config=STRONG)
    perturbed = model(x)
    H.assert_adds_its_delta(model, x)
    assert (perturbed - model(x)).abs().max() > 1e-2
