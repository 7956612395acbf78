"""Warnings that save a night: what a run's records say when it is going wrong, each with what to do about it.

A watch sees every record that metrics.jsonl gets and nothing else, so a resumed run that feeds it the old records first
warns exactly as one that was never stopped. Each fault is told once; again after it had gone away, when it comes for
the second, fourth, eighth time and so on: thousands of iterations can have hundreds.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from spo_fast.config.methods import LN2, find_method
from spo_fast.config.training import Config
from spo_fast.training.monitor.log import Record, number

STILL_ITERATIONS, STILL = 50, 5e-4 / LN2  # the loss sits still: the mean of so many iterations is so near, relatively
REJECTED_ITERATIONS = 3
CLAMPED_ITERATIONS, CLAMPED = 3, 0.99
WINDOW, SATURATION_RISE = 20, 0.25  # iterations averaged; relative to the run's first ones
FLAT_ITERATIONS, FLAT = 3, 0.9  # so many groups of candidates have one score
DIVERSITY_FALL, OUTPUT_CHANGE = 0.5, 0.25  # relative to the run's first iterations


class Level:
    """The mean of a field's first WINDOW values, and that of its last."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def of(self, value: float | None) -> tuple[float, float] | None:
        """Both, with this value; None before there are enough, or if the first are 0."""
        if value is None:
            return None
        if len(self._first) < WINDOW:
            self._first.append(value)
        self._recent.append(value)
        first, now = (sum(values) / len(values) for values in (self._first, self._recent))
        return (first, now) if len(self._recent) == WINDOW and first > 0 else None


