"""ComfyUI nodes: what a user sees. Schema, checks of the inputs, a call into `core`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .comparison import PictureComparison
from .cpam import CPAMCrossAttnPatch, CPAMSelfAttnPatch, RegionPrompts
from .feature_blend import EditBatch, FeatureBlendSampler, FeatureBlendSamplerAdvanced
from .instdiffedit import InstDiffEditMask, InstDiffEditSampler
from .inversion import DDIMInversion, EditFriendlyInversion, LEDITSInversion, NullTextInversion
from .mag import MAGGuidance
from .masks import AdaptiveThreshold, AttentionMaskExtractor
from .part_tokens import PartTokenLoader, PartTokenSave
from .partsworld import PartsWorldLoader
from .plug_and_play import PlugAndPlayPatch
from .prompt_to_prompt import PromptToPrompt
from .run_log import RunLogShow
from .token_dataset import PartTokenDataset
from .token_making import PartTokenCombine, PartTokenFromText
from .token_training import PartTokenTrainer
from .trajectories import RecordTrajectory, ReplayTrajectory, TrajectoryLoad, TrajectorySave

NODES: list[type[io.ComfyNode]] = [
    PartsWorldLoader,
    PartTokenLoader,
    PartTokenFromText,
    PartTokenCombine,
    PartTokenDataset,
    PartTokenTrainer,
    PartTokenSave,
    AttentionMaskExtractor,
    AdaptiveThreshold,
    EditBatch,
    PromptToPrompt,
    FeatureBlendSampler,
    FeatureBlendSamplerAdvanced,
    RecordTrajectory,
    DDIMInversion,
    NullTextInversion,
    EditFriendlyInversion,
    LEDITSInversion,
    ReplayTrajectory,
    TrajectorySave,
    TrajectoryLoad,
    PictureComparison,
    CPAMSelfAttnPatch,
    CPAMCrossAttnPatch,
    RegionPrompts,
    MAGGuidance,
    PlugAndPlayPatch,
    InstDiffEditSampler,
    InstDiffEditMask,
    RunLogShow,
]


class Scalpel(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
