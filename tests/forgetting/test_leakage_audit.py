"""The audit: each figure is its attack's, gold is compared, and what was not measured stays out."""

import pytest
import torch

from postgrad.errors import ConfigError, DataError
from postgrad.forgetting.leakage import Pass, excess, knn_found
from postgrad.forgetting.leakage_audit import Attacked, AuditConfig, Views, attack, audit
from postgrad.forgetting.membership import auc
from postgrad.forgetting.policy import PolicyConfig, judge
from postgrad.forgetting.relearn import Relearned
from postgrad.forgetting.schedules import TaskSplit

SPLIT = TaskSplit(remain=(0, 1, 2), forget=(3, 4), missing=(2,))
PLAIN = AuditConfig(svc=False)


def views(mixed: float, *, forgets: bool, seed: int = 0) -> Views:
    """Draw a model's views of five classes; the forgotten two's features are mixed with noise, their logits low."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 8, generator=torch.Generator().manual_seed(99))
    passes = []
    for num in (200, 100):
        labels = torch.arange(num) % 5
        noise = torch.randn(num, 8, generator=generator)
        lost = torch.isin(labels, torch.tensor(SPLIT.forget)) & forgets
        keep = torch.where(lost, 1 - mixed, 1.0)[:, None]
        features = keep * centres[labels] + 0.3 * noise + (1 - keep) * torch.randn(num, 8, generator=generator)
        logits = 3 * features @ centres.T
        logits[:, 3:] -= 50.0 * forgets
        passes.append(Pass(features, logits, labels))
    return Views(*passes)


BASE, PLAINLY, GOLD = views(0, forgets=False), views(0, forgets=True), views(1, forgets=True)


def attacked(of: Views, config: AuditConfig = PLAIN) -> Attacked:
    return attack(of, SPLIT, config)


def test_accuracy_hides_what_the_features_tell() -> None:
    found = audit("plain", attacked(PLAINLY), attacked(BASE), attacked(GOLD), SPLIT)
    figures = found.figures()
    assert figures["acc_f"] == 0 and figures["acc_f_pretrained"] > 90 and figures["acc_r"] > 90 and figures["h"] > 90
    assert figures["knn_found"] > 95 and figures["knn_gold"] < 60
    assert figures["knn_excess_low"] > 30 and figures["probe_excess_low"] > 10 and figures["swap_excess_low"] > 10
    assert figures["cka"] == pytest.approx(1.0) and figures["cosine"] == pytest.approx(1.0)


def test_every_figure_is_its_attacks() -> None:
    ours, gold = attacked(PLAINLY), attacked(GOLD)
    found = audit("plain", ours, attacked(BASE), gold, SPLIT)
    by_hand = [knn_found(each.train, each.test, SPLIT.forget) for each in (PLAINLY, GOLD)]
    assert found.knn.excess == excess(*by_hand)
    assert found.knn_curve[5] == found.knn.share.value
    assert list(found.knn_curve) == [1, 2, 5, 10, 20, 50, 100]
    assert found.membership.auc.value == pytest.approx(auc(ours.members))
    assert found.streisand.gold is not None
    assert found.streisand.gold.value == pytest.approx(auc(gold.outliers["max logit"]))
    assert found.js_gold is not None and 0 < found.js_gold < 0.7
    assert [one.label for one in found.unseen] == [2]
    assert {one.label for one in found.drops} == {0, 1}


def test_a_model_has_no_excess_over_itself() -> None:
    gold = attacked(GOLD)
    found = audit("gold", gold, attacked(BASE), gold, SPLIT).figures()
    for name in ("knn", "knn_alone", "probe", "probe_alone", "swap"):
        assert found[f"{name}_excess"] == 0 and found[f"{name}_excess_low"] < 0 < found[f"{name}_excess_high"]
    assert found["activation_gold"] == 0 and found["streisand_difference"] == 0
    assert found["js_gold"] == pytest.approx(0, abs=1e-12)


def test_without_gold_nothing_is_compared() -> None:
    found = audit("plain", attacked(PLAINLY), attacked(BASE), None, SPLIT)
    assert found.knn.excess is None and found.js_gold is None and found.streisand.difference is None
    assert not [name for name in found.figures() if "excess" in name or "gold" in name or "relearn" in name]
    assert found.figures()["knn_found"] > 95


def test_the_policy_reads_the_figures() -> None:
    with_gold = audit("plain", attacked(PLAINLY), attacked(BASE), attacked(GOLD), SPLIT).figures()
    without = audit("plain", attacked(PLAINLY), attacked(BASE), None, SPLIT).figures()
    outcomes = [{one.name: one.outcome for one in judge(PolicyConfig(), each)} for each in (with_gold, without)]
    for name in ("acc_f_max", "acc_r_min_drop"):
        assert [each[name] for each in outcomes] == ["met", "met"]
    assert outcomes[0]["mia_auc_band"] != "not measured"
    assert [each["knn_excess_max"] for each in outcomes] == ["failed", "not measured"]


def test_trained_attacks_and_what_else_is_optional() -> None:
    pytest.importorskip("sklearn")
    config = AuditConfig(published_entropy=True)
    gold, ours = attacked(GOLD, config), attacked(PLAINLY, config)
    random = torch.zeros(40, 5)
    relearned = Relearned((0, 8), (0.0, 99.0)), Relearned((0, 8, 16), (0.0, 10.0, 99.0))
    found = audit("plain", ours, attacked(BASE), gold, SPLIT, random=random, relearned=relearned)
    assert len(found.svc) == 6 and found.svc_gold.keys() == found.svc.keys()
    figures = found.figures()
    assert {"svc_confidence", "svc_modified_entropy", "svc_published_modified_entropy"} <= figures.keys()
    assert figures["relearn_50"] == 0.5 and 0.3 < figures["zrf"] < 1


def test_a_relearning_without_golds_has_no_ratio() -> None:
    curve = Relearned((0, 8), (0.0, 99.0))
    found = audit("plain", attacked(PLAINLY), attacked(BASE), None, SPLIT, relearned=(curve, None))
    assert found.relearned == curve and found.relearn(0.5) is None


def test_models_must_have_seen_the_same_samples() -> None:
    test = GOLD.test
    other = Views(GOLD.train, Pass(test.features[1:], test.logits[1:], test.labels[1:]))
    with pytest.raises(DataError, match="same test samples"):
        audit("plain", attacked(PLAINLY), attacked(BASE), attacked(other), SPLIT)


def test_a_split_must_have_the_forgotten_classes() -> None:
    with pytest.raises(DataError, match=r"training samples of the forgotten classes \(3, 4\)"):
        attack(Views(BASE.train.of((0, 1, 2)), BASE.test), SPLIT, PLAIN)


@pytest.mark.parametrize("config", [AuditConfig(neighbours=0), AuditConfig(penalty=0.0)])
def test_an_audit_must_look(config: AuditConfig) -> None:
    with pytest.raises(ConfigError, match="Mend the audit"):
        attack(BASE, SPLIT, config)
