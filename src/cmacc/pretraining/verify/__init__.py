"""The certificate of ``cmacc verify``."""

from cmacc.pretraining.verify.certificate import cut, subject_of, title, verify
from cmacc.pretraining.verify.lines import Line, Subject

__all__ = ["Line", "Subject", "cut", "subject_of", "title", "verify"]
