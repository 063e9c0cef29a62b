"""Part tokens: the learned embedding of a part and of "everything else" (PartEdit, section 3.2), and their files.

A token takes the place of a text's embedding in cross-attention. Its rows are background rows and part rows; each row
has a count, how often it stands in a context of 77.
"""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CONTEXT_LENGTH = 77
PADDINGS = ("background", "none", "start", "end", "zero")

FAMILIES = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 128: "parts-world (the demo model)"}
"""Width of the text context → the model family that has it."""


def family(width: int) -> str:
    """The model family whose text context has this width, or "unknown family"."""
    return FAMILIES.get(width, "unknown family")


@dataclass(frozen=True)
class PartToken:
    """embedding: [rows, context_dim] float32; counts: one per row; part_rows: which rows are parts; names: one per
    part; info: what the file's metadata say besides (model family, layers, noise range, images, loss).
    """

    embedding: torch.Tensor
    part_rows: tuple[int, ...]
    counts: tuple[int, ...]
    names: tuple[str, ...]
    info: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = self.embedding.shape[0] if self.embedding.ndim == 2 else 0
        if self.embedding.ndim != 2 or rows < 2 or self.embedding.shape[1] == 0:
            shape = list(self.embedding.shape)
            raise ValueError(f"a part token's embedding has the shape [rows ≥ 2, width], this one has {shape}")
        if not torch.isfinite(self.embedding).all():
            raise ValueError("the part token's embedding holds NaN or infinite values")
        parts = self.part_rows
        if not parts or len(set(parts)) != len(parts) or not all(0 <= p < rows for p in parts) or len(parts) == rows:
            raise ValueError(f"part rows {list(parts)} do not fit {rows} rows, of which one at least is background")
        if len(self.counts) != rows or any(c < 1 for c in self.counts):
            raise ValueError(f"a part token has one count ≥ 1 per row; found {list(self.counts)} for {rows} rows")
        if len(self.names) != len(parts):
            raise ValueError(f"a part token has one name per part; found {list(self.names)} for {len(parts)} parts")

    @property
    def width(self) -> int:
        """Width of the text context this token belongs to."""
        return self.embedding.shape[1]

    def padded(self, padding: str, context: torch.Tensor) -> PartToken:
        """The token with another padding of the remaining places of its 77-token context.

        padding: "background" repeats the background row (the authors' choice), "none" leaves them out, "start" and
        "end" fill them with the first and the last row of `context` [tokens, width] (the source prompt's), "zero"
        with zeros (PartEdit, appendix D).
        """
        if padding == "background":
            return self
        background = [c > 1 and i not in self.part_rows for i, c in enumerate(self.counts)]
        single = tuple(1 if b else c for b, c in zip(background, self.counts, strict=True))
        bare = replace(self, counts=single)
        if padding == "none":
            return bare
        filler = {"start": context[0], "end": context[-1], "zero": torch.zeros_like(context[0])}.get(padding)
        if filler is None:
            raise ValueError(f"unknown padding {padding!r}; known: {', '.join(PADDINGS)}")
        places = CONTEXT_LENGTH - sum(single)
        if places < 1:
            return bare
        row = filler.to(self.embedding).unsqueeze(0)
        return replace(bare, embedding=torch.cat([self.embedding, row]), counts=(*single, places))


def from_tensor(tensor: torch.Tensor, name: str) -> PartToken:
    """A token from the authors' layout: [2, width] or [1, 2, width], row 0 background (count 76), row 1 part."""
    embedding = tensor.detach().float()
    if embedding.ndim == 3 and embedding.shape[0] == 1:
        embedding = embedding[0]
    if embedding.ndim != 2 or embedding.shape[0] != 2:
        raise ValueError(
            f"a part token without metadata is a tensor [2, width] or [1, 2, width]; found {list(tensor.shape)}"
        )
    return PartToken(embedding.contiguous(), (1,), (CONTEXT_LENGTH - 1, 1), (name,))


def load(path: Path) -> PartToken:
    """Read a token from `.safetensors` (key `embedding`) or the authors' raw `.pt` tensor.

    Nothing in the file is executed: `.pt` files go through PyTorch's weights-only reader. ValueError, with the file's
    name, if it is truncated, is no token, or would need code to run.
    """
    try:
        return _load_safetensors(path) if path.suffix == ".safetensors" else _load_pt(path)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"part token file {path.name!r}: {error}") from error


def _load_safetensors(path: Path) -> PartToken:
    try:
        with safe_open(str(path), "pt") as file:
            keys = sorted(file.keys())
            metadata = file.metadata() or {}
            if "embedding" not in keys:
                raise ValueError(f"it holds no tensor named 'embedding'; found: {', '.join(keys) or 'nothing'}")
            embedding = file.get_tensor("embedding")
    except SafetensorError as error:
        raise ValueError(f"it is not a whole safetensors file ({error})") from error
    if not embedding.is_floating_point():
        raise ValueError(f"'embedding' holds {embedding.dtype}; floating-point numbers are needed")
    if "part_rows" not in metadata:
        return from_tensor(embedding, path.stem)
    try:
        parts = tuple(int(p) for p in json.loads(metadata["part_rows"]))
        counts = tuple(int(c) for c in json.loads(metadata["count"]))
        names = tuple(str(n) for n in json.loads(metadata.get("names", json.dumps([path.stem] * len(parts)))))
    except (TypeError, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"its metadata 'part_rows', 'count' or 'names' are not JSON lists ({error})") from error
    info = {k: v for k, v in metadata.items() if k not in ("part_rows", "count", "names")}
    return PartToken(embedding.float(), parts, counts, names, info)


_DAMAGE = (
    RuntimeError, EOFError, AttributeError, TypeError, LookupError, ArithmeticError, AssertionError, struct.error,
)  # fmt: skip
"""What PyTorch's reader raises on damaged files."""


def _load_pt(path: Path) -> PartToken:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds something other than tensors, which could run code; it was not loaded") from error
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"it is not a whole PyTorch file ({reason})") from error
    if isinstance(content, dict):
        content = content.get("embedding")
    if not isinstance(content, torch.Tensor) or not content.is_floating_point():
        raise ValueError("it is not a part token: a floating-point tensor [2, width] was expected")
    return from_tensor(content, path.stem)


def save(token: PartToken, path: Path) -> None:
    """Write a `.safetensors` token file with its metadata. FileExistsError if the file is already there."""
    if path.exists():
        raise FileExistsError(f"{path.name} already exists; part tokens are never overwritten")
    metadata = token.info | {
        "part_rows": json.dumps(token.part_rows),
        "count": json.dumps(token.counts),
        "names": json.dumps(token.names),
    }
    save_file({"embedding": token.embedding.float().contiguous()}, str(path), metadata)
