"""Part tokens: the learned embedding of a part and of "everything else" (PartEdit, section 3.2), and their files.

A token takes the place of a text's embedding in cross-attention. Its rows are background rows and part rows; each row
has a count, how often it stands in a context of 77. A part may have several rows (a word of several text tokens), and
a token several parts (`combine`).
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CONTEXT_LENGTH = 77
PADDINGS = ("background", "none", "start", "end", "zero")

FAMILIES = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 1280: "SDXL refiner", 128: "parts-world (the demo model)"}
"""Width of the text context → the model family that has it."""


def family(width: int) -> str:
    """The model family whose text context has this width, or "unknown family"."""
    return FAMILIES.get(width, "unknown family")


@dataclass(frozen=True)
class PartToken:
    """embedding: [rows, context_dim] float32; counts: one per row; part_rows: which rows are parts; names: one per
    part row, and rows of one name are one part; info: what the file's metadata say besides (model family, layers,
    noise range, images, loss); groups: one per row, rows of one group share a softmax; empty: all rows do.
    """

    embedding: torch.Tensor
    part_rows: tuple[int, ...]
    counts: tuple[int, ...]
    names: tuple[str, ...]
    info: dict[str, str] = field(default_factory=dict)
    groups: tuple[int, ...] = ()

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
            raise ValueError(f"a part token has one name per part row; found {list(self.names)} for {len(parts)} rows")
        if self.groups and len(self.groups) != rows:
            raise ValueError(f"a part token has one group per row; found {list(self.groups)} for {rows} rows")
        for places, of_parts in self.softmaxes:
            if not of_parts or sum(map(len, of_parts)) == len(places):
                raise ValueError(
                    f"rows {places} of the part token share a softmax, which needs a part and a background"
                )
        if any(len({self._group(row) for row in part}) > 1 for part in self.parts.values()):
            raise ValueError("the rows of a part do not share a softmax")

    @property
    def width(self) -> int:
        """Width of the text context this token belongs to."""
        return self.embedding.shape[1]

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Name → rows of each part, in the order in which the parts first appear."""
        found: dict[str, tuple[int, ...]] = {}
        for name, row in zip(self.names, self.part_rows, strict=True):
            found[name] = (*found.get(name, ()), row)
        return found

    def _group(self, row: int) -> int:
        return self.groups[row] if self.groups else 0

    @property
    def softmaxes(self) -> list[tuple[list[int], list[list[int]]]]:
        """Of each softmax: its rows, and the places among them of each of its parts."""
        found = []
        for group in sorted({self._group(row) for row in range(len(self.counts))}):
            rows = [row for row in range(len(self.counts)) if self._group(row) == group]
            parts = [[rows.index(row) for row in part] for part in self.parts.values() if self._group(part[0]) == group]
            found.append((rows, parts))
        return found

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
        missing = {
            self._group(rows[0]): CONTEXT_LENGTH - sum(single[row] for row in rows) for rows, _ in self.softmaxes
        }
        missing = {group: places for group, places in missing.items() if places > 0}
        added = filler.to(self.embedding).expand(len(missing), -1)
        return replace(
            bare,
            embedding=torch.cat([self.embedding, added]),
            counts=(*single, *missing.values()),
            groups=(*self.groups, *missing) if self.groups else (),
        )


def row_counts(backgrounds: int, parts: int, length: int) -> tuple[int, ...]:
    """Counts of a token's rows, backgrounds first: the parts stand once, the backgrounds fill up `length`, as evenly as
    they can.
    """
    each, more = divmod(length - parts, backgrounds)
    return (*(each + (i < more) for i in range(backgrounds)), *(1,) * parts)


def combine(first: PartToken, second: PartToken) -> PartToken:
    """Several parts at once (PartEdit, appendix M): the rows of both tokens, [BG1, P1, BG2, P2] as the authors stack
    them, each token with its counts and in a softmax of its own, as it was trained.

    (The authors' program puts all rows into one softmax that it fills with BG1. On the demo model that hides the parts
    of all tokens but the first.) The order and the grouping of a chain do not matter. A part of `second` whose name is
    taken gets a number ("head 2"). ValueError if the tokens belong to model families of different text widths.
    """
    if first.width != second.width:
        raise ValueError(
            f"part_token_b: it is {second.width} wide ({family(second.width)}), but part_token_a is {first.width} wide "
            f"({family(first.width)}); combine tokens of one model family"
        )
    rows = len(first.counts)
    of_first = first.groups or (0,) * rows
    renamed: dict[str, str] = {}
    for name in second.parts:
        renamed[name] = _free_name(name, {*first.names, *renamed.values()})
    return PartToken(
        torch.cat([first.embedding, second.embedding]),
        (*first.part_rows, *(rows + row for row in second.part_rows)),
        (*first.counts, *second.counts),
        (*first.names, *(renamed[name] for name in second.names)),
        {key: value for key, value in first.info.items() if second.info.get(key) == value},
        (*of_first, *(max(of_first) + 1 + group for group in (second.groups or (0,) * len(second.counts)))),
    )


