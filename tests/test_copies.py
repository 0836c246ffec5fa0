"""Modules stay as they are, in every thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import hessfunc as hf
from hessfunc.copies import hooked
from tests.cases import TiedHead
from tests.reference import relative_error


class Keeping(nn.Module):
    """Module that keeps its activations, in an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.kept: list[Tensor] = []
        self.last: Tensor | None = None
        self.again = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.layer(x))
        self.kept.append(self.last)
        return self.again[0](self.last) * len(self.kept)


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def looked_up() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 3, max_norm=0.5), nn.Linear(3, 3))


def with_hook_of_its_own() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].register_forward_hook(lambda _, __, out: out + model[0](out))
    return model


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, num_layers=2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def scaled(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "activations kept": Keeping,
    "pruned": pruned,
    "renormalised embedding": looked_up,
    "tied": TiedHead,
    "spectral norm": lambda: scaled(nn.utils.spectral_norm),
    "spectral norm, parametrised": lambda: scaled(nn.utils.parametrizations.spectral_norm),
    "weight norm": lambda: scaled(nn.utils.weight_norm),
    "weight norm, parametrised": lambda: scaled(nn.utils.parametrizations.weight_norm),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 3)),
    "lstm": Recurrent,
    "attention": lambda: nn.TransformerEncoderLayer(3, 1, 4, 0.1),
    "hook on its own module": with_hook_of_its_own,
}


