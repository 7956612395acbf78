"""What one iteration costs: FLOPs and bytes by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PHASES = ("encode prompts", "rollout", "score", "reference", "backward", "step")
"""The trainer's timers. score includes decoding and is kept apart from the rollout around it."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """One iteration in which every pair is kept, and what is held throughout."""

    samples: Mapping[str, int]
    """Part -> UNet rows (a guided state is two), images decoded, images scored (by each scorer)."""
    full_flops: Mapping[str, int]
    """Part (rollout, decode, score, reference, policy) -> FLOPs; policy: forward and backward; reference: all frozen
    networks. encode images: of pairs, if no latents were kept."""
    flops_per_prompt: int
    """Of the prompt encoders and the scorers' text towers, once for each prompt of the run."""
    resident: Mapping[str, int]
    """Part -> bytes held through the training."""
    gradients: int
    """Bytes of the float32 gradients, which the backward's and the step's transients include."""
    transient: Mapping[str, int]
    """Phase -> most bytes alive at once besides the resident ones."""
    terms_per_prompt: int = 0
    """Of the loss, if every pair is kept: of a prompt's rollout."""
    unknown: tuple[str, ...] = ()
    """Scorers whose FLOPs and bytes are not known, and not counted."""
    graphs: bool = False
    """Networks are replayed as CUDA graphs, which keep what their largest call took, and the gradients."""
    inputs: int = 0
    """Bytes of what is computed of a rollout's text, which is an input of graphs: they hold a copy."""
    picture_flops: Mapping[str, int] = field(default_factory=dict)
    """Of a validation's picture: draw (its steps and its decoding), score (by what is trained on)."""

    def flops(self, valid_share: float = 1.0) -> dict[str, float]:
        """FLOPs of an iteration that keeps this share of its pairs, by part."""
        kept = {"reference", "policy"}
        return {part: n * (valid_share if part in kept else 1) for part, n in self.full_flops.items()}

    @property
    def peaks(self) -> dict[str, int]:
        """Phase -> bytes."""
        found = self.own_peaks
        if self.graphs:
            most = sum(self.resident.values()) + self.gradients + self.kept_by_graphs
            found |= dict.fromkeys(REPLAYED & found.keys(), most)
            found["step"] += self.kept_by_graphs
        return found

    @property
    def own_peaks(self) -> dict[str, int]:
        """Phase -> bytes, without what other phases' graphs keep. Prompts come before the optimizer has state, but
        those that a CPU encodes later (batches.WINDOW)."""
        held = sum(self.resident.values())
        found = {phase: held + n for phase, n in self.transient.items()}
        if self.graphs:
            found = {phase: n + self.gradients * (phase in REPLAYED - {"backward"}) for phase, n in found.items()}
        if "encode prompts" in found:
            found["encode prompts"] -= self.resident["optimizer state"]
        return found

    @property
    def replayed(self) -> dict[str, int]:
        """Phase -> bytes that its networks take of the graphs' pool (models/graphs.py); gradients lie outside."""
        inside = {"backward": self.gradients}
        return {phase: n - inside.get(phase, 0) for phase, n in self.transient.items() if phase in REPLAYED}

    @property
    def kept_by_graphs(self) -> int:
        """Bytes: what the largest replayed phase takes, since all graphs share the pool, and their inputs beside it."""
        return max(self.replayed.values(), default=0) + self.inputs if self.graphs else 0

    @property
    def peak(self) -> int:
        """The highest of them."""
        return max(self.peaks.values())


REPLAYED = {"rollout", "score", "reference", "backward"}
"""Phases whose networks CUDA graphs replay. All calls are made in one pool of memory."""
WORK = ("rollout", "score", "reference", "backward", "step")
"""The timer's phases that FLOPs are counted for."""
