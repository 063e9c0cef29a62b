"""CPAM on a running UNet, and prompts that hold for regions: one OUTER_SAMPLE wrapper for all of a model's patches.

Self-attention of the edit's rows is divided by a mask between their own keys and those of the source's background,
cross-attention between the edit prompt and another one (CPAM, section 4). The source rides along as one row a step
without guidance (see `rider.py`), whatever the number of edits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..cpam import FollowingMask, divided, keys_at, word_attention
from ..run_log import RunLog
from ..trajectory import Conditioning, Trajectory, same_level
from .attention import Replacement, attention, check_places, replace_attention
from .capture import spatial_size
from .evaluation import Area, ConditionKey, Evaluation
from .layer_masks import LayerMask
from .layers import Address, LayerTable, address_of, layer_table
from .replay import check_latent_size
from .rider import Rider

KEY = "scalpel.cpam"


@dataclass(frozen=True)
class SelfAttentionSpec:
    """source_mask: where the source's keys are not background, binary; target_mask: where the edit attends to itself,
    0…1; each [1 or images, H, W]. remove: it attends to the source's background everywhere. keep_from: (step, layer),
    from which on the edit attends, inside target_mask, to the source's keys there; None: never. plain_fraction: share
    of the layers, drawn anew each step, that stay ordinary. generous: a layer's cell is no background if any pixel in
    it is none, rather than one certain pixel.
    """

    trajectory: Trajectory
    source_mask: torch.Tensor
    target_mask: torch.Tensor
    remove: bool
    keep_from: tuple[int, int] | None
    plain_fraction: float
    seed: int
    log: RunLog = field(compare=False)
    generous: bool = False


@dataclass(frozen=True)
class Region:
    """Where the positive prompt is another one. mask: [1 or n, H, W] in 0…1."""

    mask: torch.Tensor
    prompt: Conditioning


@dataclass(frozen=True)
class FollowSpec:
    """Refining the target mask from the last layer of step `from_step` − 1 on. words: places of the prompt's words in
    its context; None: all but the first.
    """

    from_step: int
    threshold: float
    words: tuple[int, ...] | None


@dataclass(frozen=True)
class CrossAttentionSpec:
    """Outside target_mask [1 or images, H, W] the positive prompt is `null`."""

    null: Conditioning
    target_mask: torch.Tensor
    follow: FollowSpec | None
    log: RunLog = field(compare=False)


@dataclass(frozen=True)
class Spec:
    """All that a model's runs do."""

    self_attention: SelfAttentionSpec | None = None
    cross_attention: CrossAttentionSpec | None = None
    regions: tuple[Region, ...] = ()


def spec_of(model: Any) -> Spec:
    """What the MODEL already does."""
    wrappers = model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(KEY, [])
    return wrappers[0].spec if wrappers else Spec()


def patched(model: Any, **changes: Any) -> Any:
    """A clone of the MODEL whose spec has these fields."""
    spec = replace(spec_of(model), **changes)
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, CPAM(spec))
    return clone


