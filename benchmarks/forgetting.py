"""Time to forget at equal quality: our presets, the official schedule, SCRUB and SalUn on the same requests.

    python -m benchmarks.forgetting                    digits, three rounds, on a CPU
    python -m benchmarks.forgetting --gold --rounds 1  and what neighbours and probes still find, beside a gold model
    python -m benchmarks.forgetting --data orl --size 56 --patch 7 --width 96 --depth 6 --heads 6 --shift 3 --flip \\
        --base-epochs 60 --base-lr 1e-3 --tasks 30 10 3

The base is trained once and kept. In a round every method serves all requests from it, with the round's seed; each
round begins with another method. Only the erasing is timed, including whatever evaluations it makes; measuring what
came of it is not. Baselines have their papers' settings, with the learning rate whose H on the test images is best for
the first request: a choice in their favour.

Exit status 1 when preset "safe" falls more than half a point of H behind preset "paper" in any request (median over
rounds), or when "paper" takes less than ten times its processor seconds for all requests (on a GPU: its seconds).
"""

import argparse
import copy
import hashlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import mean, median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.alignment.__main__ import spread
from postgrad.core.config import RuntimeConfig
from postgrad.core.files import write_json
from postgrad.core.layer_adapters import adapter_names
from postgrad.core.runtime import Job
from postgrad.core.vision import ImagesConfig, ImageSet, load_images
from postgrad.core.vision_models import Classifier, ClassifierConfig
from postgrad.errors import Diverged
from postgrad.forgetting.base import BaseConfig
from postgrad.forgetting.baselines import BASELINES, BaselineConfig, run_baseline
from postgrad.forgetting.erase import Material, erase
from postgrad.forgetting.erase_config import PRESETS
from postgrad.forgetting.forget import ForgetConfig, base_of, gold_views, splits_of, working
from postgrad.forgetting.leakage import fit_probe, knn_found, probe_found, recovery
from postgrad.forgetting.leakage_audit import Views
from postgrad.forgetting.metrics import acc_table, accuracy
from postgrad.forgetting.schedules import TaskSplit
from postgrad.forgetting.views import passes

