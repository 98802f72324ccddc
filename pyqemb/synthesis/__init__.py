"""Synthetic training data: a language model writes queries for passages."""

from pyqemb.synthesis.config import SynthesisConfig as SynthesisConfig
from pyqemb.synthesis.generate import Synthesis as Synthesis
from pyqemb.synthesis.generate import synthesize as synthesize
