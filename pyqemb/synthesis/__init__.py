"""Training data out of plain passages, written by a language model."""

from pyqemb.synthesis.config import SynthesisConfig as SynthesisConfig
from pyqemb.synthesis.generate import Synthesis as Synthesis
from pyqemb.synthesis.generate import synthesize as synthesize
