"""Records the operators that PyTorch dispatches for a stage on meta tensors, with their shapes, bytes and FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from griffin.kernels.costs import COSTS, NAMESPACE, Product, touched

# Operators of PyTorch by what they do; the rest are elementwise.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_"}
_REDUCTIONS = {"sum", "mean", "max", "amax", "min", "norm", "cumsum", "any", "all", "argmax", "linalg_vector_norm"}
_COPIES = {"copy_", "clone", "cat", "_to_copy", "stack", "index_select", "slice_backward", "constant_pad_nd", "repeat"}
_UNREAD = {"copy_", "zero_", "fill_"}  # in place: what they write over is not read
_MADE = ("new_", "zeros_like", "ones_like", "full_like")  # of the argument only shape, dtype and device are read
_NORMS = {"_fused_rms_norm", "_fused_rms_norm_backward", "native_layer_norm"}
_SCATTERED = {"index", "gather", "scatter_"}  # one element of each row
_SECTOR = 64  # bytes that reading or writing one element moves

_COLLECTIVES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
}

# PyTorch's operators over symmetric memory: collective, the tensor that it exchanges or multiplies, matrices, group.
_PIPELINED: dict[str, Callable[[Any], tuple[str, Tensor, Sequence[Tensor], Any]]] = {
    "fused_all_gather_matmul": lambda args: ("all-gather", args[0], args[1], args[3]),
    "fused_matmul_reduce_scatter": lambda args: ("reduce-scatter", args[0], [args[1]], args[4]),
}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective of `size` ranks; `bytes` is the size of the whole tensor.

    An asynchronous one runs beside the product that follows. A pipelined one runs in pieces beside the pieces of the
    product that follows, which is its own.
    """

    kind: str
    bytes: int
    size: int
    is_asynchronous: bool = False
    is_pipelined: bool = False


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operator. `module` is the kind of module that it belongs to, `phase` "forward" or "backward"."""

    name: str
    kind: str
    module: str
    phase: str
    shapes: str
    bytes: float = 0.0
    flops: float = 0.0
    kernels: int = 1
    balance: float = 1.0
    product: Product | None = None
    collective: Collective | None = None


class Memory:
    """Storages that are alive, by what made them, in bytes."""

    def __init__(self) -> None:
        self._alive: dict[int, tuple[int, str]] = {}
        self.now = self.peak = 0
        self.at_peak: list[tuple[int, str]] = []  # the largest, and where they were made

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the storage of this one."""
        self._alive[tensor.untyped_storage()._cdata] = (0, "")

    def count(self, tensor: Tensor, maker: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = (storage.nbytes(), maker)
        weakref.finalize(storage, self._free, storage._cdata)
        self.now += storage.nbytes()
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, sorted(self._alive.values(), reverse=True)[:10]

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]