class CPAM:
    """OUTER_SAMPLE wrapper: makes one run's state, lets the sampler run, and writes the logs."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __call__(self, executor: Any, noise: torch.Tensor, latent: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        run = CPAMRun(self.spec, executor.class_obj, sigmas, sampler, (noise.shape[-2], noise.shape[-1]))
        try:
            result = executor(noise, latent, sampler, sigmas, *args, **kwargs)
            run.finish()
        finally:
            run.release()
        return result


class CPAMRun:
    """State of one sampling run. following: the target mask once it has been refined, [rows, h, w] of the latent;
    followed: what it was when this evaluation of the model began.
    """

    def __init__(self, spec: Spec, guider: Any, sigmas: torch.Tensor, sampler: Any, latent: tuple[int, int]) -> None:
        if spec.self_attention is not None:
            check_latent_size(spec.self_attention.trajectory, latent)
        self.spec = spec
        self.latent = latent
        self.table: LayerTable = layer_table(guider.model_patcher)
        self.order = {address: place for place, address in enumerate(self.table.layers)}
        self.evaluation = Evaluation(guider, sigmas, KEY)
        self.following: LayerMask | None = None
        self.followed: LayerMask | None = None
        self.lengths: dict[ConditionKey, int] = {}  # of the prompts, in tokens
        self.targets: dict[int, torch.Tensor] = {}  # by step, where it was refined
        options = guider.model_options.setdefault("transformer_options", {})
        self.evaluation.listeners.append(self._begin)
        self.evaluation.install(options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self._install, options)
        self.cross = _CrossAttention(self) if spec.cross_attention or spec.regions else None
        self.own = _SelfAttention(self, spec.self_attention) if spec.self_attention else None
        if self.own is not None:
            self.own.rider.install(guider, sigmas, sampler)

    def _begin(self, _: torch.Tensor) -> None:
        self.followed = self.following  # uncond may be called after cond has refined it, or before

    def _install(
        self, executor: Any, model: Any, conds: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any
    ) -> Any:
        """CALC_COND_BATCH: around what replaces attention in this very call, as PAG does for its own."""
        self.lengths = {
            (entry["uuid"], place): entry["model_conds"]["c_crossattn"].cond.shape[1]
            for place, entries in enumerate(conds)
            for entry in entries or ()
        }
        options = dict(model_options.get("transformer_options", {}))
        if self.own is not None:
            replace_attention(options, "attn1", self.table, self.own)
        if self.cross is not None:
            replace_attention(options, "attn2", self.table, self.cross)
        return executor(model, conds, x, timestep, {**model_options, "transformer_options": options})

    def follow(self, mask: torch.Tensor) -> None:
        """From now on the target mask is this one, [rows, h, w] of the latent."""
        self.following = LayerMask(mask, self.latent, "refined mask")
        self.targets[self.evaluation.step] = mask.cpu()

    def release(self) -> None:
        """Let go of the source's keys and values; the run's parts hold each other, and wait for Python's collector."""
        self.evaluation.listeners.clear()
        if self.own is not None:
            self.own.references.clear()

    def finish(self) -> None:
        """Fill the logs with the target mask of each step."""
        self.evaluation.finish()
        for part in (self.spec.self_attention, self.spec.cross_attention):
            if part is not None and self.evaluation.steps:
                masks = self._masks(part.target_mask)
                part.log.masks = masks
                part.log.lines = [
                    f"step {step + 1}: target mask on {100 * float(mask.mean()):.1f} % of the picture"
                    for step, mask in enumerate(masks.unbind(1))
                ]

    def _masks(self, given: torch.Tensor) -> torch.Tensor:
        """[rows, steps, h, w]: the target mask that each step ended with."""
        whole = F.interpolate(given[:, None].float().cpu(), self.latent, mode="nearest")[:, 0]
        steps, now = [], whole
        for step in range(self.evaluation.steps):
            now = self.targets.get(step, now)
            steps.append(now)
        rows = max(map(len, steps))
        return torch.stack([mask[[row % len(mask) for row in range(rows)]] for mask in steps], 1)


@dataclass(frozen=True)
class _Reference:
    """The source's keys and values [images, h·w, C] at a layer of `size` (h, w)."""

    k: torch.Tensor
    v: torch.Tensor
    size: tuple[int, int]

    def attend(self, images: list[int], places: torch.Tensor, options: dict[str, Any]) -> Any:
        """A function of queries, one row for each of `images`: their attention to these places of the source."""
        k, v = keys_at(self.k[images], self.v[images], places)
        return lambda queries, _: attention(queries, k, v, options)


