"""The rider: a trajectory's source goes through the UNet beside whatever is being sampled, for patches to read.

An ordinary sampler knows nothing of it. The source is one more conditioning entry, shown the recorded latent instead of
the sampler's, so ComfyUI itself prepares its prompt, finds the memory for it and runs its ControlNet, if it has one.
It rides in the sampler's own UNet call where its rows are as many as each other entry's, and otherwise runs in a call
of its own just before: then N edits share it, at 1 + 2N rows a step with guidance. It has no guidance itself.
"""

from __future__ import annotations

from typing import Any

import comfy.sampler_helpers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..trajectory import Conditioning, Trajectory
from .replay import check_latent_size, playback

NOT_OF_THE_RECORD = ("control", "gligen")
"""What ComfyUI gives to every list of entries if the positive prompt has it."""
SPLITS_CALLS = ("area", "control", "gligen", "hooks", "default", "timestep_start", "timestep_end")
"""An entry with one of these may not share a UNet call with the others."""


def source_prompt(conditioning: Conditioning) -> Conditioning:
    """The first entry of a source's prompt, with which alone it is shown to the UNet.

    ValueError if it is for an area or some noise levels: nothing would tell of the source elsewhere.
    """
    options = conditioning[0][1]
    parted = options.get("start_percent", 0.0) > 0 or options.get("end_percent", 1.0) < 1
    if parted or options.get("area") is not None or options.get("mask") is not None:
        raise ValueError(
            "trajectory: its prompt is for an area of the picture or some of the steps only; record it with one for "
            "the whole"
        )
    return conditioning[:1]


class Rider:
    """One run's source.

    Patches ask `split` which rows of a UNet call are the source's. In every evaluation these come before, or together
    with, all others.
    """

    def __init__(self, trajectory: Trajectory, conditioning: Conditioning, key: str) -> None:
        """conditioning: the source's prompt (see `source_prompt`); key: names this rider among others."""
        self.trajectory = trajectory
        self.conditioning = source_prompt(conditioning)
        self.key = key
        self.riding = False
        self._entry: dict[str, Any] | None = None
        self._latent = torch.empty(0)
        self._seen = True

    def install(self, guider: Any, sigmas: torch.Tensor, sampler: Any) -> None:
        """Join the run that is about to begin: called in an OUTER_SAMPLE wrapper, ends with the run."""
        guider.conds[self.key] = comfy.sampler_helpers.convert_cond(self.conditioning)
        record = playback(self.trajectory, sigmas, sampler)

        def predict(executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            check_latent_size(self.trajectory, (x.shape[-2], x.shape[-1]))
            self._entry = self._own_entry(guider.conds[self.key][0])
            self._latent = record.next(float(timestep.flatten()[0])).to(x)
            self._seen = False
            return executor(x, timestep, *args, **kwargs)

        options = guider.model_options.setdefault("transformer_options", {})
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, self.key, predict, options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, self.key, self._evaluate, options)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, self.key, self._show, options)

    def split(
        self, rows: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor | None, list[tuple[int, torch.Tensor]]]:
        """(the source's rows [images, …] of a UNet call if it has them, all others as (entry's place among the guider's
        conds, view [edits, …])). Also of an attention output or anything else that has the call's rows.
        """
        chunks = len(options["cond_or_uncond"])
        source, others = None, []
        for uuid, place, chunk in zip(
            options["uuids"], options["cond_or_uncond"], rows.unflatten(0, (chunks, -1)), strict=True
        ):
            if self.is_source(uuid):
                source = chunk
            else:
                others.append((place, chunk))
        return source, others

    # ------------------------------------------------------------------ one evaluation

    def _own_entry(self, prepared: dict[str, Any]) -> dict[str, Any]:
        """The entry as ComfyUI prepared it, without what the record does not have."""
        own = self.conditioning[0][1]
        return {key: value for key, value in prepared.items() if key not in NOT_OF_THE_RECORD or key in own}

    def is_source(self, uuid: Any) -> bool:
        """Whether a conditioning entry is the source's."""
        return self._entry is not None and uuid == self._entry["uuid"]

    def _evaluate(
        self, executor: Any, model: Any, conds: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any
    ) -> Any:
        if self._seen:  # once more at this noise level, as a guidance's extra pass asks for: the patches still know
            return executor(model, conds, x, timestep, model_options)
        self._seen, rows = True, len(self._latent)
        self.trajectory.image_of(len(x))  # refuses batches that do not pair
        self.riding = rows == len(x) and self._fits_in(conds)
        if self.riding:
            return executor(model, [*conds, [self._entry]], x, timestep, model_options)[:-1]
        executor(model, [[self._entry]], self._latent, timestep[:1].expand(rows), model_options)
        return executor(model, conds, x, timestep, model_options)

    def _fits_in(self, conds: Any) -> bool:
        """Whether ComfyUI will put all entries into one call, or the source into the first if memory is short.

        It begins with the last entries, which the source is one of, unless they differ in what a call can hold.
        """
        entries = [entry for group in conds for entry in group or ()] + [self._entry]
        contexts = [entry["model_conds"]["c_crossattn"].cond for entry in entries]
        places = {(context.shape[1], context.device) for context in contexts}
        kinds = {tuple(sorted(entry["model_conds"])) for entry in entries}
        plain = not any(entry.get(key) is not None for entry in entries for key in SPLITS_CALLS)
        return len(places) == len(kinds) == 1 and plain

    def _show(self, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """APPLY_MODEL: the source's rows get the recorded latent in the place of the sampler's."""
        options = kwargs.get("transformer_options") or args[4]
        if self.riding and any(map(self.is_source, options["uuids"])):
            x = x.clone()
            source, _ = self.split(x, options)
            assert source is not None
            source.copy_(self._latent)
        return executor(x, *args, **kwargs)
