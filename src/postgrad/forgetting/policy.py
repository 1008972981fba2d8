"""The limits a request must keep, and the verdict on each.

What was not measured has no verdict but "not measured": without a model retrained from nothing there is no excess over
it, and a missing figure is never a pass. Accuracies are in per cent, their differences in points.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from postgrad.core.config import load_config
from postgrad.errors import ConfigError

Outcome = Literal["met", "failed", "not measured"]
JUDGED = (
    "acc_f", "acc_r", "acc_r_pretrained", "acc_o", "ap_f", "ap_r", "ap_r_pretrained", "ap_o", "mia_auc", "knn_excess",
    "probe_excess",
)  # fmt: skip
"""Figures of the model that a policy looks at."""
SINGLE = "num_single_images"
"""A figure that only requests for single images have. A model that never saw an image may name it rightly, too: they
are judged by how far they are above such a model."""
LATER = ("acc_excess_max", "mia_excess_max")
"""Limits that ledgers may lack: those written before single images could be forgotten."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What a request must reach before it counts as carried out."""

    acc_f_max: float = 1.0
    """Highest accuracy on the classes or images to forget, in per cent."""
    acc_r_min_drop: float = 2.0
    """How far the accuracy on what is kept may lie below the pretrained model's, in points."""
    acc_o_max: float = 2.0
    """Highest accuracy on what earlier requests forgot, in per cent; not asked where there are none."""
    mia_auc_band: float = 0.1
    """How far from 0.5, on either side, membership may be told from the loss (area under the curve)."""
    knn_excess_max: float = 10.0
    """Points that neighbours in feature space find above a model that never saw the data."""
    probe_excess_max: float = 10.0
    """Points that a linear probe finds above a model that never saw the data."""
    acc_excess_max: float = 10.0
    """Single images: points that their accuracy may lie above that of a model that never saw them or, without one, of
    unseen images of their classes."""
    mia_excess_max: float = 0.15
    """Single images: how far the membership attack on their loss may be, on either side, from what it finds on a model
    that never saw them or, without one, from 0.5."""
    max_blocks: int = 0
    """Most blocks that may be changed; 0 = any number."""
    few_shot_min: int = 4
    """Fewest images of a class to work with; 0 = any number."""


_AREAS = (("mia_auc_band", 0.5), ("mia_excess_max", 1.0))


class Verdict(NamedTuple):
    """One limit and what was found."""

    name: str
    limit: float
    found: float | None
    passed: bool

    @property
    def outcome(self) -> Outcome:
        """Tell what was not measured from what failed."""
        if self.found is None:
            return "not measured"
        return "met" if self.passed else "failed"


def read_policy(path: str) -> PolicyConfig:
    """Read a file of limits; "" = the usual ones."""
    return load_config(PolicyConfig, path, "policy") if path else PolicyConfig()


def check_policy(policy: PolicyConfig) -> None:
    """Refuse limits that nothing or everything keeps.

    Raises:  ConfigError: a limit out of its range.
    """
    for name, high in (("acc_f_max", 100.0), ("acc_o_max", 100.0), ("acc_r_min_drop", 100.0), *_AREAS):
        value = float(vars(policy)[name])
        if not 0 <= value <= high:
            raise ConfigError(f"{name}: expected 0 to {high:g}, found {value:g}. Mend the policy.")
    for name in ("knn_excess_max", "probe_excess_max", "acc_excess_max"):
        value = float(vars(policy)[name])
        if not -100 <= value <= 100:
            raise ConfigError(f"{name}: expected -100 to 100 points, found {value:g}. Mend the policy.")
    for name in ("max_blocks", "few_shot_min"):
        if vars(policy)[name] < 0:
            raise ConfigError(f"{name}: expected 0 or more, found {vars(policy)[name]}. Mend the policy.")


def policy_limits(policy: PolicyConfig) -> dict[str, float]:
    """List the limits by name, as the ledger records them."""
    return {name: float(value) for name, value in vars(policy).items()}


def read_limits(limits: Mapping[str, float]) -> PolicyConfig:
    """Make the policy that the ledger records.

    Raises:  ConfigError: the names are not those of a policy.
    """
    known = vars(PolicyConfig())
    if not known.keys() - {*LATER} <= limits.keys() <= known.keys():
        raise ConfigError(f"expected the limits {', '.join(known)}; found {', '.join(limits)}")
    typed = {name: type(known[name])(value) for name, value in limits.items()}
    return PolicyConfig(**typed)


def judge(policy: PolicyConfig, metrics: Mapping[str, float]) -> list[Verdict]:
    """Hold what was measured against the limits.

    Args:  metrics: acc_f, acc_r, acc_r_pretrained, acc_o, mia_auc, knn_excess, probe_excess, num_changed_blocks,
           min_shots (fewest images of a class that were used), num_earlier (requests in use before this one),
           num_old_classes (that those forgot); of single images acc_excess, mia_excess and SINGLE; of detectors ap_f,
           ap_r, ap_r_pretrained, ap_o for accuracies.
    """
    get, single = _with_precision(metrics).get, SINGLE in metrics
    kept, before = get("acc_r"), get("acc_r_pretrained")
    drop = None if kept is None or before is None else before - kept
    verdicts = [] if single else [_at_most("acc_f_max", policy.acc_f_max, get("acc_f"))]
    verdicts.append(_at_most("acc_r_min_drop", policy.acc_r_min_drop, drop))
    if get("num_earlier") != 0 and get("num_old_classes") != 0:
        verdicts.append(_at_most("acc_o_max", policy.acc_o_max, get("acc_o")))
    verdicts += _single(policy, metrics) if single else _whole(policy, metrics)
    if policy.max_blocks:
        verdicts.append(_at_most("max_blocks", policy.max_blocks, get("num_changed_blocks")))
    if policy.few_shot_min and not single:
        shots = get("min_shots")
        passed = shots is not None and shots >= policy.few_shot_min
        verdicts.append(Verdict("few_shot_min", policy.few_shot_min, shots, passed))
    return verdicts


def _with_precision(metrics: Mapping[str, float]) -> dict[str, float]:
    """Let a detector's average precision stand for accuracy."""
    return {**{f"acc_{name[3:]}": value for name, value in metrics.items() if name.startswith("ap_")}, **metrics}


def _whole(policy: PolicyConfig, metrics: Mapping[str, float]) -> list[Verdict]:
    """Judge what is still found of whole classes."""
    auc = metrics.get("mia_auc")
    return [
        _at_most("mia_auc_band", policy.mia_auc_band, None if auc is None else abs(auc - 0.5)),
        _at_most("knn_excess_max", policy.knn_excess_max, metrics.get("knn_excess")),
        _at_most("probe_excess_max", policy.probe_excess_max, metrics.get("probe_excess")),
    ]


def _single(policy: PolicyConfig, metrics: Mapping[str, float]) -> list[Verdict]:
    """Judge what is still found of single images."""
    apart = metrics.get("mia_excess")
    return [
        _at_most("acc_excess_max", policy.acc_excess_max, metrics.get("acc_excess")),
        _at_most("mia_excess_max", policy.mia_excess_max, None if apart is None else abs(apart)),
    ]


def passes(verdicts: Iterable[Verdict]) -> bool:
    """Say whether every limit was measured and kept."""
    return all(verdict.passed for verdict in verdicts)


def _at_most(name: str, limit: float, found: float | None) -> Verdict:
    # A NaN is no figure: it compares false.
    return Verdict(name, limit, found, found is not None and found <= limit)
