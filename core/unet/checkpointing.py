"""Gradients through ComfyUI's UNets in less memory: what is kept for them, block by block, and counted.

Autograd keeps what every operation of the forward pass needs for the backward pass. With checkpoints it keeps the input
of each block, and a block is run once more when the backward pass comes to it (Chen et al. 2016, "Training deep nets
with sublinear memory cost"). Modules get hooks for as long as that lasts; none of their attributes is replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from .gradients import gradients

# ---------------------------------------------------------------- what autograd keeps


class KeptBytes:
    """bytes: the most that was kept at one time for backward passes, each memory once, the model's weights not at all;
    now: what is kept at this moment.
    """

    def __init__(self, weights: Iterable[torch.Tensor] = ()) -> None:
        weights = list(weights)
        self.bytes = 0
        self.now = 0
        self._storages = [weight.untyped_storage() for weight in weights]
        self._weights = {_memory(storage) for storage in self._storages} | {
            w.data_ptr() for w in weights if w.data_ptr()
        }
        self._holders: dict[int, int] = {}

    def keep(self, tensor: torch.Tensor) -> Kept:
        """A handle on the tensor, counted until it is let go."""
        return Kept(tensor, self)

    def _added(self, storage: Any) -> None:
        key = _memory(storage)
        if key in self._weights:
            return
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += storage.nbytes()
            self.bytes = max(self.bytes, self.now)

    def _removed(self, storage: Any) -> None:
        key = _memory(storage)
        if key in self._holders:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self.now -= storage.nbytes()


class Kept:
    """A tensor kept for the backward pass, which must not be changed in place meanwhile."""

    def __init__(self, tensor: torch.Tensor, count: KeptBytes | None = None) -> None:
        self._tensor = tensor.detach()
        self._version = self._tensor._version
        self._needs_gradient = tensor.requires_grad
        self._count = count
        self._storage = self._tensor.untyped_storage()
        if count is not None:
            count._added(self._storage)

    def __del__(self) -> None:
        if self._count is not None:
            self._count._removed(self._storage)

    def get(self) -> torch.Tensor:
        """The tensor. RuntimeError if it was changed in place, as autograd says it."""
        if self._tensor._version != self._version:
            raise RuntimeError("a tensor that the backward pass needs has been modified by an inplace operation")
        return self._tensor

    def leaf(self) -> torch.Tensor:
        """The tensor as one that gradients end at, if they reached it in the first pass."""
        return self.get().detach().requires_grad_(self._needs_gradient)


def _memory(storage: Any) -> int:
    """What tells one memory from another; tensors on the meta device have none, but an object each."""
    return int(storage.data_ptr()) or id(storage)


@contextmanager
def counted_bytes(weights: Iterable[torch.Tensor] = ()) -> Iterator[KeptBytes]:
    """Inside, what autograd keeps is counted. weights: the model's, which are there anyway (its parameters).

    Give the result to `checkpoints`, or what their blocks keep is not counted.
    """
    count = KeptBytes(weights)
    with saved_tensors_hooks(count.keep, Kept.get):
        yield count


# ---------------------------------------------------------------- checkpoints


class Checkpoints:
    """recomputing: whether a block is now run for the second time, so that patches must have no more side effects;
    recomputed: how often that happened.
    """

    def __init__(self, count: KeptBytes | None = None) -> None:
        self.recomputing = False
        self.recomputed = 0
        self._count = count
        self._open: list[saved_tensors_hooks] = []
        self._latest: _Block | None = None

    def _enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.recomputing:
            block = _Block(self, module, args, kwargs, self._count)
            hooks = saved_tensors_hooks(block.pack, _unpack)
            hooks.__enter__()
            self._open.append(hooks)

    def _leave(self, *_: Any) -> None:
        if not self.recomputing:
            self._open.pop().__exit__()

    def _close(self) -> None:
        while self._open:  # of blocks left by what is no Exception, such as KeyboardInterrupt
            self._open.pop().__exit__()
        self._latest = None


@contextmanager
def checkpoints(
    unet: torch.nn.Module, count: KeptBytes | None = None, skip: Collection[torch.nn.Module] = ()
) -> Iterator[Checkpoints]:
    """Inside, gradients through the UNet keep its blocks' inputs alone. Run both passes inside, and inside `gradients`.

    Values and gradients stay what they were, if the blocks compute the same again: patches are called once more for
    every block, with the options of the first time. unet: a MODEL's "diffusion_model"; count: of `counted_bytes`;
    skip: blocks that keep everything. RuntimeError in the backward pass if a block's input was changed in place, or if
    the block does something else the second time.
    """
    state = Checkpoints(count)
    handles = []
    try:
        for module in blocks(unet):
            if module not in skip:
                handles.append(module.register_forward_pre_hook(state._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(state._leave, always_call=True))
        yield state
    finally:
        for handle in handles:
            handle.remove()
        state._close()


def blocks(unet: Any) -> Iterator[torch.nn.Module]:
    """What is checkpointed, in execution order: transformer blocks, residual blocks and changes of resolution."""
    for parts in parts_of(unet):
        for part in parts:
            yield from getattr(part, "transformer_blocks", (part,))


def parts_of(unet: Any) -> list[Any]:
    """The UNet's numbered blocks in execution order, each a sequence of modules."""
    middle = [] if unet.middle_block is None else [unet.middle_block]
    return [*unet.input_blocks, *middle, *unet.output_blocks]


