"""The memory that earlier results have left to later ones on the CPU (csrc/cpu/memory.cpp)."""

from pyqemb._C import kept_bytes as kept_bytes
from pyqemb._C import release_kept as release_kept