REPOSITORY = Path(__file__).resolve().parents[1]
ORL = REPOSITORY.parent / "shared" / "data" / "faces" / "orl_40x10_112x92.npz"
OURS, OFFICIAL = "safe", "paper"
PRESETS_SHOWN = (OURS, "thorough", "gs-lora", OFFICIAL)
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
RATIO_BAR, H_BAR = 10.0, 0.5
NEIGHBOURS = 5
QUICK = {
    "limit": 160, "width": 16, "depth": 2, "heads": 2, "patch": 4, "base_epochs": 8.0, "base_lr": 1e-2,
    "max_epochs": 2, "rounds": 1, "tasks": [9, 1, 2], "rates": [1e-3],
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """One request, as a method served it."""

    cpu: float
    wall: float
    image_passes: float | None
    """Images times the share of the network they went through in training; None: not counted."""
    h: float
    acc_r: float
    acc_f: float
    acc_o: float | None
    knn: float | None = None
    """Points that neighbours find more than on gold."""
    probe: float | None = None


Round = Mapping[str, Sequence[Served]]
Leaks = tuple[float | None, float | None]


@dataclass(frozen=True, eq=False)
class Lab:
    """The base, the requests, and what every method is measured with."""

    images: tuple[ImageSet, ImageSet]
    working: ImageSet
    """What requests may learn from."""
    splits: Sequence[TaskSplit]
    classifier: Classifier
    base: Views
    gold: Sequence[Views]
    max_epochs: int
    """0 = as many as the methods' settings say."""

    @property
    def accuracy(self) -> float:
        """Of the base on the test images, in percent."""
        return accuracy(self.base.test.logits.argmax(1), self.base.test.labels).value

    def measure(self, model: Classifier, number: int) -> tuple[float, float, float, float | None, *Leaks]:
        """Give H, the accuracies of kept, forgotten and earlier forgotten classes, and the leaks after a request."""
        views, split = passes(model, self.images), self.splits[number]
        after, before = (each.test.logits.argmax(1) for each in (views, self.base))
        table = acc_table(views.test.labels, after, split, pretrained=before, start=before)
        leaks = _leaks(views, self.gold[number], split.forget) if self.gold else (None, None)
        old = None if table.acc_o is None else table.acc_o.value
        return table.h, table.acc_r.value, table.acc_f.value, old, *leaks


def _leaks(views: Views, gold: Views, classes: Sequence[int]) -> Leaks:
    """Give the points that neighbours and a linear probe find more than on gold."""
    pairs = zip(_found(views, classes), _found(gold, classes), strict=True)
    knn, probe = (recovery(own, other).excess for own, other in pairs)
    assert knn is not None and probe is not None, "there is gold to compare with"
    return knn.value, probe.value


def _found(views: Views, classes: Sequence[int]) -> list[torch.Tensor]:
    """Tell which forgotten test images neighbours and a linear probe recognise."""
    probe = fit_probe(views.train.features, views.train.labels)
    neighbours = knn_found(views.train, views.test, classes, k=NEIGHBOURS)
    return [neighbours, probe_found(probe, views.test, classes)]


def config_of(options: argparse.Namespace) -> ForgetConfig:
    """Put the flags into a configuration of `postgrad forget`."""
    base = BaseConfig(shift=options.shift, flip=options.flip)
    optim = replace(base.train.optim, lr=options.base_lr or base.train.optim.lr)
    training = replace(base.train, epochs=options.base_epochs or base.train.epochs, optim=optim)
    return ForgetConfig(
        tasks=tuple(options.tasks), share=options.share, shots=options.shots, gold=options.gold,
        data=ImagesConfig(
            path=str(ORL) if options.data == "orl" else options.data, size=options.size, limit=options.limit
        ),
        model=ClassifierConfig(
            path=options.model, width=options.width, depth=options.depth, heads=options.heads, patch=options.patch
        ),
        base=replace(base, train=training), runtime=RuntimeConfig(seed=options.seed),
    )  # fmt: skip


def prepare(config: ForgetConfig, max_epochs: int, job: Job) -> Lab:
    """Load the images, train base and gold or find them in the folder."""
    images = load_images(config.data, job.seed)
    train, test = (part.to(job.device) for part in images)
    splits = splits_of(config, train, ())
    job = replace(job, folder=job.folder / _key(config.data, config.model, config.base, job.seed))
    classifier, _ = base_of(config, train, job)
    gold = gold_views(config, (train, test), splits, replace(job, folder=job.folder / _key(config.tasks)))
    base = passes(classifier, (train, test))
    return Lab((train, test), working(config, train), splits, classifier, base, gold, max_epochs)


def _key(*parts: object) -> str:
    """Name a folder after what its files depend on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def serve(lab: Lab, method: str, lr: float, job: Job, num: int = 0) -> list[Served]:
    """Serve the requests with a method, one after the other, or only the first `num`."""
    model = copy.deepcopy(lab.classifier)
    found = []
    for number, split in enumerate(lab.splits[: num or None]):
        material = Material(
            lab.working.of_classes(split.forget), lab.working.of_classes(split.replayed), number, split.old
        )
        part = replace(job, folder=job.folder / method / str(number))
        part.folder.mkdir(parents=True)
        cpu, wall = now(job.device)
        model, num_passed = forget(lab, method, lr, model, material, part)
        after = now(job.device)
        found.append(Served(after[0] - cpu, after[1] - wall, num_passed, *lab.measure(model, number)))
    return found


def forget(
    lab: Lab, method: str, lr: float, model: Classifier, material: Material, job: Job
) -> tuple[Classifier, float | None]:
    """Serve one request; give the model and the image passes. This is what is timed."""
    if method in PRESETS:
        config = replace(PRESETS[method], floor=100.0)  # what a service would refuse is measured, too
        epochs = min(config.train.epochs, lab.max_epochs or config.train.epochs)
        config = replace(config, train=replace(config.train, epochs=epochs))
        name = f"request-{material.task + 1}"
        erased = erase(model, material, name, adapter_names(model.network), config, job)
        return model, erased.image_passes
    epochs = min(BASELINES[method].epochs, lab.max_epochs or BASELINES[method].epochs)
    settings = BaselineConfig(lr=lr, epochs=epochs, save_every=0)
    return run_baseline(method, model, material.forget, material.retain, settings, job), None


def now(device: torch.device) -> tuple[float, float]:
    """Read the processor's clock and the wall's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time(), time.perf_counter()


def rates(lab: Lab, method: str, tried: Sequence[float], job: Job) -> dict[float, float]:
    """Try learning rates on the first request: rate -> H."""
    found = {}
    for lr in tried:
        try:
            found[lr] = serve(lab, method, lr, replace(job, folder=job.folder / f"rate-{lr:g}"), num=1)[0].h
        except Diverged:
            found[lr] = 0.0
    return found


def warm_up(lab: Lab, methods: Sequence[str], job: Job) -> None:
    """Serve a request for an epoch with each method, so that none is timed while libraries are loaded."""
    for method in methods:
        serve(replace(lab, max_epochs=1), method, RATES[0], replace(job, folder=job.folder / "warm-up"), num=1)


def run_round(lab: Lab, methods: Mapping[str, float], number: int, job: Job, say: Callable[[str], None]) -> Round:
    """Serve all requests with every method; each round begins with another one and has a seed of its own."""
    names = list(methods)
    part = replace(job, seed=job.seed + number, folder=job.folder / f"round-{number}")
    found = {}
    for name in names[number % len(names) :] + names[: number % len(names)]:
        found[name] = serve(lab, name, methods[name], part)
        seconds = sum(each.cpu for each in found[name])
        say(
            f"round {number + 1}: {name}, {seconds:.1f} processor seconds, H {mean(each.h for each in found[name]):.1f}"
        )
    return {name: found[name] for name in names}


def ratios(rounds: Sequence[Round], name: str, clock: str, number: int | None = None) -> list[float]:
    """Give the official schedule's seconds over a method's, round by round: of one request, or of all."""

    def seconds(served: Sequence[Served]) -> float:
        chosen = served if number is None else served[number : number + 1]
        return sum(each.wall if clock == "wall" else each.cpu for each in chosen)

    return [seconds(one[OFFICIAL]) / seconds(one[name]) for one in rounds]


def behind(rounds: Sequence[Round], name: str) -> list[float]:
    """Give the points of H by which a method is behind the official schedule, request by request."""
    pairs = [[theirs.h - ours.h for ours, theirs in zip(one[name], one[OFFICIAL], strict=True)] for one in rounds]
    return [median(values) for values in zip(*pairs, strict=True)]


def missed(rounds: Sequence[Round], clock: str) -> list[str]:
    """Say which bars "safe" misses."""
    ratio, worst = median(ratios(rounds, OURS, clock)), max(behind(rounds, OURS))
    found = []
    if ratio < RATIO_BAR:
        found.append(f"{OFFICIAL} takes {ratio:.2f} times as long as {OURS}, expected at least {RATIO_BAR:g}")
    if worst > H_BAR:
        found.append(f"{OURS} is {worst:.2f} points of H behind {OFFICIAL} in a request, expected at most {H_BAR:g}")
    return found


def table(rounds: Sequence[Round], title: str) -> Table:
    """Show every method's requests and their sum: medians over rounds, ratios with the least and the greatest."""
    with_gold = next(iter(rounds[0].values()))[0].knn is not None
    shown = Table(title=title, title_justify="left")
    columns = ("method", "request", "CPU s", "s", "CPU time ratio", "time ratio", "images passed", "H", "Acc_r",
               "Acc_f", "Acc_o", *(("kNN excess", "probe excess") if with_gold else ()))  # fmt: skip
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left")
    for name in rounds[0]:
        served = [one[name] for one in rounds]
        for number in range(len(served[0])):
            shown.add_row(*_row(rounds, name, number, with_gold))
        sums = [sum(vars(each)[clock] for each in one) for one in served for clock in ("cpu", "wall")]
        num_passed = [[each.image_passes for each in one] for one in served]
        counted = [sum(value for value in one if value is not None) for one in num_passed if None not in one]
        shown.add_row(
            name, "all", f"{median(sums[::2]):.1f}", f"{median(sums[1::2]):.1f}",
            spread(ratios(rounds, name, "cpu")), spread(ratios(rounds, name, "wall")),
            f"{median(counted):,.0f}" if counted else "", f"{median([mean(each.h for each in o) for o in served]):.1f}",
            end_section=True,
        )  # fmt: skip
    return shown


def _row(rounds: Sequence[Round], name: str, number: int, with_gold: bool) -> list[str]:
    """Show one request of a method."""
    served = [one[name][number] for one in rounds]

    def middle(field: str, form: str = ".1f") -> str:
        values = [vars(each)[field] for each in served]
        return "" if None in values else format(median(values), form)

    leaks = [middle("knn", "+.1f"), middle("probe", "+.1f")] if with_gold else []
    return [
        name, str(number + 1), middle("cpu"), middle("wall"), spread(ratios(rounds, name, "cpu", number)),
        spread(ratios(rounds, name, "wall", number)), middle("image_passes", ",.0f"), middle("h"), middle("acc_r"),
        middle("acc_f"), middle("acc_o"), *leaks,
    ]  # fmt: skip


def machine(options: argparse.Namespace) -> dict[str, str | int]:
    """Describe what the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(), "processor": models[0] if models else platform.processor(),
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none", "cores": os.cpu_count() or 1,
        "threads": options.threads,
    }  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="digits", help='"digits", "orl", or a file, a folder or a hub data set of images')
    add("--size", type=int, default=0, help="scale images to so many pixels; 0 = as found")
    add("--limit", type=int, default=0, help="images of each split at most; 0 = all")
    own = ClassifierConfig()
    add("--model", default=own.path, help='"tiny", "face", "timm:NAME", a hub name or a folder')
    for name, value in (("width", own.width), ("depth", own.depth), ("heads", own.heads), ("patch", own.patch)):
        add(f"--{name}", type=int, default=value, help="of a network that is drawn")
    add("--base-epochs", type=float, default=0.0, help="0 = the command's own")
    add("--base-lr", type=float, default=0.0, help="0 = the command's own")
    add("--shift", type=int, default=BaseConfig().shift, help="pixels by which the base's images are moved")
    add("--flip", action="store_true", help="mirror half of the base's images")
    add(
        "--tasks", type=int, nargs=3, default=list(ForgetConfig().tasks), help="classes kept first, a request, requests"
    )
    add("--share", type=float, default=ForgetConfig().share, help="of the training images that requests learn from")
    add("--shots", type=int, default=0, help="images of each class in place of a share")
    add("--gold", action="store_true", help="train models that never saw the classes and measure leaks beside them")
    add("--baselines", nargs="*", default=["scrub", "salun"], choices=sorted(BASELINES))
    add("--baseline-lr", type=float, default=0.0, help="0 = the best of --rates for the first request")
    add("--rates", type=float, nargs="+", default=list(RATES))
    add("--max-epochs", type=int, default=0, help="for every method; 0 = as many as its settings say")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--seed", type=int, default=0, help="of the base and the first round")
    add("--no-bar", action="store_true", help="exit status 0 whatever was measured")
    add("--quick", action="store_true", help="a few epochs of a small model on few images: does it run?")
    add("--folder", type=Path, default=Path("runs/benchmarks/forgetting"), help="where base and gold are kept")
    add("--out", type=Path, default=Path("runs/benchmarks/forgetting.json"))
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write all numbers as JSON."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=max(Console().width, 150))
    job = Job("benchmark", options.folder, options.seed, torch.device(options.device), torch.float32, 0, 1, True)
    clock = "wall" if options.device == "cuda" else "cpu"
    console.print(machine(options))
    lab = prepare(config_of(options), options.max_epochs, job)
    console.print(f"{options.data}: {len(lab.working)} images to learn from, the base has {lab.accuracy:.1f} %")
    settings = {**vars(options), "folder": str(options.folder), "out": str(options.out)}
    written: dict[str, object] = {"machine": machine(options), "options": settings, "base_accuracy": lab.accuracy}
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        part = replace(job, folder=Path(folder))
        methods = dict.fromkeys((*PRESETS_SHOWN, *options.baselines), options.baseline_lr)
        warm_up(lab, list(methods), part)
        tried = (
            {} if options.baseline_lr else {name: rates(lab, name, options.rates, part) for name in options.baselines}
        )
        methods |= {name: max(found, key=lambda lr: found[lr]) for name, found in tried.items()}
        written["rates"] = {name: {f"{lr:g}": h for lr, h in found.items()} for name, found in tried.items()}
        for number in range(options.rounds):
            rounds.append(run_round(lab, methods, number, part, console.print))
            written["rounds"] = [{name: [asdict(each) for each in one[name]] for name in one} for one in rounds]
            written["missed"] = missed(rounds, clock)
            write_json(options.out, written)
    rated = ", ".join(f"{name} lr {methods[name]:g}" for name in options.baselines)
    console.print(table(rounds, f"{options.data}, rounds: {len(rounds)}; ratios are {OFFICIAL} / method; {rated}"))
    for line in missed(rounds, clock):
        console.print(f"bar missed: {line}")
    return int(bool(missed(rounds, clock)) and not options.no_bar)


if __name__ == "__main__":
    sys.exit(main())