class _SelfAttention:
    """attn1 of every layer."""

    def __init__(self, run: CPAMRun, spec: SelfAttentionSpec) -> None:
        self.run = run
        self.spec = spec
        self.rider = Rider(spec.trajectory, spec.trajectory.positive, KEY)
        self.source = LayerMask(spec.source_mask, run.latent, "source_mask", spec.generous)
        self.target = LayerMask(spec.target_mask, run.latent, "target_mask")
        generator = torch.Generator().manual_seed(spec.seed)
        self.plain = torch.rand(run.evaluation.steps, len(run.table), generator=generator) < spec.plain_fraction
        self.references: dict[Address, _Reference] = {}

    def __call__(
        self, inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        run, address = self.run, address_of(options)
        layer, step, size = run.order[address], run.evaluation.step, spatial_size(options)
        check_places(options, q, k)
        if self.plain[step, layer]:
            return (inner or attention)(q, k, v, options)
        out = torch.empty_like(q) if inner is None else inner(q, k, v, options).clone()
        target = run.followed or self.target
        keep = self.spec.keep_from is not None and step >= self.spec.keep_from[0] and layer >= self.spec.keep_from[1]
        groups: dict[tuple[Area, int, int], list[tuple[int, int]]] = {}  # rows with equal masks: (row, its image)
        for key, rows in run.evaluation.chunks(len(q), options):
            if self.rider.is_source(key[0]):
                self.references[address] = _Reference(k[rows].clone(), v[rows].clone(), size)
                if inner is None:
                    out[rows] = attention(q[rows], k[rows], v[rows], options)
                continue
            images = self.spec.trajectory.image_of(rows.stop - rows.start)
            for place, image in enumerate(images):
                masks = (run.evaluation.areas.get(key), target.number(place), self.source.number(place))
                groups.setdefault(masks, []).append((rows.start + place, image))
        for (area, own, kept), members in groups.items():
            numbers, images = (list(column) for column in zip(*members, strict=True))
            given = None if inner is None else out[numbers]
            ordinary = self._ordinary(k[numbers], v[numbers], given, options)
            source = self.references[address]
            background = self.source.at(kept, None, source.size, q.device)[1]
            from_background = source.attend(images, background.most, options)
            if self.spec.remove:
                out[numbers] = from_background(q[numbers], None)
                continue
            inside, outside = target.at(own, area, size, q.device)
            if keep:
                object_there = target.at(own, None, source.size, q.device)[0]
                ordinary = source.attend(images, object_there.most, options)
            out[numbers] = divided(q[numbers], (inside, ordinary), (outside, from_background))
        return out

    @staticmethod
    def _ordinary(k: torch.Tensor, v: torch.Tensor, given: torch.Tensor | None, options: dict[str, Any]) -> Any:
        """Attention of queries to their own rows' keys, or what another node's replacement has `given`."""
        if given is not None:
            return lambda _, places: given[:, places]
        return lambda queries, _: attention(queries, k, v, options)


class _CrossAttention:
    """attn2 of every layer, for the positive prompt."""

    def __init__(self, run: CPAMRun) -> None:
        self.run = run
        self.spec = run.spec.cross_attention
        self.regions = [(LayerMask(one.mask, run.latent, "region"), one.prompt[0][0]) for one in run.spec.regions]
        self.target = LayerMask(self.spec.target_mask, run.latent, "target_mask") if self.spec else None
        self.follow = self.spec.follow if self.spec else None
        self.mask = FollowingMask(self.follow.threshold) if self.follow else None
        self._sigma = float("nan")  # of the evaluation before: none
        self._again: bool | None = None  # a noise level has begun: another, or the same once more
        run.evaluation.listeners.append(self._begin)

    def _begin(self, _: torch.Tensor) -> None:
        now = self.run.evaluation
        if not now.again:
            self._again = same_level(now.sigma, self._sigma)
        self._sigma = now.sigma

    def __call__(
        self, inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        now, run = self.run.evaluation, self.run
        check_places(options, q)
        out = attention(q, k, v, options) if inner is None else inner(q, k, v, options).clone()
        for key, rows in run.evaluation.chunks(len(q), options):
            if key not in now.positive:
                continue
            if self.mask is not None and key in now.whole and now.areas[key] is None and not now.again:
                self._follow(q[rows], k[rows, : run.lengths[key]], options)
            for mask, prompt in self.regions:
                self._use(out[rows], q[rows], mask, 0, prompt, now.areas[key], options)
            if self.spec is not None:
                assert self.target is not None
                null = self.spec.null[0][0]
                self._use(out[rows], q[rows], run.following or self.target, 1, null, now.areas[key], options)
        return out

    def _use(
        self, out: torch.Tensor, q: torch.Tensor, mask: LayerMask, side: int, prompt: torch.Tensor, area: Area,
        options: dict[str, Any],
    ) -> None:  # fmt: skip
        """Inside the mask (side 0) or outside it (1) an entry's rows of `out` attend to another prompt."""
        layer = self.run.table[address_of(options)].block.attn2
        context = prompt.to(q)
        keys, values = layer.to_k(context), layer.to_v(context)
        for row in range(len(q)):
            share = mask.at(mask.number(row), area, spatial_size(options), q.device)[side]
            if len(share.some):
                own = slice(row % len(keys), row % len(keys) + 1)
                local = attention(q[row : row + 1, share.some], keys[own], values[own], options)[0]
                out[row, share.some] = out[row, share.some].lerp(local, share.weight[share.some, None].to(out))

    def _follow(self, q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> None:
        """Add this layer's map; in the last layer of a step the target mask is made of all there are so far."""
        assert self.mask is not None
        assert self.follow is not None
        run, layers = self.run, len(self.run.table)
        address = address_of(options)
        done = run.order[address] + 1
        if run.evaluation.step * layers + done < self.follow.from_step * layers:
            return
        words = self.follow.words or range(min(1, k.shape[1] - 1), k.shape[1])
        if max(words) >= k.shape[1]:
            raise ValueError(
                f"text: it has a word at place {max(words)}, but the positive prompt of the sampler has {k.shape[1]} "
                "places; give CPAM Cross-Attention the text of that prompt"
            )
        if self._again is not None:  # only now: an extra pass without the positive prompt (SAG) has no maps
            self.mask.next_level(again=self._again)
            self._again = None
        attended, largest = word_attention(q, k, list(words), run.table[address].heads)
        self.mask.add(attended.unflatten(-1, spatial_size(options)), largest, run.latent)
        if done == layers:
            found = self.mask.mask()
            assert found is not None
            run.follow(found)
