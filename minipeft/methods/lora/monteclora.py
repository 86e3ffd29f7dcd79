"""MonteCLoRA - Bayesian reparameterisation of LoRA. Seth et al., 2024, https://arxiv.org/abs/2411.04358.

    W' = W + s B A                          A: (r, in), B: (out, r), B = 0 at the start, s as in LoRA
    A' = A + eps sum_n w_n (Z_n V^1/2)^T    in its place while training; eps = sample_scaler, n = 1 .. num_samples
    V  = diag(max(exp(2 rho) S, 1e-3))      rho: (r,), S: (r,) the diagonal of a draw from Wishart(r, I)
    w  = softmax(log a - mean(log a) + D^1/2 u)         a = exp(pi), pi: (num_samples,)
    D  = diag((1 - 2 / N) / a + sum(1 / a) / N^2)       N = num_samples
    parameters                              r (in + out + 1) + num_samples

Z_n (in, r) and u (num_samples,) are standard normal. All draws come from a buffer that is filled for buffer_size passes
at once. rho and pi are trained; `LoraModel._get_monteclora_loss` gives the term that holds them to their priors.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Chi2

from .configs import MontecloraConfig
from .lora import LoraConfig, Summed


class MonteCLoRA(Summed, config=LoraConfig, variant="monteclora_config"):
    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")

    def build(self) -> None:
        super().build()
        base, c = self.base, self.config.monteclora_config
        sampler = MontecloraSampler(c, base.in_features, self.r, base.dtype, self.device)
        self.lora_monteclora_sampler = sampler

    def forward(self, x: Tensor, inner: Any, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)  # (..., out)
        x = self.dropped(x)
        h = self.lora_A(x)  # (..., r)
        if self.layer.training:
            h = h + nn.functional.linear(x, self.lora_monteclora_sampler())
        return (y + self.scaling * self.lora_B(h)).to(y.dtype)

    def loss(self) -> Any:
        """What holds rho and pi to their priors, a scalar; 0.0 in eval mode."""
        return self.lora_monteclora_sampler.loss() if self.layer.training else 0.0


class MontecloraSampler(nn.Module):
    """rho and pi of one adapter on one layer, and the draws from the distributions that they describe."""

    gaussian_var_prior: Tensor
    expert_weights: Tensor

    def __init__(self, config: MontecloraConfig, n_in: int, r: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        N = config.num_samples
        self.config, self.shape, self.drawn_in = config, (N, n_in, r), dtype
        meta = device if device.type == "meta" else None  # PEFT: drawn where torch draws by default, then moved
        self.std_prior = nn.Parameter(torch.rand(r, dtype=dtype, device=meta))  # rho
        self.expert_weights_prior = nn.Parameter(torch.rand(N, dtype=dtype, device=meta))  # pi
        # PEFT: the values of the last pass are saved, too
        self.register_buffer("gaussian_var_prior", torch.eye(r, dtype=dtype, device=device))  # V
        self.register_buffer("expert_weights", torch.full((N,), 1 / N, dtype=dtype, device=device))  # w
        self.buffer: list[Tensor] = []  # Z, u and S, each for buffer_size passes
        self.at = -1  # the pass whose draws are in use
        if not meta:
            self.fill(device)

    @torch.no_grad()
    def fill(self, device: Any) -> None:
        """Draw for the next passes, in the order in which PEFT draws."""
        options: dict[str, Any] = {"dtype": self.drawn_in, "device": device}
        size, (N, n_in, r) = self.config.buffer_size, self.shape
        Z, u = torch.randn(size, N, n_in, r, **options), torch.randn(size, N, **options)
        S = torch.stack([wishart(r, device) for _ in range(size)]).to(**options)  # (size, r)
        self.buffer, self.at = [Z, u, S], -1

    def draws(self) -> tuple[Tensor, Tensor, Tensor]:
        """Z (num_samples, in, r), u (num_samples,) and S (r,) of the pass."""
        Z, u, S = (drawn[self.at].to(self.std_prior) for drawn in self.buffer)
        return Z, u, S

    def forward(self) -> Tensor:
        """The next draw of A' - A, (r, in)."""
        if torch._C._current_graph_task_id() == -1:  # else a pass runs again for its gradient (checkpointing)
            if self.at + 1 >= len(self.buffer[0] if self.buffer else ()):
                self.fill(self.std_prior.device)
            self.at += 1
        Z, u, S = self.draws()
        V, w = self.variance(S), self.weights(u)
        self.gaussian_var_prior, self.expert_weights = V.detach().diag(), w.detach()
        return self.config.sample_scaler * (torch.einsum("n,nir->ri", w, Z) * root(V)[:, None])

    def variance(self, S: Tensor) -> Tensor:
        """The diagonal of V, (r,)."""
        return ((2 * self.std_prior).exp() * S).clamp(min=1e-3)

    def weights(self, u: Tensor) -> Tensor:
        """w, (num_samples,)."""
        a, N = self.expert_weights_prior.exp().clamp(min=1e-6), self.shape[0]
        D = ((1 - 2 / N) / a + (1 / a).sum() / N**2).clamp(min=1e-6) + 1e-6
        return torch.softmax(root(D) * u + a.log() - a.log().mean(), -1)

    def loss(self) -> Tensor:
        """kl_loss_weight times three divergences from the priors, and with use_entropy |w|^2, a scalar.

        V and w are those of the last pass; before the first one they are the stored ones.
        """
        c, (N, _, r), rho, a = self.config, self.shape, self.std_prior, self.expert_weights_prior.exp()
        V, w = self.gaussian_var_prior.diag(), self.expert_weights
        if self.at >= 0:
            _, u, S = self.draws()
            V, w = self.variance(S), self.weights(u)
        b = torch.full_like(a, c.dirichlet_prior)
        # PEFT: the sum over lgamma(a) - lgamma(b) is added, though the divergence of Dirichlet distributions has it
        # subtracted; and from about 20 samples on, gamma(sum(a)) overflows, so that the loss is infinite
        dirichlet = a.sum().lgamma() - b.sum().lgamma() + (a.lgamma() - b.lgamma()).sum()
        dirichlet = dirichlet + ((a - b) * (a.digamma() - a.sum().digamma())).sum()
        wishart = r / 2 * ((2 * rho).exp() - 2 * rho - 1).sum()
        gaussian = N / 2 * (V - V.log() - 1).sum()
        return c.kl_loss_weight * (dirichlet + wishart + gaussian) + ((w**2).sum() if c.use_entropy else 0)


def wishart(r: int, device: Any) -> Tensor:
    """The diagonal of a draw from Wishart(r, I), (r,): that of L L^T, with Bartlett's L, (r, r)."""
    chi = Chi2(torch.arange(r, 0, -1.0, device=device)).sample().sqrt().clamp(min=torch.finfo(torch.float32).eps)
    L = chi.diag()
    below = torch.tril_indices(r, r, -1)
    L[below[0], below[1]] = torch.randn(below.shape[1], device=device)
    return (L @ L.T).diagonal()


def root(t: Tensor) -> Tensor:
    """The square root; PEFT: in float32."""
    return t.float().sqrt().to(t.dtype)
