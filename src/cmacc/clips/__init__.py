"""Files to clips: probe, scan, decode, windows, transforms, log-mel, loader, the synthetic world."""

from cmacc.clips.clip import Clip, ClipBatch, ClipSpec
from cmacc.clips.container import MediaError
from cmacc.clips.loader import (
    ClipRequest,
    TrainingPlan,
    evaluation_loader,
    evaluation_requests,
    training_loader,
)
from cmacc.clips.logmel import LogMel
from cmacc.clips.manifest import Manifest, ManifestError, MediaRecord, assign_split
from cmacc.clips.media import MediaInfo, decode_clip, decode_clips, probe
from cmacc.clips.scan import LabelTable, ScanError, ScanResult, scan
from cmacc.clips.storage import PackedSample
from cmacc.clips.transforms import (
    AugmentConfig,
    View,
    augment_video,
    augment_waveforms,
    draw_view,
    grey_video,
    mask_spectrograms,
    to_video,
)

__all__ = [
    "AugmentConfig",
    "Clip",
    "ClipBatch",
    "ClipRequest",
    "ClipSpec",
    "LabelTable",
    "LogMel",
    "Manifest",
    "ManifestError",
    "MediaError",
    "MediaInfo",
    "MediaRecord",
    "PackedSample",
    "ScanError",
    "ScanResult",
    "TrainingPlan",
    "View",
    "assign_split",
    "augment_video",
    "augment_waveforms",
    "decode_clip",
    "decode_clips",
    "draw_view",
    "evaluation_loader",
    "evaluation_requests",
    "grey_video",
    "mask_spectrograms",
    "probe",
    "scan",
    "to_video",
    "training_loader",
]
