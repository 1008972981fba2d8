"""The leakage audit: every attack on one model beside the same attack on gold.

Each model is attacked once, from one cached pass over each split (`attack`); an `Audit` sets a model's outcomes beside
those of the original model and of gold, the model retrained without the forgotten classes.

Letters: N bank samples, T test samples, Q forgotten test samples, K classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from postgrad.core.metrics import Interval
from postgrad.errors import ConfigError, DataError
from postgrad.forgetting.leakage import (
    Pass,
    Recovery,
    activation_distance,
    feature_cosine,
    fit_probe,
    js_divergence,
    knn_found,
    linear_cka,
    probe_found,
    recovery,
    stands_out,
    swap_found,
    zero_retrain_forgetting,
)
from postgrad.forgetting.membership import (
    Attack,
    Curve,
    Separation,
    Sides,
    attack_features,
    loss_sides,
    roc,
    sample_losses,
    separation,
    svc_attacks,
)
from postgrad.forgetting.metrics import AccTable, ClassDrop, acc_table, class_accuracy, worst_drops
from postgrad.forgetting.relearn import RelearnConfig, Relearned, check_relearn, relearn_ratio
from postgrad.forgetting.schedules import TaskSplit

CURVE_NEIGHBOURS = (1, 2, 5, 10, 20, 50, 100)
"""k for which the report shows what neighbours find."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How hard the audit looks."""

    neighbours: int = 5
    """k of the nearest-neighbour attack."""
    penalty: float = 1.0
    """Penalty on the weights of the linear probe and of the refitted head rows."""
    svc: bool = True
    """Also train the support vector membership attacks."""
    published_entropy: bool = False
    """Also attack with the modified entropy as SalUn's code has it."""
    relearn: RelearnConfig = RelearnConfig(steps=40, test_every=2)
    """How the forgotten classes are taught again, to see how fast they come back; steps 0 = not at all."""


class Views(NamedTuple):
    """What one model shows of the training and the test samples of all classes, forgotten ones included."""

    train: Pass
    test: Pass


@dataclass(frozen=True)
class Attacked:
    """What each attack on one model found, sample by sample."""

    predicted: Int[Tensor, " T"]
    labels: Int[Tensor, " T"]
    forgotten: Pass
    """The forgotten test samples."""
    found: Mapping[str, Bool[Tensor, " Q"]]
    """Attack on the features -> which forgotten test samples it recognises."""
    by_neighbours: Mapping[int, Bool[Tensor, " Q"]]
    """The nearest-neighbour attack for other k."""
    members: Sides
    """Forgotten training against forgotten test samples, by the loss."""
    outliers: Mapping[str, Sides]
    """Forgotten against retained test samples, by how unsure the model is."""
    svc: Mapping[str, Attack]
    """Trained membership attacks, by what they look at."""


@dataclass(frozen=True)
class Audit:
    """What a model kept, forgot, and still gives away. None means no gold reference, or not measured."""

    name: str
    accuracy: AccTable
    knn: Recovery
    """Nearest neighbours among all classes."""
    knn_alone: Recovery
    """One forgotten class at a time against the retained ones."""
    probe: Recovery
    """Linear probe among all classes."""
    probe_alone: Recovery
    swap: Recovery
    """Head whose rows of the forgotten classes are refitted."""
    membership: Separation
    """Forgotten training against test samples by the loss; best 0.5, and below is a leak too."""
    streisand: Separation
    """Forgotten against retained test samples by the largest logit; best gold's."""
    streisand_entropy: Separation
    svc: Mapping[str, Attack]
    svc_gold: Mapping[str, Attack]
    cka: float
    """Linear CKA to the original model on forgotten test samples; 1 = features as before."""
    cosine: Interval
    """Cosine to the original model's features."""
    js_gold: float | None
    """Jensen-Shannon divergence from gold's answers on forgotten test samples, in nats."""
    activation_gold: float | None
    """Distance from gold's probabilities on forgotten test samples."""
    zrf: float | None
    """Closeness to an untrained model's answers."""
    drops: tuple[ClassDrop, ...]
    """The retained classes that lost most."""
    unseen: tuple[ClassDrop, ...]
    """Retained classes without training data, the worst first."""
    knn_curve: Mapping[int, float]
    """k -> per cent found."""
    member_curve: Curve
    outlier_curve: Curve
    relearned: Relearned | None = None
    relearned_gold: Relearned | None = None

    def relearn(self, share: float) -> float | None:
        """Return samples needed until a share of the original accuracy is back, over those gold needs."""
        if self.relearned is None or self.relearned_gold is None:
            return None
        return relearn_ratio(self.relearned, self.relearned_gold, share, self.accuracy.acc_f_pretrained)

    def figures(self) -> dict[str, float]:
        """Name every figure, intervals as _low and _high; what was not measured is left out."""
        found: dict[str, float | Interval | None] = dict(self.accuracy.row())
        for name in ("knn", "knn_alone", "probe", "probe_alone", "swap"):
            attack: Recovery = vars(self)[name]
            found |= {f"{name}_found": attack.share, f"{name}_gold": attack.gold, f"{name}_excess": attack.excess}
        for name, part in (("mia", self.membership), ("streisand", self.streisand)):
            found |= {f"{name}_auc": part.auc, f"{name}_gold": part.gold, f"{name}_difference": part.difference}
        found |= {name: vars(self)[name] for name in ("cka", "cosine", "js_gold", "activation_gold", "zrf")}
        found |= {"relearn_50": self.relearn(0.5), "relearn_90": self.relearn(0.9)}
        found |= {f"svc_{name.replace(' ', '_')}": attack.members for name, attack in self.svc.items()}
        return spread(found)


