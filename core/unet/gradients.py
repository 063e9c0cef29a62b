"""Gradients through ComfyUI's models inside its server.

ComfyUI runs nodes, and loads weights, under `torch.inference_mode()`. Autograd refuses to keep such tensors for the
backward pass, frozen or not. Here every one of them reaches torch as an ordinary tensor over the same memory: nothing
is copied and no module is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def gradients() -> Iterator[None]:
    """Inside, gradients are computed whatever the mode outside, inference tensors may take part, and modules'
    parameters are constants.
    """
    with torch.inference_mode(False), torch.enable_grad(), _OrdinaryTensors():
        yield


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that autograd accepts; a copy on devices that cannot share it."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        try:
            return torch.from_dlpack(tensor.detach())
        except (RuntimeError, BufferError, NotImplementedError, ValueError, TypeError):  # by device and version
            return tensor.clone()


class _OrdinaryTensors(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        return function(*map(_swap, args), **{name: _swap(value) for name, value in (kwargs or {}).items()})


_SWAPPED = (torch.Tensor, torch.nn.Parameter)


def _swap(value: Any) -> Any:
    """Tensors and lists of tensors; a tensor of another class (quantised weights) takes care of itself."""
    if type(value) in _SWAPPED:
        return ordinary(value) if value.is_inference() else value.detach() if type(value) is _SWAPPED[1] else value
    if type(value) in (list, tuple) and any(type(item) in _SWAPPED for item in value):
        return type(value)(map(_swap, value))
    return value
