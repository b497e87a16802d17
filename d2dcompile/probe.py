"""Run a model through Dynamo with its graphs observed: for explain, calibration and measuring.

Offline stages see the very graphs that the backend will see. One permanent Dynamo backend serves them
all; what it does with a graph is decided at each call by the observer of the running `probing` block,
so that explaining, calibrating and measuring the same model trace it once.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .capture import Captured, from_dynamo, parameter_names, unwrap
from .errors import CalibrationError
from .ir import Miss
from .passes import Match
from .rewriting import match

RECOMPILE_LIMIT = 64  # graphs per function: lengths and modes of a whole calibration set


class Observer(Protocol):
    """What an offline stage does at each call of a captured graph, and with the values it asks for."""

    def run(self, graph: Graph, args: Sequence[Any]) -> Any: ...

    def seen(self, index: int, x: Tensor, values: Tensor, /) -> None: ...


class Graph:
    """One captured graph and what observers derived from it.

    Attributes:
        gm: the graph as Dynamo made it.
        broken: why Dynamo ended the graph before the model's end, or "".
        recompiled: whether the model had a graph of the same code before.
        captured, found, misses: of the running call; Dynamo reuses graphs for other weights.
        matches: those of `found` that are convertible.
    """

    captured: Captured
    found: list[Match]
    matches: list[Match]
    misses: list[Miss]

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        why = getattr(gm, "compile_subgraph_reason", None)
        self.broken = str(why.reason) if why is not None and why.graph_break else ""
        frame = getattr(torch._guards.CompileContext.current_compile_id(), "frame_id", None)
        frames: set[Any] = getattr(_current, "frames", set())
        self.recompiled = frame in frames
        frames.add(frame)
        self._variants: dict[Any, Any] = {}

    @contextmanager
    def bound(self, args: Sequence[Any], names: Mapping[int, str]) -> Iterator[None]:
        """Resolve parameters and names for one call, and let go of them after it."""
        self.captured = from_dynamo(self.gm, args, names)
        self.found, self.misses = match(self.captured)
        self.matches = [m for m in self.found if m.site.convertible]
        try:
            yield
        finally:
            del self.captured, self.found, self.matches, self.misses

    def variant(self, key: Any, make: Callable[[], Any]) -> Any:
        """A derived graph, made on first use; structure does not depend on the weights."""
        if key not in self._variants:
            self._variants[key] = make()
        return self._variants[key]


_current = threading.local()


def _backend(gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    graph = Graph(gm)

    def call(*args: Any) -> Any:
        observer: Observer | None = getattr(_current, "observer", None)
        if observer is None:
            return gm.forward(*args)
        with graph.bound(args, _current.names):
            return observer.run(graph, args)

    return call


def observe(index: int, x: Tensor, values: Tensor) -> None:
    """Hand values of a running graph to the current observer; the target of inserted nodes."""
    _current.observer.seen(index, x, values)


def insert_observer(graph: torch.fx.Graph, before: Node, index: int, x: Node, values: Node) -> None:
    """Insert a node that hands a block's input and values to the observer, before another node."""
    with graph.inserting_before(before):
        graph.call_function(observe, (index, x, values))


@contextmanager
def probing(model: nn.Module, observer: Observer) -> Iterator[Callable[..., Any]]:
    """The model as a function of its own arguments, with `observer` running each captured graph.

    The model runs in eval mode without gradients; its mode, the random state and the observer of an
    enclosing block are restored afterwards.
    """
    plain = unwrap(model)
    modes = [(module, module.training) for module in plain.modules()]
    before: list[tuple[str, Any]] = [
        (k, getattr(_current, k, v))
        for k, v in (("observer", None), ("names", {}), ("frames", set()))
    ]
    limits: dict[str, Any] = {
        "recompile_limit": RECOMPILE_LIMIT,
        "accumulated_recompile_limit": 1024,
    }
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._dynamo.config.patch(**limits))
        _current.observer, _current.names = observer, parameter_names(plain)
        _current.frames = _FRAMES.setdefault(plain, set())
        try:
            plain.eval()
            yield _compiled(plain)
        finally:
            for module, mode in modes:
                module.training = mode
            for key, value in before:
                setattr(_current, key, value)


_FRAMES: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()
_COMPILED: weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]] = weakref.WeakKeyDictionary()


def _compiled(model: nn.Module) -> Callable[..., Any]:
    """The model's forward through Dynamo with our backend, apart from the user's own graphs."""
    if model not in _COMPILED:
        weak = weakref.ref(model)  # the compiled function must not keep its own key alive

        def call(*args: Any, **kwargs: Any) -> Any:
            live = weak()
            assert live is not None
            return live(*args, **kwargs)

        isolated = "isolate_recompiles" in inspect.signature(torch.compile).parameters
        extra: dict[str, Any] = {"isolate_recompiles": True} if isolated else {}
        _COMPILED[model] = torch.compile(call, backend=_backend, **extra)
    return _COMPILED[model]


def forget_compiled() -> None:
    """Forget every graph that Dynamo compiled, ours and others': it does not notice hooks put on later."""
    torch.compiler.reset()
    _FRAMES.clear()
    _COMPILED.clear()


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a batch: a mapping is keyword arguments, a tuple or list arguments.

    Raises CalibrationError for anything but a mapping, tuple, list or tensor.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise CalibrationError(
        f"A batch is a {type(batch).__name__}; expected what the model is called with: a mapping of "
        "keyword arguments, a tuple of arguments, or one tensor."
    )


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def countable(gm: GraphModule) -> None:
    """Let flex attention in a graph run outside of the FLOP counter, which it fails under (torch 2.13).

    Its two products are not counted; edits the graph in place.
    """
    for node in gm.graph.nodes:
        if getattr(node.target, "__name__", "") == "flex_attention" and node.target is not _flex:
            node.args, node.target = (node.target, *node.args), _flex
    gm.recompile()


def _flex(attention: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.utils._python_dispatch._disable_current_modes():
        return attention(*args, **kwargs)


def flop_counter() -> FlopCounterMode:
    """FlopCounterMode with the attention that torch 2.13 leaves uncounted on CPUs."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={cpu: _sdpa})
