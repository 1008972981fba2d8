"""What a reader should see of requests for single images: a note in plain words, and each model beside the others."""

from collections.abc import Sequence

from postgrad.core.metrics import Interval
from postgrad.core.sections import Cell, Note, Section, Table, format_number
from postgrad.forgetting.sample_audit import Asked, SampleAudit


def sample_sections(requests: Sequence[Asked]) -> tuple[Section, ...]:
    """Show the audits of requests for single images; nothing without any."""
    return (sample_note(requests), sample_table(requests)) if requests else ()


def sample_note(requests: Sequence[Asked]) -> Note:
    """Say of each request whether its images are still treated otherwise than unseen ones."""
    ours = [(request, audits[-1]) for request, audits in requests]
    told = [(request, audit) for request, audit in ours if apart(audit)]
    opening = (
        "A model that never saw an image may name it rightly, too: single images are forgotten when the model is no "
        "surer of them than of unseen images of their classes."
    )
    texts = [_sentence(request, audit) for request, audit in ours]
    title = (
        "Single images can still be told from unseen ones" if told else "Single images: none is told from unseen ones"
    )
    return Note(title, " ".join([opening, *texts]), "warning" if told else "good")


def apart(audit: SampleAudit) -> bool:
    """Say whether an attack surely tells the images from unseen ones."""
    return audit.acc_excess.low > 0 or audit.mia_excess.low > 0 or audit.mia_excess.high < 0


def sample_table(requests: Sequence[Asked]) -> Table:
    """Set the models side by side, request by request."""
    rows: list[tuple[Cell, ...]] = []
    for request, audits in requests:
        rows += [
            (
                request, audit.name, audit.acc_f.value, audit.acc_h.value, _text(audit.acc_excess, 1),
                audit.membership.value, _text(audit.mia_excess, 3), audit.acc_r.value,
            )
            for audit in audits
        ]  # fmt: skip
    columns = ("request", "model", "Acc_f", "Acc_h", "above", "MIA AUC", "above", "Acc_r")
    note = (
        "Acc_f of the images, Acc_h of unseen ones of their classes, in per cent; 95 % intervals. Above: gold, the "
        "model trained without them, or, without gold, Acc_h and 0.5. MIA AUC: chance that the model is surer of one "
        "of them than of an unseen image of their classes."
    )
    return Table("Single images beside unseen ones", columns, tuple(rows), note)


def _sentence(request: str, audit: SampleAudit) -> str:
    against = "unseen images" if audit.mia_gold is None else "gold, which never saw them"
    return (
        f"{request}: {format_number(audit.acc_f.value, 1)} % of them are named rightly, "
        f"{_text(audit.acc_excess, 1)} points above {against}; the membership attack finds "
        f"{_text(audit.mia_excess, 3)} more than {'chance' if audit.mia_gold is None else 'on gold'}."
    )


def _text(value: Interval, decimals: int) -> str:
    ends = (format_number(each, decimals) for each in (value.low, value.high))
    return f"{format_number(value.value, decimals)} ({' to '.join(ends)})"
