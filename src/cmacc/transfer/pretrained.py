"""Trained encoders that can be loaded and published by name."""

import tempfile
from pathlib import Path

import torch

from cmacc.encoders import AudioVisualEncoder
from cmacc.transfer.compare import results_table
from cmacc.transfer.export import export_run, is_export, push, read_export
from cmacc.transfer.hub import local_folder
from cmacc.transfer.onnx import ExportError
from cmacc.transfer.open import card_of_run, load_pair


class PretrainedEncoder(AudioVisualEncoder):
    """The encoders of a run or an export; `cmacc.load` returns one.

    The methods do not stand in `AudioVisualEncoder` itself, because `cmacc.encoders` knows nothing of runs and exports.
    They are called like those of huggingface_hub's ``ModelHubMixin``. That class is not the base: huggingface_hub is
    optional here, and the mixin would publish encoders without the size of the clips that they were trained on.

    Parameters
    ----------
    pair
        The encoders; their modules are shared, not copied.
    folder
        The run or export that they were read from.
    """

    def __init__(self, pair: AudioVisualEncoder, folder: Path) -> None:
        super(AudioVisualEncoder, self).__init__(pair.video, pair.audio)  # whose own constructor builds new modules
        self.config = pair.config
        self.folder = folder

    @classmethod
    def from_pretrained(
        cls, name: Path | str, *, revision: str | None = None, local_files_only: bool = False
    ) -> "PretrainedEncoder":
        """Load trained encoders, on the CPU and in evaluation mode.

        Parameters
        ----------
        name
            A run or export folder; or ``user/name``, an export on the Hugging Face hub, which is downloaded if it is
            not in the hub's cache. What exists here comes first, and a `Path` is never looked up on the hub.
        revision
            Branch, tag or commit on the hub; by default, its main branch.
        local_files_only
            Whether to use only the hub's cache, as with ``HF_HUB_OFFLINE=1``.

        Raises
        ------
        ConfigError, CheckpointError, ExportError
            There is neither a run with a checkpoint nor an export, or it is damaged, or it needs newer packages, or the
            hub cannot be asked.
        """
        folder = local_folder(name, revision=revision, download=not local_files_only)
        return cls(load_pair(folder), folder).eval()

    def push_to_hub(self, repo_id: str) -> str:
        """Upload the encoders as an export, with the results in a run's card. A new repository is private.

        Parameters
        ----------
        repo_id
            ``user/name``.

        Returns
        -------
        str
            URL of the repository.

        Raises
        ------
        ExportError
            The weights are no longer those of the folder, whose steps and results are in the model card; or the folder
            is a download from the hub; or ``huggingface_hub`` is not installed.
        CardError
            The results in the run folder are not of its last checkpoint.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.folder
            if not is_export(folder):
                card = card_of_run(folder)
                results = "" if card is None else results_table(card)
                folder = export_run(folder, Path(temporary) / "export", results_markdown=results).folder
            published = read_export(folder).pair.state_dict()
            for name, value in self.state_dict().items():
                if value.dtype != published[name].dtype or not torch.equal(value.cpu(), published[name]):
                    raise ExportError(
                        f"encoder of {self.folder}: {name} must be as in that folder, whose training the model card "
                        "describes, got other values"
                    )
            return push(folder, repo_id)
