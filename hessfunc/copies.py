"""Structural copies of a module: the same tensors in other module objects.

An evaluation may change everything about a module object: the tensors that it holds, its training
flags, and the attributes and containers in which it keeps activations. Each evaluation therefore
borrows a copy that no other evaluation uses, and the copy is restored afterwards.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

from hessfunc.containers import tensors_in

Hooks = Mapping[nn.Module, Callable[..., Any]]

_INSTALLED: ContextVar[tuple[tuple[str, Hooks], ...]] = ContextVar("hooks", default=())

# Modules whose copies are evaluated inside of each context of `hooked`.
_EVALUATED: ContextVar[tuple[list[nn.Module], ...]] = ContextVar("evaluated", default=())

# Attributes of every module. Evaluations rarely change the containers among them, so that only the
# length of these is compared.
OF_EVERY_MODULE = frozenset(vars(nn.Module()))

# Module of which a module is a structural copy. A copy does not keep its original alive.
_ORIGINAL_OF: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()

# Held while a module that cannot be copied is evaluated itself.
_ORIGINALS = threading.RLock()


@contextmanager
def hooked(*, before: Hooks | None = None, after: Hooks | None = None) -> Iterator[list[nn.Module]]:
    """Context manager that calls hooks around modules, and around their copies in this thread.

    Args:
        before: Hook ``(module, args, kwargs)`` of each module, called before its forward.
        after: Hook ``(module, args, kwargs, output)`` of each module, called after its forward.

    Yields:
        List to which the modules are added whose copies are evaluated inside.
    """
    evaluated: list[nn.Module] = []
    added = (("before", before or {}), ("after", after or {}))
    handles = [handle for kind, hooks in added for handle in _registered(kind, hooks)]
    token = _INSTALLED.set((*_INSTALLED.get(), *added))
    seen = _EVALUATED.set((*_EVALUATED.get(), evaluated))
    try:
        yield evaluated
    finally:
        _INSTALLED.reset(token)
        _EVALUATED.reset(seen)
        for handle in handles:
            handle.remove()


def _registered(kind: str, hooks: Hooks) -> list[Any]:
    if kind == "before":
        return [m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in hooks.items()]
    return [m.register_forward_hook(hook, with_kwargs=True) for m, hook in hooks.items()]


class Evaluated:
    """Module whose evaluations leave no trace.

    Attributes:
        module: Module to evaluate.
    """

    def __init__(self, module: nn.Module, originals: Sequence[nn.Module]) -> None:
        self.module = module
        modules = list(module.modules())
        self._of_original = dict(zip(originals, modules, strict=True))
        # The model may be a copy itself, such as a language model without its head.
        self._of_original |= {
            first: module
            for original, module in zip(originals, modules, strict=True)
            if (reference := _ORIGINAL_OF.get(original)) and (first := reference()) is not None
        }
        self._states = [(vars(m), dict(vars(m)), _contents(m)) for m in modules]
        self._slots = [(m, _slots(m)) for m in modules]

    def install(self) -> None:
        """Register the hooks of `hooked` that belong to the originals of these modules."""
        for kind, hooks in _INSTALLED.get():
            copies = {self._of_original.get(m, m): hook for m, hook in hooks.items()}
            _registered(kind, {m: hook for m, hook in copies.items() if m not in hooks})

    def restore(self) -> None:
        """Restore the attributes of all modules, and the contents of their containers."""
        for attributes, kept, containers in self._states:
            attributes.clear()
            attributes.update(kept)
            for container, content, of_torch in containers:
                if of_torch and len(container) == len(content):
                    continue
                if isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)
        for module, values in self._slots:
            for slot in _slots(module).keys() - values.keys():
                slot.__delete__(module)
            for slot, value in values.items():
                slot.__set__(module, value)


def _contents(module: nn.Module) -> list[tuple[Any, Any, bool]]:
    return [
        (value, copy.copy(value), name in OF_EVERY_MODULE)
        for name, value in vars(module).items()
        if isinstance(value, (list, dict, set))
    ]


class Copies:
    """Copies of a module, one for each evaluation that runs at the same time.

    A module that cannot be copied, or whose hooks or functions refer to one of its own modules
    through a closure or a global name, is evaluated itself, under one lock for all such modules.

    Args:
        model: Module, which is copied when this object is made.
        prepare: Function that is called with each module before it is evaluated.
    """

    def __init__(self, model: nn.Module, prepare: Callable[[nn.Module], None]) -> None:
        self._model, self._prepare = model, prepare
        self._originals = list(model.modules())
        self._pristine = structural_copy(model)
        self._free: list[Evaluated] = []

    @property
    def are_the_model(self) -> bool:
        """Whether evaluations use the module itself, because it has no faithful copy."""
        return self._pristine is None

    @property
    def traced(self) -> nn.Module:
        """Module that `torch.compile` traces. Its effects on attributes belong to the trace."""
        return self._model if self._pristine is None else self._pristine

    @contextmanager
    def borrowed(self) -> Iterator[nn.Module]:
        """Context manager of a module that no other evaluation uses meanwhile."""
        if self._pristine is None:
            with _ORIGINALS, self._installed(Evaluated(self._model, self._originals)) as module:
                self._prepare(module)
                yield module
            return
        try:
            evaluated = self._free.pop()
        except IndexError:
            evaluated = self._another(self._pristine)
        with self._installed(evaluated) as module:
            yield module
        self._free.append(evaluated)

    def _another(self, pristine: nn.Module) -> Evaluated:
        module = _deep_copy(pristine)
        self._prepare(module)
        return Evaluated(module, self._originals)

    @contextmanager
    def _installed(self, evaluated: Evaluated) -> Iterator[nn.Module]:
        for seen in _EVALUATED.get():
            seen.append(self._model)
        try:
            evaluated.install()
            yield evaluated.module
        finally:
            evaluated.restore()


def structural_copy(model: nn.Module, /) -> nn.Module | None:
    """Return a copy of a module that shares its tensors, or None if there is no faithful one."""
    try:
        copied = _deep_copy(model)
    except Exception:  # Attributes may be of any class, and their copies may raise anything.
        return None
    if _refers_to(copied, set(map(id, model.modules()))):
        return None
    _ORIGINAL_OF.update(zip(copied.modules(), map(ref, model.modules()), strict=True))
    return copied


def original_of(module: nn.Module, /) -> nn.Module:
    """Return the module of which a module is a structural copy, or the module itself."""
    reference = _ORIGINAL_OF.get(module)
    original = None if reference is None else reference()
    return module if original is None else original


def _slots(module: nn.Module) -> dict[Any, Any]:
    """Return the values in the ``__slots__`` of a module, by descriptor."""
    slots = [
        slot
        for kind in type(module).__mro__
        for slot in vars(kind).values()
        if isinstance(slot, MemberDescriptorType) and kind.__module__ != "builtins"
    ]
    return {slot: slot.__get__(module) for slot in slots if _is_set(slot, module)}


def _is_set(slot: MemberDescriptorType, module: nn.Module) -> bool:
    try:
        slot.__get__(module)
    except AttributeError:
        return False
    return True


def _deep_copy(model: nn.Module) -> nn.Module:
    held = [[vars(module), _slots(module)] for module in model.modules()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors_in(held)}
    copied = copy.deepcopy(model, memo)
    for module in model.modules():
        # `nn.Module.__setstate__` leaves out what is in slots.
        for slot, value in _slots(module).items():
            slot.__set__(memo[id(module)], copy.deepcopy(value, memo))
    for module in copied.modules():
        if isinstance(original := vars(module).get("_modules", {}).get("_orig_mod"), nn.Module):
            # A wrapper of `torch.compile`, whose compiled graph has no second derivative.
            vars(module)["forward"] = original.__call__
    return copied


def _refers_to(copied: nn.Module, originals: set[int]) -> bool:
    """Return whether a copy refers to an original module.

    `copy.deepcopy` does not copy functions. Their closures, defaults and global names still refer
    to the modules of the original, whose parameters an evaluation of the copy would use.
    """
    seen: set[int] = set()
    pending: list[Any] = []
    for module in copied.modules():
        pending += [module, type(module).forward]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module) and id(value) in originals:
            return True
        pending += _referents(value)
    return False


def _referents(value: Any) -> Iterable[Any]:
    match value:
        case FunctionType():
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            names = (value.__globals__.get(name) for name in value.__code__.co_names)
            modules = [x for x in names if isinstance(x, nn.Module)]
            return [*cells, *modules, value.__defaults__, value.__kwdefaults__]
        case MethodType():
            return value.__self__, value.__func__
        case functools.partial():
            return value.func, value.args, value.keywords
        case Mapping():
            return value.values()
        case list() | tuple() | set() | frozenset():
            return value
        case Tensor() | type() | ModuleType():
            return ()
    return getattr(value, "__dict__", {}).values()


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