class _AllThere(Exception):
    """Everything that the first pass had kept has been computed again."""


class _Block:
    """One call of a block in the forward pass: what it takes to make it again."""

    def __init__(
        self, owner: Checkpoints, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        count: KeptBytes | None,
    ) -> None:  # fmt: skip
        self.owner = owner
        self.module = module
        self.args = [_kept(value, count) for value in args]
        self.kwargs = {name: _kept(value, count) for name, value in kwargs.items()}
        self.size = 0  # how many tensors the first pass kept
        self.count = count
        self.again: dict[int, Kept] = {}

    def pack(self, _: torch.Tensor) -> tuple[_Block, int]:
        self.size += 1
        return self, self.size - 1

    def take(self, place: int) -> torch.Tensor:
        """What the first pass kept at this place."""
        if place not in self.again:
            if self.owner._latest is not None:
                self.owner._latest.again = {}  # what a backward pass did not want
            self.again = self._compute_again()
            self.owner._latest = self
        return self.again.pop(place).get()

    def _compute_again(self) -> dict[int, Kept]:
        found: dict[int, Kept] = {}

        def pack(tensor: torch.Tensor) -> None:
            if len(found) < self.size:
                found[len(found)] = Kept(tensor, self.count)
            if len(found) == self.size:
                raise _AllThere

        # on a GPU the backward pass has a thread of its own, with modes of its own
        with gradients(), saved_tensors_hooks(pack, _never):
            self.owner.recomputing = True
            self.owner.recomputed += 1
            try:
                self.module(*map(_again, self.args), **{name: _again(value) for name, value in self.kwargs.items()})
            except _AllThere:
                return found
            finally:
                self.owner.recomputing = False
        raise RuntimeError(
            f"{type(self.module).__name__} kept {self.size} tensors for the backward pass, and computed "
            f"{len(found)} of them again: a patch on the model does something else the second time"
        )


def _unpack(packed: tuple[_Block, int]) -> torch.Tensor:
    block, place = packed
    return block.take(place)


def _never(_: Any) -> torch.Tensor:
    raise RuntimeError("a recomputed block's own graph has no backward pass")


def _kept(value: Any, count: KeptBytes | None) -> Any:
    """Tensors without their graph; transformer options as they are now: the UNet goes on writing into them."""
    if isinstance(value, torch.Tensor):
        return Kept(value, count)
    return dict(value) if isinstance(value, dict) else value


def _again(value: Any) -> Any:
    if isinstance(value, Kept):
        return value.leaf()
    return dict(value) if isinstance(value, dict) else value
