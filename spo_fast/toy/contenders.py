"""What the claims compare: each contender's flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Contender:
    """How a run differs from the toy's preset."""

    settings: Mapping[str, object] = field(default_factory=dict)
    like: str = ""
    """Whose learning rate it takes; "": it has its own from the grid."""
    random_picks: bool = False
    judged: bool = True
    """It needs a preference model, whose training belongs to its cost."""
    flow: Mapping[str, object] | None = field(default_factory=dict)
    """Settings on the flow toy beside the others; None: it is refused there."""

    def on(self, size: str) -> dict[str, object] | None:
        """The settings on a toy of this size, as JSON gives them back; None where it cannot run."""
        more = self.flow if size == "flow" else {}
        return None if more is None else json.loads(json.dumps({**self.settings, **more}))


# whole trajectories take many UNet calls a prompt: fewer prompts and smaller steps give as many updates
TEN = {"num_steps": 10}  # as all others of the flow toy
FEW = {"sample_batch_size": 4}
LABELLED = {"pairs": "{pairs}", "cache_latents": False, "sample_batch_size": 64, "train_batch_size": 16}
MAIN = {
    "spo": Contender(),
    "mspo": Contender({"method": "mspo"}),
    # beta: the best of 5000 (published, for other latents), 500, 50 and 5 on the tuning prompts (benchmarks/LOG.md)
    "dpo": Contender({"method": "dpo", **LABELLED, "beta": 50.0}, judged=False),
    "ddpo": Contender({"method": "ddpo", **FEW, "train_batch_size": 20}, flow=TEN),
}
ABLATIONS = {
    "random picks": Contender(like="spo", random_picks=True),
    "winner start": Contender({"next_start": "winner"}, like="spo"),
    "loser start": Contender({"next_start": "loser"}, like="spo"),
    "blind judge": Contender({"spm_path": "{blind}", "spm_time_conditioned": False}, like="spo"),
    "PickScore": Contender({"scorer": ("pickscore",)}, like="spo"),
    "all noise levels": Contender({"branch_start": 0}, like="spo"),
}
REST = {
    "mapo": Contender({"method": "mapo", **LABELLED}, judged=False, flow=None),
    "d3po": Contender({"method": "d3po", **FEW}),
    "dpok": Contender({"method": "dpok", **FEW, "train_batch_size": 20}, like="ddpo", flow=TEN),
    "dense": Contender({"method": "dense", **FEW}),
    "gradspo": Contender({"method": "gradspo"}),
    "lpo": Contender({"method": "lpo", "lrm_path": "{lrm}"}, flow=None),
}
REINFORCEMENT = {
    "stepgrpo": Contender({"method": "stepgrpo"}),
    "grpo": Contender({"method": "grpo", **FEW, "train_batch_size": 20}),
    "nft": Contender({"method": "nft", **FEW, "train_batch_size": 20}),
    "awm": Contender({"method": "awm", **FEW, "train_batch_size": 20}),
}
# guided pictures have their layouts already, so whether a judge can raise layout is asked without guidance
EARLY = {"guidance_scale": 1.0, "branch_start": 0}
BY_NOISE = {
    "unguided": Contender(EARLY, like="spo"),
    "by noise level": Contender({**EARLY, "scorer": ("spm:1@0-500", "pickscore:1@501-1000")}, like="spo"),
}
CONTENDERS = MAIN | REINFORCEMENT | ABLATIONS | BY_NOISE | REST
