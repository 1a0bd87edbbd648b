"""The tiny models that the tests and the embedded suites run on: how they are made.

The corpus is standard library only; what trains and quantizes needs torch.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "fixtures" / "tiny"
