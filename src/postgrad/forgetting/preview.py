"""The plan of each request before anything is trained, in lines for a dry run: data, neighbours, cost, warnings.

Letters: N images, B images of a batch, C channels, H height, W width, D width of the features.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from postgrad.core.vision import ImageSet
from postgrad.core.vision_models import Classifier
from postgrad.forgetting.batches import PairBatches
from postgrad.forgetting.bench import beside
from postgrad.forgetting.blocks import ffn_blocks
from postgrad.forgetting.erase_config import EraseConfig, epochs_of
from postgrad.forgetting.ledger import LEDGER, Ledger, states
from postgrad.forgetting.planning import Cost, Group, Plan, plan_request
from postgrad.forgetting.request import ForgetRequest, read_request
from postgrad.forgetting.sample_audit import Scope
from postgrad.forgetting.views import View

Lines = dict[str, str]
NUM_GROUPS = 4
"""Classes to forget whose neighbours are listed; the others are counted."""
PIXELS = 16
"""Height and width to which images are averaged where pixels stand in for features."""
TIMED, QUICK_S = (8, 64), 0.2
"""Images of the step that is timed: few, and more where that took less than so many seconds."""


@dataclass(frozen=True, eq=False)
class Outlook:
    """What all requests of a run are planned with."""

    train: ImageSet
    working: ImageSet
    """Those that requests may use."""
    classifier: Classifier
    trained: bool
    """False: its weights are only drawn yet, and pixels stand in for its features."""
    config: EraseConfig
    few_shot_min: int


def in_service(folder: Path) -> list[ForgetRequest]:
    """Read the requests of a service that are in use or baked; none where there is no service yet."""
    if not (folder / LEDGER).is_file():
        return []
    found = states(Ledger(folder).entries())
    kept = [name for name, state in found.items() if state != "revoked"]
    return [read_request(folder / "adapters" / name / "request.json") for name in kept]


def preview(
    outlook: Outlook, requests: Sequence[ForgetRequest], scopes: Sequence[Scope], earlier: Sequence[ForgetRequest]
) -> Lines:
    """Plan each request in turn; one that a service has carried out already is only named.

    Args:   earlier: requests of the service.
    Raises: DataError: a request that cannot be found in the data.
    """
    lines: Lines = {}
    seconds = seconds_each(outlook.classifier, outlook.train)
    known = {each.id for each in earlier}
    for number, (request, scope) in enumerate(zip(requests, scopes, strict=True)):
        if request.id in known:
            lines[f"request {request.id}"] = "carried out already"
            continue
        images = beside(outlook.working, outlook.train, scope)
        images = images.of_classes(set(range(len(images.classes))) - set(scope.split.missing))
        before = (*earlier, *requests[:number])
        found = plan_request(
            request, images, features(outlook, images), before, few_shot_min=outlook.few_shot_min,
            cost=cost(request, images, before, outlook.config, seconds),
        )  # fmt: skip
        lines |= plan_lines(found, pixels=not outlook.trained)
    return lines


def plan_lines(plan: Plan, *, pixels: bool) -> Lines:
    """Write a plan in a few lines: what, how many, neighbours, cost, warnings."""
    whole = ", ".join(group.name for group in plan.groups if group.whole)
    some = ", ".join(f"{group.num_images} of {group.name}" for group in plan.groups if not group.whole)
    start = f"{plan.request}: "
    lines = {
        f"request {plan.request}": whole or f"single images, {some}",
        f"{start}images": f"{sum(group.num_used for group in plan.groups):,} to forget, {plan.num_retain_used:,} of "
        f"{plan.num_retained_classes} classes to keep",
        f"{start}nearest kept{' (by pixels)' if pixels else ''}": _neighbours(plan.groups),
        f"{start}cost, at most": f"{plan.cost.image_steps:,} images in training, about "
        f"{plan.cost.image_steps * plan.cost.seconds_each:.0f} s",
    }
    return lines | {f"{start}! {title.lower()}": text for title, text in plan.warnings}


def features(outlook: Outlook, images: ImageSet) -> Float[Tensor, "N D"]:
    """Compute features: the model's or, where it is yet to be trained, averaged pixels."""
    if outlook.trained:
        return View(outlook.classifier, images).see_all().features
    small = F.adaptive_avg_pool2d(images.images.float() / 255, min(PIXELS, *images.images.shape[2:]))
    return small.flatten(1)


def cost(
    request: ForgetRequest, images: ImageSet, earlier: Sequence[ForgetRequest], config: EraseConfig, seconds: float
) -> Cost:
    """Predict the training of a request that ends neither early nor with more blocks than it begins with."""
    named = {name for each in (*earlier, request) for name in each.classes}
    labels = images.labels.tolist()
    asked = set(request.samples)
    hashes = images.hashes if asked else ("",) * len(labels)
    gone = [images.classes[k] in request.classes or h in asked for k, h in zip(labels, hashes, strict=True)]
    kept = [not g and images.classes[k] not in named for g, k in zip(gone, labels, strict=True)]
    if request.shots:
        gone, kept = (_shots(which, labels, request.shots) for which in (gone, kept))
    batches = PairBatches(sum(kept), sum(gone), config.train.batch_size, 1, 0)
    selecting, training = config.select_epochs, epochs_of(config.train, config.least_steps, batches.epoch_steps)
    each = min(sum(kept), config.train.batch_size) + min(sum(gone), config.train.batch_size)
    # after a selection only the later half of the blocks is computed
    share = 0.5 if selecting and config.together else 1.0
    return Cost(
        (selecting + training) * batches.epoch_steps * each,
        seconds * (selecting + share * training) / (selecting + training),
    )


def seconds_each(classifier: Classifier, images: ImageSet) -> float:
    """Time one image in a training step on this machine: forward, and backward through all blocks."""
    few = images.images[: TIMED[0]]
    model = copy.deepcopy(classifier).requires_grad_(False)
    blocks = ffn_blocks(model.network)
    if blocks:
        model.network.get_submodule(blocks[0].linears[0]).requires_grad_(True)
    _step_seconds(model, few[:1])  # the first is slower than any other
    spent = _step_seconds(model, few)
    if spent > QUICK_S:
        return spent / len(few)
    more = images.images[: TIMED[1]]
    return min(_step_seconds(model, more) for _ in range(3)) / len(more)


def _step_seconds(model: Classifier, pixels: UInt8[Tensor, "B C H W"]) -> float:
    begun = time.perf_counter()
    logits = model(pixels).logits
    if logits.requires_grad:
        logits.sum().backward()
    return time.perf_counter() - begun


def _shots(which: Sequence[bool], labels: Sequence[int], shots: int) -> list[bool]:
    """Keep the first few of each class; which ones does not matter to the cost."""
    seen: dict[int, int] = {}
    found = []
    for wanted, label in zip(which, labels, strict=True):
        seen[label] = seen.get(label, 0) + wanted
        found.append(wanted and seen[label] <= shots)
    return found


def _neighbours(groups: Sequence[Group]) -> str:
    """List the nearest kept classes, with how often they are confused."""
    texts = []
    for group in groups[:NUM_GROUPS]:
        near = (
            f"{'the others' if each.name == group.name else each.name} ({_percent(each.confusion)})"
            for each in group.neighbours
        )
        texts.append(f"{group.name}: {', '.join(near)}")
    more = f"; and {len(groups) - NUM_GROUPS} more" if len(groups) > NUM_GROUPS else ""
    return "; ".join(texts) + more


def _percent(share: float) -> str:
    return "?" if share != share else f"{100 * share:.0f} %"
