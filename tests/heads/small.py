"""Small rows and sizes for the tests of CMBS and CACE-Net."""

import torch
from torch import Tensor

from cmacc.heads.event_attention import StreamConfig

Rows = dict[str, Tensor]
CLASSES = 3
STREAMS = StreamConfig(
    attention_width=12,
    attention_hidden=6,
    key_width=4,
    model_width=12,
    encoder_layers=1,
    encoder_feedforward=16,
    decoder_feedforward=16,
    heads=2,
    fusion_heads=2,
    input_dropout=0.0,
    attention_dropout=0.1,
    dropout=0.0,
)
LABELS = torch.tensor([[3, 1, 1, 1, 3], [2, 2, 2, 2, 2], [3, 3, 3, 3, 3]])


def random_rows(labels: Tensor = LABELS, places: int = 2) -> Rows:
    shape = labels.shape
    return {
        "video": torch.randn(*shape, places, 5, dtype=torch.float64),
        "audio": torch.randn(*shape, 4, dtype=torch.float64),
        "labels": labels,
    }
