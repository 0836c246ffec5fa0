"""Optimisers that torch lacks, with the names, options and state of the packages that have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Each(Optimizer):
    """Optimiser that steps each parameter by itself."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.move(p, p.grad.clone(), group, self.state[p])

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(_Each):
    """Lion as in lion_pytorch."""

    def __init__(self, params: Any, lr: float, *, decoupled_weight_decay: bool = False, **o: Any):
        self.decoupled_wd, self._init_lr = decoupled_weight_decay, lr
        super().__init__(params, **({"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.0} | o))

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        m = state.setdefault("exp_avg", torch.zeros_like(p))
        decay = group["weight_decay"] / (self._init_lr if self.decoupled_wd else 1)
        first, second = group["betas"]
        p.mul_(1 - group["lr"] * decay)
        p.sub_(group["lr"] * (first * m + (1 - first) * g).sign())
        m.mul_(second).add_(g, alpha=1 - second)


class SignSGD(_Each):
    """Sign descent as in pytorch_optimizer."""

    def __init__(self, params: Any, **o: Any) -> None:
        options = {"momentum": 0.0, "weight_decay": 0.0, "weight_decouple": True} | o
        super().__init__(params, **options)

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if group["weight_decouple"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        else:
            g = g + group["weight_decay"] * p
        if group["momentum"]:
            m = state.setdefault("momentum_buffer", torch.zeros_like(p))
            g = m.lerp_(g, 1 - group["momentum"])
        p.sub_(group["lr"] * g.sign())


class SingleDeviceMuonWithAuxAdam(_Each):
    """Muon of its author, with the exact orthogonal factor and AdamW for other groups."""

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if group["use_muon"]:
            m = state.setdefault("momentum_buffer", torch.zeros_like(p))
            beta = group["momentum"]
            m.lerp_(g, 1 - beta)
            u, _, vt = torch.linalg.svd(g.lerp(m, beta), full_matrices=False)
            scale = max(1, p.shape[-2] / p.shape[-1]) ** 0.5
            p.sub_(group["lr"] * scale * (u @ vt))
            return
        first, second = group["betas"]
        m = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(g, 1 - first)
        v = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(g * g, 1 - second)
        t = state["step"] = state.get("step", 0) + 1
        root = (v / (1 - second**t)).sqrt() + group["eps"]
        p.sub_(group["lr"] * m / (1 - first**t) / root)


class SOAP(_Each):
    """SOAP of its authors, without merged axes; its second moment is not turned with the bases."""

    def __init__(self, params: Any, **o: Any) -> None:
        options = {"betas": (0.95, 0.95), "eps": 1e-8, "correct_bias": True, "merge": False} | o
        super().__init__(params, **({"weight_decay": 0.0, "longest": 100} | options))

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        shape = (p.numel(),) if group["merge"] else p.shape
        if "Q" not in state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            generator = torch.Generator().manual_seed(p.numel())
            state["Q"] = [
                torch.linalg.qr(torch.randn(n, n, generator=generator).to(p))[0]
                if n <= group["longest"]
                else []
                for n in shape
            ]
            return
        Q, (first, second) = state["Q"], group["betas"]
        t = state["step"] = state["step"] + 1
        turned = self.turn(g.reshape(shape), Q, 0).reshape(p.shape)
        m = state["exp_avg"].mul_(first).add_(turned, alpha=1 - first)
        v = state["exp_avg_sq"].mul_(second).add_(turned**2, alpha=1 - second)
        step = (m / (v.sqrt() + group["eps"])).reshape(shape)
        size = group["lr"]
        if group["correct_bias"]:
            size *= (1 - second**t) ** 0.5 / (1 - first**t)
        p.sub_(size * self.turn(step, Q, 1).reshape(p.shape))
        p.mul_(1 - group["lr"] * group["weight_decay"])

    @staticmethod
    def turn(x: Tensor, Q: list[Any], axis: int) -> Tensor:
        for basis in Q:
            if len(basis):
                x = torch.tensordot(x, basis, dims=[[0], [axis]])
            else:
                x = x.permute(*range(1, x.dim()), 0)
        return x


class Shampoo(_Each):
    """Shampoo as in torch_optimizer."""

    def __init__(self, params: Any, **o: Any) -> None:
        super().__init__(params, **({"momentum": 0.0, "weight_decay": 0.0, "epsilon": 1e-4} | o))

    def move(self, p: Tensor, g: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        g = g + group["weight_decay"] * p
        for axis, n in enumerate(p.shape):
            start = group["epsilon"] * torch.eye(n, dtype=p.dtype)
            L = state.setdefault(f"precond_{axis}", start)
            unfolded = p.grad.movedim(axis, 0).reshape(n, -1)
            L += unfolded @ unfolded.mT
            values, vectors = torch.linalg.eigh(L)
            root = (vectors * values ** (-1 / p.dim())) @ vectors.mT
            state[f"inv_precond_{axis}"] = root
            g = torch.tensordot(g, root, dims=[[0], [0]])
        p.sub_(group["lr"] * g)
