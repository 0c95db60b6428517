"""Read clips from files: probing, scanning, decoding, windows, transforms, log-mel, loaders, synthetic data."""

from cmacc.clips.catalog.chosen import ChosenSample, keep_chosen, read_chosen
from cmacc.clips.catalog.examine import FINDINGS, Examination, Finding
from cmacc.clips.catalog.listing import LabelTable, ListedFile, Listing, ListingError, list_folders
from cmacc.clips.catalog.manifest import Manifest, ManifestError, MediaRecord, assign_split
from cmacc.clips.catalog.scan import ScanError, ScanResult, examine_files, scan
from cmacc.clips.clip import Clip, ClipBatch, ClipSpec, MediaError
from cmacc.clips.loading.loader import (
    ClipRequest,
    CoveringPlan,
    TrainingPlan,
    covering_loader,
    evaluation_loader,
    evaluation_requests,
    training_loader,
)
from cmacc.clips.loading.logmel import LogMel
from cmacc.clips.loading.transforms import (
    AugmentConfig,
    View,
    augment_video,
    augment_waveforms,
    draw_view,
    grey_video,
    mask_spectrograms,
    stretch_spectrograms,
    to_video,
    window_length,
)
from cmacc.clips.media.decoding import MediaInfo, decode_clip, decode_clips, probe
from cmacc.clips.media.film import FILM_SOUND_RATE_HZ, FilmWriter, encode_part
from cmacc.clips.packing.shards import PackError, PackResult, pack, verify
from cmacc.clips.packing.transcode import PackSettings
from cmacc.clips.parallel import workers_of
from cmacc.clips.storage import PackedSample
from cmacc.clips.windows import covering_starts

__all__ = [
    "FILM_SOUND_RATE_HZ",
    "FINDINGS",
    "AugmentConfig",
    "ChosenSample",
    "Clip",
    "ClipBatch",
    "ClipRequest",
    "ClipSpec",
    "CoveringPlan",
    "Examination",
    "FilmWriter",
    "Finding",
    "LabelTable",
    "ListedFile",
    "Listing",
    "ListingError",
    "LogMel",
    "Manifest",
    "ManifestError",
    "MediaError",
    "MediaInfo",
    "MediaRecord",
    "PackError",
    "PackResult",
    "PackSettings",
    "PackedSample",
    "ScanError",
    "ScanResult",
    "TrainingPlan",
    "View",
    "assign_split",
    "augment_video",
    "augment_waveforms",
    "covering_loader",
    "covering_starts",
    "decode_clip",
    "decode_clips",
    "draw_view",
    "encode_part",
    "evaluation_loader",
    "evaluation_requests",
    "examine_files",
    "grey_video",
    "keep_chosen",
    "list_folders",
    "mask_spectrograms",
    "pack",
    "probe",
    "read_chosen",
    "scan",
    "stretch_spectrograms",
    "to_video",
    "training_loader",
    "verify",
    "window_length",
    "workers_of",
]
