"""What a run of a detector's requests is served with: images to learn from, base and gold beside the detector."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from postgrad.core.config import dump_config
from postgrad.core.runtime import Job
from postgrad.errors import DataError
from postgrad.forgetting.blocks import ffn_blocks
from postgrad.forgetting.boxes import BoxSet, few_of_each
from postgrad.forgetting.boxes_leakage import BoxAuditConfig, Seen, attack, leak_figures, see
from postgrad.forgetting.boxes_report import Found, look, precisions
from postgrad.forgetting.boxes_service import all_but
from postgrad.forgetting.detector import Detector
from postgrad.forgetting.erase_boxes import BoxMaterial, EraseBoxesConfig, erase_boxes
from postgrad.forgetting.network_service import Carried, NetworkService
from postgrad.forgetting.policy import PolicyConfig
from postgrad.forgetting.request import ForgetRequest, manifest_hash
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.service_parts import adapter_name


def left(boxes: BoxSet, split: TaskSplit) -> BoxSet:
    """Take the images that show nothing of what a request or one before it forgot: what gold learns from.

    Raises: DataError: there is none.
    """
    gone = {*split.forget, *split.old}
    kept = boxes.select([i for i, each in enumerate(boxes.targets) if not gone & set(each["class_labels"].tolist())])
    if not len(kept):
        names = [boxes.classes[label] for label in sorted(gone)]
        raise DataError(
            f"gold: every training image shows something of {names}, so no detector can learn from these without "
            "seeing that. Set gold to false, or add images of other objects alone."
        )
    return kept


def material(
    service: NetworkService, request: ForgetRequest, boxes: BoxSet, split: TaskSplit, shots: int, seed: int
) -> BoxMaterial:
    """Choose the images a request is learnt from."""
    forget, retain = boxes.showing(split.forget), boxes.showing(split.remain)
    if few := request.shots or shots:
        forget, retain = few_of_each(forget, few, seed), few_of_each(retain, few, seed)
    return BoxMaterial(forget, retain, len(service.forgotten), split.old)


class Settings(NamedTuple):
    """How requests are served."""

    erase: EraseBoxesConfig
    policy: PolicyConfig
    audit: BoxAuditConfig
    shots: int


@dataclass(frozen=True, eq=False)
class Bench:
    """What the requests of a run are served with."""

    service: NetworkService
    detector: Detector
    boxes: tuple[BoxSet, BoxSet]
    before: Found
    """By the base, on test images."""
    seen: Seen | None
    """What the base shows to attackers; None = no request is to be applied."""
    settings: Settings
    job: Job

    def apply(self, request: ForgetRequest, split: TaskSplit, gold: Detector | None) -> None:
        """Carry out a request: train its adapter, write it, measure, enter it in the ledger, certify."""
        service, network = self.service, self.detector.network
        erase, policy, _, shots = self.settings
        earlier = service.active
        service.show(earlier)
        chosen = material(service, request, self.boxes[0], split, shots, self.job.seed)
        part = replace(self.job, folder=self.job.folder / "requests" / request.id)
        names = [adapter_name(each) for each in earlier]
        outcome = erase_boxes(self.detector, chosen, adapter_name(request.id), names, erase, part)
        service.write(request)
        counts = {
            "num_earlier": float(chosen.number), "steps": float(outcome.steps),
            "min_shots": float(min(chosen.forget.counts.values())),
        }  # fmt: skip
        metrics = {**self.measure(split, gold), **self.audit(split, gold), **counts}
        carried = Carried(
            blocks=ffn_blocks(network), num_forget=len(chosen.forget), num_retain=len(chosen.retain),
            manifest_hash=manifest_hash(request.salt, chosen.forget.hashes), config=dump_config(erase),
            seed=self.job.seed, hardware=str(self.job.device), metrics=metrics, policy=policy,
        )  # fmt: skip
        service.enter(request, carried)

    def measure(self, split: TaskSplit, gold: Detector | None) -> dict[str, float]:
        """Measure the detector as it is on test images, beside the base and gold."""
        whole, test = all_but(self.service, split.forget, split.old), self.boxes[1]
        return precisions(self.before, look(self.detector, test), whole, None if gold is None else look(gold, test))

    def audit(self, split: TaskSplit, gold: Detector | None) -> dict[str, float]:
        """Attack the detector as it is, the base and gold."""
        assert self.seen is not None, "the base is looked at where a request is to be applied"
        config, seed = self.settings.audit, self.job.seed
        after = attack(see(self.detector, self.boxes, config, seed), split.forget, config)
        theirs = None if gold is None else attack(see(gold, self.boxes, config, seed), split.forget, config)
        return leak_figures(after, attack(self.seen, split.forget, config), theirs)
