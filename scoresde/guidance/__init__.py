"""Guidance: scores made from scores, sharpened or conditioned; a guided score is a score."""

from .autoguidance import Autoguidance
from .classifier import Classifier
from .classifier_free import ClassifierFree
from .energy import Energy

__all__ = ["Autoguidance", "Classifier", "ClassifierFree", "Energy"]