class Watch:
    """Feed it each record in order; it answers with the warnings that are new."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self._method = cfg, find_method(cfg.objective.method)
        self._start = self._method.start_of(cfg.flat()) if self._method.leaves_start else None
        self._rejected = self._clamped = self._flat = 0  # records in a row
        self._losses: deque[float] = deque(maxlen=STILL_ITERATIONS)
        self._told: set[str] = set()
        self._times: Counter[str] = Counter()  # that each came
        self._saturation, self._diversity, self._output = Level(), Level(), Level()
        self._next_rise = SATURATION_RISE
        self._signs: dict[str, str] = {}  # of reward hacking in the last validation, by look

    def look(self, record: Record) -> list[str]:
        """The new warnings of a record as MetricsLog writes it (None for what is not finite)."""
        found = {
            "scores": self._scores(record),
            "rejected": self._every_pair_rejected(record),
            "still": self._loss_sits_still(record),
            "clamped": self._all_clamped(record),
            "skipped": self._step_skipped(record),
            "flat": self._scores_are_flat(record),
            "diversity": self._pictures_grow_alike(record),
            "output": self._predictions_change_size(record),
            **self._signs_of_hacking(record),
        }
        new = [self._again(name, text) for name, text in found.items() if text and name not in self._told]
        self._told = {name for name, text in found.items() if text}
        rise = self._saturation_climbs(record)  # told at every further rise
        return [text for text in (*new, rise) if text]

    def _again(self, name: str, text: str) -> str:
        """The text of a fault that has come, if it is to be told."""
        self._times[name] += 1
        times = self._times[name]
        if times & (times - 1):
            return ""
        return text if times < 4 else f"{text} (the {times}th time)"

    def _scores(self, record: Record) -> str:
        if not _scores_are_lost(record):
            return ""
        return (
            "the scores are not finite, so no pair can be judged: the decoded images are broken, or the scorer is. An "
            "SDXL VAE that overflows in fp16 does this: try --mixed_precision bf16, or --scorer_dtype no"
        )

    def _every_pair_rejected(self, record: Record) -> str:
        self._rejected = self._rejected + 1 if record.get("pairs") == 0 else 0
        if self._rejected < REJECTED_ITERATIONS or _scores_are_lost(record):
            return ""
        text = f"every pair was rejected {REJECTED_ITERATIONS} iterations in a row: nothing is trained."
        gap, third = number(record, "score_gap"), number(record, "third_threshold")
        if gap is not None and third is not None:
            text += (
                f" The scores of the best and the worst of {self.cfg.sample.num_candidates} candidates differ by "
                f"{gap:.3g} on average; --threshold {third:.2g} would keep a third "
                f"of the pairs (now {self.cfg.sample.threshold:g})"
            )
        return text

    def _loss_sits_still(self, record: Record) -> str:
        if self._start is None:
            return ""
        if (loss := number(record, "loss")) is not None:
            self._losses.append(loss)
        mean = sum(self._losses) / STILL_ITERATIONS
        if len(self._losses) < STILL_ITERATIONS or abs(mean - self._start) > STILL * abs(self._start):
            return ""
        return (
            f"the loss has averaged {mean:.4f} over {STILL_ITERATIONS} iterations; a policy that has learnt nothing "
            f"has {'ln 2 = ' if self._start == LN2 else ''}{self._start:.4f}. Raise --learning_rate "
            f"(now {self.cfg.optim.learning_rate:g}), or give it more pairs a step (--gradient_accumulation_steps)"
        )

    def _all_clamped(self, record: Record) -> str:
        share = number(record, "dead")
        if share is not None:
            self._clamped = self._clamped + 1 if share >= CLAMPED else 0
        if self._clamped < CLAMPED_ITERATIONS:
            return ""
        return (
            "the probability ratios of (nearly) all pairs lie outside the clamp, where the gradient is zero: the "
            "policy is too far from the reference. Go back to an earlier checkpoint with a lower --learning_rate (now "
            f"{self.cfg.optim.learning_rate:g}), or widen --clip (now {self.cfg.objective.clip})"
        )

    def _step_skipped(self, record: Record) -> str:
        normal = 5 if "loss_scale" in record else 0  # fp16 finds its loss scale by overflowing
        steps = number(record, "nonfinite_steps") or 0
        if steps <= normal:
            return ""
        return (
            f"{steps} optimizer steps of this iteration had a gradient that was not finite and "
            f"were skipped. The run stops after {self.cfg.optim.max_nonfinite_steps} in a row"
        )

    def _scores_are_flat(self, record: Record) -> str:
        share = number(record, "flat_groups")
        if share is not None:
            self._flat = self._flat + 1 if share >= FLAT else 0
        if self._flat < FLAT_ITERATIONS:
            return ""
        return (
            f"{share or 0:.0%} of the prompts' candidates score all alike, which teaches nothing: the scorer cannot "
            "tell them apart. Raise --num_candidates, mix in another scorer, or use prompts that are not solved yet"
        )

    def _pictures_grow_alike(self, record: Record) -> str:
        found = self._diversity.of(number(record, "diversity"))
        if found is None or found[1] > found[0] * (1 - DIVERSITY_FALL):
            return ""
        return (
            f"a prompt's pictures have grown alike: their mean difference has fallen from {found[0]:.3g} to "
            f"{found[1]:.3g} since the run began (collapse). Go back to an earlier checkpoint, lower --learning_rate, "
            "or hold on to the reference"
        )

    def _predictions_change_size(self, record: Record) -> str:
        found = self._output.of(number(record, "output_rms"))
        if found is None or abs(found[1] / found[0] - 1) < OUTPUT_CHANGE:
            return ""
        return (
            f"the network's predictions have changed their size from {found[0]:.3g} to {found[1]:.3g} since the run "
            "began: pictures will be over- or underexposed. Lower --learning_rate, or hold on to the reference"
        )

    def _signs_of_hacking(self, record: Record) -> dict[str, str]:
        if "hacking" in record:  # a validation: sentences that begin with the look
            self._signs = {text.split()[0]: text for text in str(record["hacking"]).split("; ") if text}
        return {
            f"look {name}": f"in the validation pictures {text}, and not by chance: a sign of reward hacking. Compare "
            "the sample grids and what was not trained on (--validation_metrics); stop earlier, or lower "
            "--learning_rate"
            for name, text in self._signs.items()
        }

    def _saturation_climbs(self, record: Record) -> str:
        found = self._saturation.of(number(record, "saturation"))
        if found is None or found[1] < found[0] * (1 + self._next_rise):
            return ""
        first, now = found
        self._next_rise = SATURATION_RISE * (1 + (now / first - 1) // SATURATION_RISE)
        return (
            f"the images' saturation has risen by {now / first - 1:.0%} since the run began ({first:.3f} to "
            f"{now:.3f}): the scorer may like vivid colours more than people do (reward hacking). Look at the sample "
            "grids; stop earlier, lower --learning_rate, or mix scorers"
        )


def _scores_are_lost(record: Record) -> bool:
    lost = record.get("nonfinite")
    return isinstance(lost, Mapping) and "score_mean" in lost
