"""Attention transfer: SeT attention taught by the softmax attention it replaces.  Needs the extra `transformers`."""

from .fitting import Schedule, fit
from .hybrid import Converted, conversion_curve
from .matching import LayerMatching, OutputMatching
from .measuring import HeadError, attention_errors, output_agreement
from .recording import Recording, record_teacher
from .report import TransferReport
from .students import hybrid_of, make_student, place_references
from .transfer import Transfer, transfer_attention

__all__ = [
    "Converted",
    "HeadError",
    "LayerMatching",
    "OutputMatching",
    "Recording",
    "Schedule",
    "Transfer",
    "TransferReport",
    "attention_errors",
    "conversion_curve",
    "fit",
    "hybrid_of",
    "make_student",
    "output_agreement",
    "place_references",
    "record_teacher",
    "transfer_attention",
]
