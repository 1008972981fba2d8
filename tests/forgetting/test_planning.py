"""Plans: neighbours and risk by hand, warnings where there is reason, no training."""

import math
from statistics import NormalDist

import pytest
import torch
from services import Images, images
from torch import Tensor

from postgrad.core.sections import Note, Table
from postgrad.errors import DataError
from postgrad.forgetting.planning import Cost, Plan, confusion, plan_request, plan_sections
from postgrad.forgetting.request import ForgetRequest

COST = Cost(image_steps=1000, seconds_each=0.25)
# Four classes of four images: "a" and "b" lie side by side, "c" and "d" far away on either side.
CENTRES = {0: (1.0, 1.0), 1: (1.0, 1.5), 2: (-9.0, 1.0), 3: (1.0, -9.0)}
CROSS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
DATA = images([k for k in CENTRES for _ in range(4)], "abcde")
FEATURES = torch.cat([torch.tensor(centre) + CROSS for centre in CENTRES.values()])
REQUEST = ForgetRequest(id="r", classes=("a",))


def plan(request: ForgetRequest = REQUEST, data: Images = DATA, features: Tensor = FEATURES) -> Plan:
    return plan_request(request, data, features, few_shot_min=3, cost=COST)


def titles(found: Plan) -> list[str]:
    return [title for title, _ in found.warnings]


def test_confusion_by_hand() -> None:
    """Means 3 apart, deviations 1 and 2 along the line: Phi(-3 / (1 + 2))."""
    a = torch.tensor([[-1.0, 5.0], [0.0, -5.0], [1.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]])
    assert confusion(a, b) == pytest.approx(NormalDist().cdf(-1)) == pytest.approx(confusion(b, a))
    assert confusion(a, a) == 0.5
    assert confusion(torch.zeros(2, 1), torch.ones(2, 1)) == 0.0
    assert math.isnan(confusion(a, b[:1]))


def test_neighbours_are_ranked_about_the_common_mean() -> None:
    (group,) = plan().groups
    assert (group.name, group.num_images, group.num_used, group.whole) == ("a", 4, 4, True)
    assert [neighbour.name for neighbour in group.neighbours] == ["b", "d", "c"]
    centre = torch.tensor(list(CENTRES.values())).mean(0)
    to_a, to_b = torch.tensor(CENTRES[0]) - centre, torch.tensor(CENTRES[1]) - centre
    assert group.neighbours[0].cosine == pytest.approx(float(to_a @ to_b / to_a.norm() / to_b.norm()))
    deviation = math.sqrt(2 / 3)  # of (0, 0, 1, -1), the spread of either class on the line
    assert group.neighbours[0].confusion == pytest.approx(NormalDist().cdf(-0.5 / (2 * deviation)))


def test_near_neighbours_and_missing_classes_are_warned_of() -> None:
    found = plan()
    assert titles(found) == ["Near neighbours", "Retained without data"]
    assert "'a' and 'b' (38 %)" in found.warnings[0][1] and found.missing == ("e",)
    assert (found.num_retain, found.num_retain_used, found.num_retained_classes) == (12, 12, 4)


def test_shots_are_counted_and_few_are_warned_of() -> None:
    found = plan(ForgetRequest(id="r", classes=("a",), shots=2))
    assert found.groups[0].num_used == 2 and found.num_retain_used == 6
    assert found.few == (("a", 2), ("b", 2), ("c", 2), ("d", 2)) and "Few images" in titles(found)


def test_single_images_have_their_own_class_as_a_neighbour() -> None:
    found = plan(ForgetRequest(id="r", samples=DATA.hashes[:2]))
    (group,) = found.groups
    assert (group.name, group.num_images, group.whole) == ("a", 2, False)
    assert "a" in [neighbour.name for neighbour in group.neighbours]


def test_overlap_is_listed_and_not_refused() -> None:
    earlier = [ForgetRequest(id="r0", classes=("a", "b"))]
    found = plan_request(REQUEST, DATA, FEATURES, earlier, few_shot_min=0, cost=COST)
    assert [(each.request, each.what) for each in found.overlap] == [("r0", "class 'a'")]
    assert titles(found)[0] == "Forgotten before" and "class 'a' (request 'r0')" in found.warnings[0][1]
    assert [neighbour.name for neighbour in found.groups[0].neighbours] == ["c", "d"]


def test_the_same_image_on_both_sides_is_warned_of() -> None:
    twins = Images(DATA.labels, DATA.classes, (*DATA.hashes[:15], DATA.hashes[0]))
    assert plan(data=twins).num_twins == 1 and "The same image on both sides" in titles(plan(data=twins))


def test_a_plan_is_shown() -> None:
    sections = plan_sections(plan())
    assert [type(section) for section in sections] == [Note, Note, Table, Table, Table]
    tables = [section for section in sections if isinstance(section, Table)]
    assert tables[0].rows == (("a", "the class", 4, 4),)
    assert tables[1].rows[0][:2] == ("a", "b")
    assert ("training time, s", 250.0) in tables[2].rows
    calm = images([0] * 4 + [1] * 4, "ab")
    far = torch.cat([CROSS, CROSS + 9])
    first = plan_sections(plan(data=calm, features=far))[0]
    assert isinstance(first, Note) and first.kind == "good"


def test_features_must_be_of_these_images() -> None:
    with pytest.raises(DataError, match="expected features of 16 images, found 15"):
        plan(features=FEATURES[:15])
    with pytest.raises(DataError, match="no class 'f'"):
        plan(ForgetRequest(id="r", classes=("f",)))