def problem(name: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    tokens = name in ("renormalised embedding", "tied")
    x = torch.arange(6) if tokens else torch.randn(6, 3).double()
    return model, x, torch.randint(3, (6,))


def everything(model: nn.Module) -> dict[str, Any]:
    """Identity of all that a module holds, and the values of its tensors."""
    kept: dict[str, Any] = {"random stream": torch.get_rng_state()}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            kept[f"{path} {key}"] = value
            parts = value if isinstance(value, (dict, list)) else {}
            named = parts.items() if isinstance(parts, dict) else enumerate(parts)
            for own, part in (*named, (None, value)):
                kept[f"{path} {key} {own} itself"] = part
                if isinstance(part, Tensor):
                    kept[f"{path} {key} {own}"] = part._version, part.detach().clone()
    return kept


def assert_same(found: dict[str, Any], before: dict[str, Any]) -> None:
    assert found.keys() == before.keys()
    for key, value in before.items():
        other = found[key]
        if isinstance(value, tuple) and isinstance(value[-1], Tensor):
            assert other[0] == value[0], key
            assert torch.equal(other[1], value[1]), key
        elif key == "random stream":
            assert torch.equal(other, value)
        else:
            assert other is value, key


class FailsIn(torch.autograd.Function):
    """The identity, whose backward raises, or the backward of its backward."""

    @staticmethod
    def forward(x: Tensor, order: int) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.order = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        if ctx.order == 1:
            raise KeyError("in the middle")
        return FailsIn.apply(g, ctx.order - 1), None


def fail(*_: Any) -> None:
    raise KeyError("in the middle")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*nested tensor")
@pytest.mark.parametrize("fails", ["never", "forward", "criterion", "backward", "product"])
@pytest.mark.parametrize("name", MODELS)
def test_products_leave_no_trace_on_the_module(name: str, fails: str) -> None:
    model, x, y = problem(name)
    model_fn, params = hf.functional(model)
    before, settings = everything(model), settings_of_the_process()
    failing = [fails]

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        match failing[-1]:
            case "criterion":
                fail()
            case "backward":
                outputs = FailsIn.apply(outputs, 1)
            case "product":
                outputs = FailsIn.apply(outputs, 2)
        return F.cross_entropy(outputs, targets)

    loss = hf.supervised(model_fn, criterion)
    v = hf.random_like(params, 2, seed=0)
    if fails != "never":
        hooks = {list(model.modules())[-1]: fail} if fails == "forward" else {}
        with pytest.raises(KeyError, match="in the middle"), hooked(after=hooks):
            hf.hvp(loss)(params, (x, y))(v)
        assert_same(everything(model), before)
    failing.append("never")
    found = hf.hvp(loss)(params, (x, y))(v)
    assert_same(everything(model), before)
    assert settings_of_the_process() == settings
    fresh = hf.hvp(hf.supervised(hf.functional(model)[0], F.cross_entropy))(params, (x, y))(v)
    assert all(torch.equal(found[key], fresh[key]) for key in params)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*nested tensor")
@pytest.mark.parametrize("name", MODELS)
def test_a_call_is_that_of_the_module_and_the_same_each_time(name: str) -> None:
    model, x, _ = problem(name)
    model.eval()
    model_fn, params = hf.functional(model)
    first = model_fn(params, x)
    assert torch.equal(model_fn(params, x), first)
    torch.testing.assert_close(first, model(x))
    moved = {key: value + 0.1 for key, value in params.items()}
    changed = model_fn(moved, x)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(moved[key])
        for module in model.modules():
            for kept in [v for k, v in vars(module).items() if k == "kept"]:
                kept.clear()
    torch.testing.assert_close(changed, model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*nested tensor")
@pytest.mark.parametrize("name", MODELS)
def test_threads_with_other_parameters_do_not_disturb_each_other(name: str) -> None:
    model, x, y = problem(name)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    sets = [params, {key: 1.5 * value for key, value in params.items()}]
    v = hf.random_like(params, 1, seed=0)

    def product(which: int) -> Tensor:
        found = hf.hvp(loss)(sets[which], (x, y))(v)
        return torch.cat([leaf.flatten() for leaf in found.values()])

    expected = [product(0), product(1)]
    assert relative_error(expected[0], expected[1]) > 1e-3
    before = everything(model)
    with ThreadPoolExecutor(8) as pool:
        products = list(pool.map(product, [0, 1] * 24))
    for i, found in enumerate(products):
        assert torch.equal(found, expected[i % 2])
    assert_same(everything(model), before)


def test_sixteen_threads_and_a_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    x, y = torch.randn(8, 3), torch.randint(3, (8,))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    sets = [{k: scale * v.clone() for k, v in params.items()} for scale in (1, 2)]
    v = hf.random_like(params, 1, seed=0)

    def product(which: int) -> Tensor:
        found = hf.hvp(loss)(sets[which], (x, y))(v)
        return torch.cat([leaf.flatten() for leaf in found.values()])

    expected = [product(0), product(1)]
    ended = threading.Event()
    identities = [id(p) for p in model.parameters()]

    def train() -> int:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        steps = 0
        while not ended.is_set():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            model.eval()
            model.train()
            steps += 1
        return steps

    with ThreadPoolExecutor(17) as pool:
        training = pool.submit(train)
        products = list(pool.map(product, [0, 1] * 500))
        ended.set()
        assert training.result() > 0
    assert sum(not torch.equal(p, expected[i % 2]) for i, p in enumerate(products)) == 0
    assert [id(p) for p in model.parameters()] == identities


def settings_of_the_process() -> dict[str, Any]:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        "tf32": (cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()),
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "random stream": torch.get_rng_state().tolist(),
    }


def settings_of_a_thread() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled()


class Watching(TorchDispatchMode):
    """Mode that looks at the settings at each operation, of a forward, a backward or a product."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.settings = self._now()
        self.operations = 0
        self.changed: set[str] = set()

    def _now(self) -> dict[str, Any]:
        return settings_of_the_process() | {"flags": [m.training for m in self._model.modules()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations % 5 == 0:
            now = self._now()
            self.changed |= {key for key, value in self.settings.items() if now[key] != value}
        return func(*args, **(kwargs or {}))


CURVATURES: dict[str, Callable[..., Any]] = {
    "hvp": hf.hvp,
    "forward": functools.partial(hf.hvp, mode="forward"),
    "difference": functools.partial(hf.hvp, mode="difference"),
    "ggnvp": hf.ggnvp,
    "pchvp": hf.pchvp,
}


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", ["attention", "lstm", "renormalised embedding", "dropout"])
def test_no_setting_of_the_process_changes_while_a_loss_runs(name: str, curvature: str) -> None:
    model, x, y = problem(name)
    model_fn, params = hf.functional(model)
    model.eval()
    seen: list[Any] = []

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(settings_of_a_thread).result())
        return F.cross_entropy(outputs, targets)

    here = settings_of_a_thread()
    watching = Watching(model)
    with watching:
        matvec = CURVATURES[curvature](hf.supervised(model_fn, criterion))(params, (x, y))
        matvec(hf.random_like(params, 1, seed=0))
    assert watching.operations > 5
    assert not watching.changed
    assert set(seen) == {(True, False, False)}
    assert settings_of_a_thread() == here


def test_frozen_parameters_and_buffers_are_those_of_the_module_at_each_call() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    model[0].requires_grad_(False)
    model_fn, params = hf.functional(model)
    model[0].weight = nn.Parameter(torch.ones(4, 3), requires_grad=False)
    model[1].running_mean.fill_(0.5)
    x = torch.randn(5, 3)
    torch.testing.assert_close(model_fn(params, x), model(x))


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is one of me")


@pytest.mark.parametrize("threads", [1, 4])
def test_a_module_that_cannot_be_copied_is_evaluated_itself_under_a_lock(threads: int) -> None:
    model = nn.Sequential(Uncopied(3, 3), nn.Tanh(), nn.Linear(3, 3))
    called: list[nn.Module] = []
    model[1].register_forward_hook(lambda module, *_: called.append(module))
    model_fn, params = hf.functional(model)
    x = torch.randn(4, 3)
    sets = [params, {key: 2 * value for key, value in params.items()}]
    expected = [model_fn(p, x) for p in sets]
    before = everything(model)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda i: model_fn(sets[i % 2], x), range(40)))
    assert all(torch.equal(f, expected[i % 2]) for i, f in enumerate(found))
    assert all(module is model[1] for module in called)
    assert_same(everything(model), before)


class Slotted(nn.Linear):
    """A module that reads one slot, and keeps its activations in another."""

    __slots__ = ("__hidden", "factor", "kept")

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.factor = torch.tensor(2.0)
        self.__hidden = [1.0]

    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input).tanh()
        self.__hidden.append(1.0)
        return self.kept * self.factor * self.__hidden[0]


def test_slots_are_copied_and_restored() -> None:
    inner = Slotted()
    model = nn.Sequential(inner, nn.Tanh())
    model_fn, params = hf.functional(model)
    x = torch.randn(4, 3)
    expected = model(x)
    inner.factor = torch.tensor(5.0)
    del inner.kept
    # The copy, and with it the factor, is that of the call of `functional`.
    for _ in range(2):
        torch.testing.assert_close(model_fn(params, x), expected)
    assert not hasattr(inner, "kept")
    assert len(inner._Slotted__hidden) == 2


MODEL = nn.Sequential(nn.Linear(3, 3), nn.Tanh())


def by_global_name(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    return MODEL[0](out)


def by_partial(model: nn.Module, _: nn.Module, __: Any, out: Tensor) -> Tensor:
    return model[0](out)


@pytest.mark.parametrize("kind", ["closure", "global", "partial", "default"])
def test_hooks_that_refer_to_the_module_use_the_parameters_of_the_call(kind: str) -> None:
    model = MODEL if kind == "global" else nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    hook: dict[str, Any] = {
        "closure": lambda _, __, out: model[0](out),
        "global": by_global_name,
        "partial": functools.partial(by_partial, model),
        "default": lambda _, __, out, own=model: own[0](out),
    }
    handle = model[1].register_forward_hook(hook[kind])
    model_fn, params = hf.functional(model)
    x = torch.randn(4, 3)
    doubled = {key: 2 * value for key, value in params.items()}
    inner = torch.tanh(F.linear(x, doubled["0.weight"], doubled["0.bias"]))
    expected = F.linear(inner, doubled["0.weight"], doubled["0.bias"])
    torch.testing.assert_close(model_fn(doubled, x), expected)
    handle.remove()


def test_recomputed_parts_use_copies_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 3).double(), torch.randint(3, (8,))
    losses = [
        hf.supervised(hf.functional(model, recompute=which)[0], F.cross_entropy)
        for which in (None, "*")
    ]
    params = hf.functional(model)[1]
    v = hf.random_like(params, 1, seed=0)

    def product(which: int) -> Tensor:
        found = hf.hvp(losses[which])(params, (x, y))(v)
        return torch.cat([leaf.flatten() for leaf in found.values()])

    expected = product(0)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(product, [1] * 40):
            torch.testing.assert_close(found, expected)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


TRANSFORMED: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
    "attention": Attending,
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3), nn.Linear(4, 4)),
}


def transformations(model_fn: Any) -> dict[str, Callable[..., Any]]:
    """Functions of params, inputs and a direction, whose derivatives are those of the first."""

    def value(params: Any, x: Tensor) -> Tensor:
        return model_fn(params, x).sin().sum()

    def product(params: Any, x: Tensor, v: Any) -> Any:
        return vjp(lambda p: grad(value)(p, x), params)[1](v)[0]

    def curvature(params: Any, x: Tensor, v: Any) -> Tensor:
        pairs = zip(product(params, x, v).values(), v.values(), strict=True)
        return torch.stack([(a * b).sum() for a, b in pairs]).sum()

    return {
        "value": lambda p, x, v: value(p, x),
        "grad": lambda p, x, v: grad(value)(p, x),
        "jvp of grad": lambda p, x, v: jvp(lambda q: grad(value)(q, x), (p,), (v,))[1],
        "vjp of grad": product,
        "grad of v'Hv": grad(curvature),
        "vmap over params": lambda p, x, v: vmap(
            lambda s: curvature({key: s * leaf for key, leaf in p.items()}, x, v)
        )(torch.tensor([1.0, 1.1], dtype=x.dtype)),
        "vmap over inputs": lambda p, x, v: vmap(lambda s: curvature(p, s * x, v))(
            torch.tensor([1.0, 1.1], dtype=x.dtype)
        ),
    }


def leaves_of(tree: Any) -> Tensor:
    leaves = tree.values() if isinstance(tree, dict) else [tree]
    return torch.cat([leaf.flatten() for leaf in leaves])


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_pure_function_is_transformed_and_compiled(name: str) -> None:
    torch.manual_seed(0)
    model = TRANSFORMED[name]().double()
    model_fn, params = hf.functional(model)
    x = torch.randn(2, 3, 4).double()
    v = {key: torch.randn_like(leaf) for key, leaf in params.items()}
    before = everything(model)
    functions = transformations(model_fn)
    results = {key: function(params, x, v) for key, function in functions.items()}
    step = 1e-5
    ahead, behind = (
        {key: leaf + s * v[key] for key, leaf in params.items()} for s in (step, -step)
    )
    for derivative, of in (("jvp of grad", "grad"), ("vjp of grad", "grad")):
        change = leaves_of(functions[of](ahead, x, v)) - leaves_of(functions[of](behind, x, v))
        assert relative_error(leaves_of(results[derivative]), change / (2 * step)) < 1e-6
    slope = hf.inner(results["grad of v'Hv"], v)
    curved = [hf.inner(v, functions["vjp of grad"](p, x, v)) for p in (ahead, behind)]
    assert float(slope) == pytest.approx(float(curved[0] - curved[1]) / (2 * step), rel=1e-5)
    one = hf.inner(v, results["vjp of grad"])
    for mapped in ("vmap over params", "vmap over inputs"):
        assert float(results[mapped][0]) == pytest.approx(float(one), rel=1e-9)
    # The others are parts of these, or are compiled alone for one net.
    whole = ("jvp of grad", "grad of v'Hv")
    for key in functions if name == "mlp" else whole:
        torch._dynamo.reset()
        compiled = torch.compile(functions[key], fullgraph=True, backend="eager")(params, x, v)
        assert relative_error(leaves_of(compiled), leaves_of(results[key])) < 1e-9, key
    assert_same(everything(model), before)