def _free_name(name: str, taken: Collection[str]) -> str:
    """The name itself or, if it is taken, the name with the next free number from 2 on."""
    if name not in taken:
        return name
    base = re.sub(r" \d+$", "", name)
    return next(f"{base} {i}" for i in range(2, len(taken) + 3) if f"{base} {i}" not in taken)


def from_tensor(tensor: torch.Tensor, name: str) -> PartToken:
    """A token from the authors' layout: [2, width], row 0 background (count 76), row 1 part.

    [n, 2, width] and the authors' stack of n such tokens, [2n, width], become one token of n parts: "name 1" and so on.
    """
    pairs = tensor.detach().float()
    if pairs.ndim == 2 and len(pairs) % 2 == 0:
        pairs = pairs.unflatten(0, (-1, 2)) if len(pairs) else pairs
    if pairs.ndim != 3 or pairs.shape[1] != 2 or len(pairs) == 0:
        raise ValueError(
            "a part token without metadata is a tensor [2, width], background and part, and several in one are "
            f"[n, 2, width] or [2·n, width]; found {list(tensor.shape)}"
        )
    counts = (CONTEXT_LENGTH - 1, 1)
    tokens = [
        PartToken(pair.contiguous(), (1,), counts, (own,))
        for pair, own in zip(pairs, _numbered(name, len(pairs)), strict=True)
    ]
    return reduce(combine, tokens)


def _numbered(name: str, count: int) -> list[str]:
    """The name for a single part; for several, "name 1", "name 2" and so on."""
    return [name] if count == 1 else [f"{name} {i + 1}" for i in range(count)]


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> PartToken:
    """One token of several parts from several tokens, each [2, width] or [1, 2, width]; their keys name the parts.

    ValueError, which names a key, if one of them is no token or they do not belong together.
    """
    tokens = []
    for name, tensor in tensors.items():
        _check_tensor(tensor, repr(name))
        if not _is_one_token(tensor.shape):
            raise ValueError(
                f"its tensor {name!r} has the shape {list(tensor.shape)}; where a file holds several part tokens, each "
                "is [2, width], background and part"
            )
        tokens.append(from_tensor(tensor, name))
    widths = {name: token.width for name, token in zip(tensors, tokens, strict=True)}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{name!r} is {width} ({family(width)})" for name, width in widths.items())
        raise ValueError(f"its part tokens differ in width: {found}; those of one file belong to one model family")
    return reduce(combine, tokens)


def _is_one_token(shape: Sequence[int]) -> bool:
    return tuple(shape[:-1]) in ((2,), (1, 2))


def _check_tensor(tensor: object, what: str) -> None:
    """ValueError unless `tensor` is an ordinary tensor of floating-point numbers."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{what} is not a part token: a floating-point tensor [2, width] was expected")
    if not tensor.is_floating_point():
        raise ValueError(f"{what} holds {tensor.dtype}; floating-point numbers are needed")
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{what} is a {tensor.layout} tensor on {tensor.device}; an ordinary tensor is needed")


def load(path: Path) -> PartToken:
    """Read a token from `.safetensors` (key `embedding`) or the authors' raw `.pt` tensor.

    A file of several tokens (see `from_tensor`, `from_tensors`) gives one token of several parts. Nothing in the file
    is executed: `.pt` files go through PyTorch's weights-only reader. ValueError, with the file's name, if it is
    truncated, is no token, or would need code to run.
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
                if len(keys) < 2 or not any(_is_one_token(file.get_slice(key).get_shape()) for key in keys):
                    raise ValueError(f"it holds no tensor named 'embedding'; found: {_some(keys)}")
                return from_tensors({key: file.get_tensor(key) for key in keys})
            embedding = file.get_tensor("embedding").clone()  # at an even address: products have the same bits then
    except SafetensorError as error:
        raise ValueError(f"it is not a whole safetensors file ({error})") from error
    _check_tensor(embedding, "'embedding'")
    if "part_rows" not in metadata:
        return from_tensor(embedding, path.stem)
    try:
        parts = tuple(int(p) for p in json.loads(metadata["part_rows"]))
        counts = tuple(int(c) for c in json.loads(metadata["count"]))
        groups = tuple(int(g) for g in json.loads(metadata.get("groups", "[]")))
        names = tuple(str(n) for n in json.loads(metadata.get("names", json.dumps(_numbered(path.stem, len(parts))))))
    except (TypeError, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"its metadata 'part_rows', 'count', 'names' or 'groups' are not JSON lists ({error})"
        ) from error
    info = {k: v for k, v in metadata.items() if k not in ("part_rows", "count", "names", "groups")}
    return PartToken(embedding.float(), parts, counts, names, info, groups)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") if keys else "nothing"


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
        shapes = [value.shape for value in content.values() if isinstance(value, torch.Tensor)]
        if "embedding" not in content and len(content) > 1 and any(map(_is_one_token, shapes)):
            return from_tensors({str(key): value for key, value in content.items()})
        content = content.get("embedding")
    _check_tensor(content, "it")
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
    if token.groups:
        metadata["groups"] = json.dumps(token.groups)
    save_file({"embedding": token.embedding.float().contiguous()}, str(path), metadata)
