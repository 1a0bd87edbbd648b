"""The lab: what the cases of one run share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantgate.measuring.capture import Capture
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.reference import Head, read_head
from quantgate.measuring.reference_device import CPU, choose_device, free_memory
from quantgate.measuring.scratch import scratch_directory
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import context_length
from quantgate.subject.probe import Probe, ScoredProbe, probe_for
from quantgate.subject.task import GENERATE
from quantgate.subject.tier import Tier
from quantgate.subject.windows import for_tier, long_contexts


@dataclass(eq=False)
class Lab:
    """What the cases of one run share."""

    probes: Callable[[Checkpoint, bool], Probe]
    """The probe of a checkpoint, in token ids of the tokenizer that it was made with; the larger
    one if the second argument is true. `stored_probe` is one."""
    ledger: Ledger
    reference_device: str | None = None
    """"cpu" or "cuda"; None: a GPU where there is one."""
    tier: Tier | None = None
    """How much is asked; None: what each checkpoint's file asks."""
    served_again: Callable[[Any], Sequence[Probe]] = lambda _: ()
    """The probes that a `Case`'s `reruns` will be asked for: an engine that can serve them does so
    before it ends."""
    _probes: dict[tuple[str, bool], Probe] = field(default_factory=dict)
    _scored: dict[tuple[str, str], ScoredProbe] = field(default_factory=dict)
    """By checkpoint, and by what it is scored for."""
    _heads: dict[Path, Head] = field(default_factory=dict)
    """The most recently used ones, the latest at the end."""
    _scratch: Path | None = None
    """Where captures are stored; removed with this object, or with the process."""

    @property
    def device(self) -> str:
        """The device that references and heads are computed on."""
        return choose_device(self.reference_device)

    def probe_of(self, checkpoint: Checkpoint, *, quality: bool = False) -> Probe:
        """Return the part of the probe that the tier scores, in the checkpoint's token ids.

        A base is scored on the same ones. In the quick tier a model that generates is scored once:
        on one probe for everything.
        """
        tier = self.tier_of(checkpoint)
        larger = quality and (tier != "quick" or checkpoint.task != GENERATE)
        probe = for_tier(self._whole(checkpoint, larger), tier)
        return self._noted(checkpoint, "quality" if larger else "everything", probe)

    def scored_of(self, checkpoint: Checkpoint) -> tuple[ScoredProbe, ...]:
        """Return what a checkpoint has been scored on so far, each probe once."""
        own = (probe for (name, _), probe in self._scored.items() if name == _name_of(checkpoint))
        return tuple(dict.fromkeys(own))

    def tier_of(self, checkpoint: Checkpoint) -> Tier:
        """Return how much is asked of a checkpoint."""
        return self.tier or checkpoint.tier

    def long_contexts_of(self, checkpoint: Checkpoint) -> Probe | None:
        """Return the probe's long contexts that fit the model, in the checkpoint's token ids."""
        most = context_length(checkpoint.directory)
        long = long_contexts(self._whole(checkpoint, False), most)
        return None if long is None else self._noted(checkpoint, "long contexts", long)

    def _noted(self, checkpoint: Checkpoint, purpose: str, probe: Probe) -> Probe:
        key = (_name_of(checkpoint), purpose)
        if key not in self._scored:
            self._scored[key] = ScoredProbe.of(probe)
        return probe

    def _whole(self, checkpoint: Checkpoint, quality: bool) -> Probe:
        key = (_name_of(checkpoint), quality)
        if key not in self._probes:
            probe = self.probes(checkpoint, quality)
            self._probes[key], note = probe_for(probe, checkpoint.directory)
            self.ledger.notes += [note] if note else []
        return self._probes[key]

    def forget_others(self, checkpoint: Checkpoint) -> None:
        """Drop other checkpoints' measurements from memory, and their captures from disk.

        Measurements that the checkpoint or its base shares with them are kept.
        """
        base = checkpoint.base_checkpoint
        for found in self.ledger.forget_others(
            {one.directory for one in (checkpoint, base) if one is not None}
        ):
            if isinstance(found, Capture):
                shutil.rmtree(found.directory, ignore_errors=True)

    def head(self, directory: Path) -> Head:
        """Return a checkpoint's head; only a checkpoint's and its base's stay in memory."""
        head = self._heads.pop(directory, None)
        self._heads[directory] = head or read_head(directory, self.device)
        if len(self._heads) > 2:
            self._heads.pop(next(iter(self._heads)))
        return self._heads[directory]

    def make_room(self) -> None:
        """Free the GPU for the engine that is about to start; heads are read again afterwards."""
        if self.device != CPU:
            self._heads.clear()
            free_memory(self.device)

    def capture_directory(self) -> Path:
        """Return a new directory for a capture."""
        if self._scratch is None:
            self._scratch = scratch_directory(self)
        return Path(tempfile.mkdtemp(dir=self._scratch))


def _name_of(checkpoint: Checkpoint) -> str:
    """Return the id of a checkpoint; a base has that of the checkpoint compared with it."""
    return checkpoint.id.removesuffix("-base") if checkpoint.is_base else checkpoint.id