class Recorder(TorchDispatchMode):
    """Within it, operators on meta tensors are recorded in `ops`. Collectives exchange nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.phase = "forward"
        self.memory = Memory()
        self.kept: dict[str, int] = {}  # bytes of activations that the backward needs, by module
        self._modules: list[str] = []  # that run now, innermost last
        self._first_nodes: list[int] = []  # autograd's sequence numbers at which they began
        self._made_by: dict[int, str] = {}  # the module of every autograd node
        self._seen: set[int] = set()
        self._last = ""

    def watch(self, stage: nn.Module, kinds: Callable[[str, nn.Module], str]) -> None:
        """Attribute what this stage's modules do to `kinds(path, module)`."""
        for parameter in stage.parameters():
            self.memory.ignore(parameter)
            self._seen.add(parameter.untyped_storage()._cdata)
        for path, module in stage.named_modules():
            if path:
                kind = kinds(path, module)
                module.register_forward_pre_hook(lambda *_, kind=kind: self.enter(kind))
                module.register_forward_hook(lambda _module, _args, output: self.leave(output))

    def enter(self, kind: str) -> None:
        """Attribute what runs from here until `leave` to `kind`."""
        self._modules.append(kind)
        self._first_nodes.append(torch._C._autograd._get_sequence_nr())

    def leave(self, output: Any) -> None:
        """The autograd nodes since `enter` that no inner module has claimed belong to the module."""
        kind, first = self._modules.pop(), self._first_nodes.pop()
        nodes = [tensor.grad_fn for tensor in _tensors(output)]
        while nodes:
            node = nodes.pop()
            if node is None or "AccumulateGrad" in node.name():
                continue
            number = node._sequence_nr()
            if number >= first and number not in self._made_by:
                self._made_by[number] = kind
                nodes += [following for following, _ in node.next_functions]

    def module(self) -> str:
        """Return the kind of module that runs now, in the backward pass by autograd's node."""
        if self._modules:
            return self._modules[-1]
        node = torch._C._current_autograd_node()
        if node is not None:
            if "AccumulateGrad" in node.name():
                return "main_grad"
            self._last = self._made_by.get(node._sequence_nr(), self._last)
        return self._last

    def keep(self, tensor: Tensor) -> Tensor:
        """Hook of `saved_tensors_hooks`: an activation, counted once, that the backward needs."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" and storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.kept[self.module()] = self.kept.get(self.module(), 0) + storage.nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            return self._exchange(name, func, args, kwargs)
        if namespace == "symm_mem":
            return self._pipelined(name, func, args, kwargs)
        results = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(results)
        if any(tensor.device.type == "meta" for tensor in outputs or inputs):  # some return nothing
            if not (func.is_view or name.startswith(("empty", "new_empty", "_reshape_alias", "_unsafe_view"))):
                self.ops.append(self._op(func, name, args, kwargs, inputs, outputs))
            for tensor in outputs:
                self.memory.count(tensor, f"{self.phase}, {self.module()}: {name}")
        return results

    def _op(self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Op:
        module = self.module()
        shapes = " ".join(f"{str(tensor.dtype)[6:]}{list(tensor.shape)}" for tensor in inputs[:4])
        cost = COSTS.get(func._schema.name)
        if cost is not None:
            stated = cost(args, tuple(outputs))
            return Op(
                name=func._schema.name, kind=stated.kind, module=module, phase=self.phase, shapes=shapes,
                bytes=stated.bytes, flops=stated.flops, kernels=stated.kernels, balance=stated.balance,
                product=stated.product,
            )  # fmt: skip
        assert not func._schema.name.startswith(NAMESPACE), f"{func._schema.name} states no cost"
        product, flops, moved = None, 0.0, _moved(name, args, kwargs, inputs, outputs)
        if name in _PRODUCTS:
            product = _product(*(args[:2] if name in ("mm", "bmm") else args[1:3]))
            flops = product.flops
            if name in ("baddbmm", "addmm") and args[0].ndim > 1 and kwargs.get("out") is not args[0]:
                moved += 2 * touched(outputs)  # the addend is copied to the result first, which is then read
        return Op(
            name=name, kind=_kind(name, module, self.phase), module=module, phase=self.phase, shapes=shapes,
            bytes=moved, flops=flops, product=product,
        )  # fmt: skip

    def _pipelined(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A product of PyTorch's over symmetric memory, in one piece per rank, and its collective."""
        results = func(*args, **kwargs)
        kind, given, matrices, group = _PIPELINED[name](args)
        size = _resolve_process_group(group).size()
        whole = results[0] if kind == "all-gather" else results
        rows = given.numel() // given.shape[-1] * (size if kind == "all-gather" else 1)
        moved = whole.numel() * whole.element_size() * (1 if kind == "all-gather" else size)
        collective = Collective(kind=kind, bytes=moved, size=size, is_pipelined=True)
        module, phase = self.module(), self.phase
        shapes = f"{moved / 1e6:.1f} MB over {size} ranks"
        self.ops.append(
            Op(name=kind, kind="communication", shapes=shapes, collective=collective, module=module, phase=phase)
        )
        for matrix in matrices:
            product = Product(m=rows, k=matrix.shape[0], n=matrix.shape[1])
            moved = given.element_size() * (rows * (product.k + product.n) + product.k * product.n)
            shapes = f"[{rows}, {product.k}] x [{product.k}, {product.n}]"
            self.ops.append(
                Op(
                    name=name, kind="products", shapes=shapes, bytes=moved, flops=product.flops, kernels=size,
                    product=product, module=module, phase=phase,
                )
            )  # fmt: skip
        for tensor in _tensors(results):
            self.memory.count(tensor, f"{self.phase}, {self.module()}: {name}")
        return results

    def _exchange(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        from torch._C._distributed_c10d import FakeWork

        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        size = dist.ProcessGroup.unbox(given["process_group"]).size()
        full = max(tensor.numel() * tensor.element_size() for tensor in _tensors(args))
        if size > 1:
            # The dispatcher leaves out an argument that has its default, which is asynchronous.
            is_asynchronous = bool(given.get("async_op", given.get("asyncOp", True)))
            kind = _COLLECTIVES.get(name, name)
            self.ops.append(
                Op(
                    name=kind, kind="communication", module=self.module(), phase=self.phase,
                    shapes=f"{full / 1e6:.1f} MB over {size} ranks",
                    collective=Collective(kind=kind, bytes=full, size=size, is_asynchronous=is_asynchronous),
                )
            )  # fmt: skip
        work = FakeWork().boxed()
        if name in ("allreduce_", "broadcast_"):
            return given["tensors"], work
        if name == "_allgather_base_" or name == "_reduce_scatter_base_":
            return given["output_tensor"], work
        if name == "allgather_":
            return given["output_tensors"], work
        assert len(func._schema.returns) == 1, f"{name}: a collective that is not known here"
        return work


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _product(a: Tensor, b: Tensor) -> Product:
    return Product(batch=a.shape[0] if a.ndim == 3 else 1, m=a.shape[-2], k=a.shape[-1], n=b.shape[-1])


def _moved(name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Bytes: inputs and outputs once each, and what is changed in place twice."""
    if name in _SCATTERED:
        smaller = min(tensor.numel() for tensor in (*inputs, *outputs) if tensor.ndim)
        return 2.0 * _SECTOR * smaller
    if name in ("index_put_", "index_add_"):  # rows are added to those of a larger tensor
        return touched(inputs[1:]) + 2.0 * inputs[-1].numel() * inputs[0].element_size()
    if name == "embedding":
        return 2.0 * touched(outputs)
    if name.startswith(_MADE):
        inputs = []
    known = {id(tensor) for tensor in inputs}
    moved = touched(inputs) + touched(tensor for tensor in outputs if id(tensor) not in known)
    if name.endswith("_") and name not in _UNREAD:
        moved += touched(inputs[:1])
    return float(moved)


def _kind(name: str, module: str, phase: str) -> str:
    if name in _PRODUCTS:
        return "products"
    if module == "main_grad":
        return "gradient accumulation"
    if module == "loss":
        return "loss"
    if name in _NORMS:
        return "norm"
    if name in _REDUCTIONS:
        return "reductions"
    if name in _COPIES:
        return "casts and copies"
    if "embedding" in name or module == "embedding" or name in _SCATTERED:
        return "embedding"
    return "elementwise"