def attack(views: Views, split: TaskSplit, config: AuditConfig | None = None) -> Attacked:
    """Run every attack on one model, from its cached passes.

    Raises:  DataError: a split has no sample of the forgotten or of the retained classes.
    """
    config = config or AuditConfig()
    check_audit(config)
    train, test = views
    for name, part in (("training", train), ("test", test)):
        for group, classes in (("forgotten", split.forget), ("retained", split.replayed)):
            if not len(part.of(classes).labels):
                raise DataError(f"Audit: expected {name} samples of the {group} classes {classes}, found none.")
    probe = fit_probe(train.features, train.labels, penalty=config.penalty)
    forgotten = test.of(split.forget)
    found = {
        "knn": knn_found(train, test, split.forget, k=config.neighbours),
        "knn_alone": knn_found(train, test, split.forget, k=config.neighbours, alone=True),
        "probe": probe_found(probe, test, split.forget),
        "probe_alone": probe_found(probe, test, split.forget, alone=True),
        "swap": swap_found(train, test, split.forget, penalty=config.penalty),
    }
    ks = [k for k in CURVE_NEIGHBOURS if k <= len(train.labels)]
    return Attacked(
        predicted=test.logits.argmax(1),
        labels=test.labels,
        forgotten=forgotten,
        found=found,
        by_neighbours={k: knn_found(train, test, split.forget, k=k) for k in ks},
        members=loss_sides(*(sample_losses(part.logits, part.labels) for part in (train.of(split.forget), forgotten))),
        outliers={by: stands_out(test, split.forget, split.remain, by) for by in ("max logit", "entropy")},
        svc=_svc(views, split, config) if config.svc else {},
    )


def audit(
    name: str,
    found: Attacked,
    base: Attacked,
    gold: Attacked | None,
    split: TaskSplit,
    *,
    random: Float[Tensor, "Q K"] | None = None,
    relearned: tuple[Relearned, Relearned | None] | None = None,
) -> Audit:
    """Set what the attacks found on one model beside the original model and gold.

    Args:    base: attacks on the original model. gold: on a model retrained without the forgotten classes, or None.
             random: an untrained model's logits of the forgotten test samples. relearned: of this model and of gold.
    Raises:  DataError: the models were not shown the same test samples.
    """
    for other in (base, gold):
        if other is not None and not found.labels.equal(other.labels):
            raise DataError(f"Audit of {name}: expected the same test samples for every model, found other labels.")
    before, after = (class_accuracy(each.predicted, each.labels, _width(each)) for each in (base, found))
    answers = None if gold is None else gold.forgotten.logits
    attacks = {key: recovery(each, None if gold is None else gold.found[key]) for key, each in found.found.items()}
    ours, theirs = found.forgotten, base.forgotten
    outliers = {
        by: separation(sides, None if gold is None else gold.outliers[by]) for by, sides in found.outliers.items()
    }
    return Audit(
        name=name,
        accuracy=acc_table(found.labels, found.predicted, split, pretrained=base.predicted, start=base.predicted),
        knn=attacks["knn"],
        knn_alone=attacks["knn_alone"],
        probe=attacks["probe"],
        probe_alone=attacks["probe_alone"],
        swap=attacks["swap"],
        membership=separation(found.members, None if gold is None else gold.members),
        streisand=outliers["max logit"],
        streisand_entropy=outliers["entropy"],
        svc=found.svc,
        svc_gold={} if gold is None else gold.svc,
        cka=linear_cka(ours.features, theirs.features),
        cosine=feature_cosine(ours.features, theirs.features),
        js_gold=None if answers is None else float(js_divergence(ours.logits, answers).mean()),
        activation_gold=None if answers is None else float(activation_distance(ours.logits, answers).mean()),
        zrf=None if random is None else zero_retrain_forgetting(ours.logits, random),
        drops=tuple(worst_drops(before, after, split.replayed)),
        unseen=tuple(worst_drops(before, after, split.missing, num=len(split.missing))),
        knn_curve={k: 100 * float(each.double().mean()) for k, each in found.by_neighbours.items()},
        member_curve=roc(found.members),
        outlier_curve=roc(found.outliers["max logit"]),
        relearned=None if relearned is None else relearned[0],
        relearned_gold=None if relearned is None else relearned[1],
    )


def check_audit(config: AuditConfig) -> None:
    """Refuse an audit that looks at nothing."""
    if config.neighbours < 1:
        raise ConfigError(f"neighbours: expected 1 or more, found {config.neighbours}. Mend the audit.")
    if config.penalty <= 0:
        raise ConfigError(f"penalty: expected above 0, found {config.penalty:g}. Mend the audit.")
    if config.relearn.steps:
        check_relearn(config.relearn)


def spread(found: Mapping[str, float | Interval | None]) -> dict[str, float]:
    """Write intervals as value, _low and _high; leave out what is missing or no number."""
    flat: dict[str, float] = {}
    for name, value in found.items():
        if isinstance(value, Interval):
            flat |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        elif value is not None:
            flat[name] = value
    return {name: value for name, value in flat.items() if math.isfinite(value)}


def _svc(views: Views, split: TaskSplit, config: AuditConfig) -> dict[str, Attack]:
    """Train the attacks on retained training against test samples and ask about the forgotten training samples."""
    groups = (views.train.of(split.replayed), views.test.of(split.replayed), views.train.of(split.forget))
    members, others, targets = (
        attack_features(part.logits, part.labels, published=config.published_entropy) for part in groups
    )
    return svc_attacks(members, others, targets)


def _width(found: Attacked) -> int:
    return found.forgotten.logits.shape[1]
