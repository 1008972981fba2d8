"""What every method keeps, forgets and still gives away on the requests of a recipe, over seeds.

    python -m benchmarks.forgetting_faces recipes/forget_vit_yaleb.toml --seeds 3
    python -m benchmarks.forgetting_faces recipes/forget_vit_yaleb.toml --seeds 3 --shots 4    four images a class
    python -m benchmarks.forgetting_faces recipes/forget_vit_yaleb.toml --seeds 3 --missing 5  kept classes without any
    python -m benchmarks.forgetting_faces recipes/forget_vit_yaleb.toml --rates 3e-4 1e-3 3e-3 baselines are tuned

Methods are the presets, the recipe's baselines, "retrain" (from the base's first weights on the images that requests
work with, in its own epochs) and gold. Each seed has images, a base and gold models of its own. Of --rates a baseline
gets the one whose H on the test images is best for the first request of seed 0: a choice in its favour; without them
all have the recipe's.

Each method's figures are kept in the folder once it is through: the same command goes on where it stopped, and other
settings of the same recipe find base and gold there.
"""

import argparse
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.table import Table

from postgrad.core.config import load_config
from postgrad.core.files import write_json
from postgrad.core.runtime import Job
from postgrad.core.vision import ImageSet, load_images
from postgrad.errors import Diverged
from postgrad.forgetting.base import fresh
from postgrad.forgetting.baselines import run_baseline
from postgrad.forgetting.baselines_table import BASELINES
from postgrad.forgetting.bench import Bench
from postgrad.forgetting.comparison import chosen, compare
from postgrad.forgetting.erase_config import PRESETS
from postgrad.forgetting.forget import ForgetConfig, base_of, check, gold_models, requests_of, scopes, working
from postgrad.forgetting.leakage_audit import Audit

SHOWN = ("safe", "thorough", "gs-lora", "gs-lora++", "paper")
REFERENCES = ("retrain", "gold")
COLUMNS = {
    "h": "H", "acc_r": "Acc_r", "acc_f": "Acc_f", "acc_o": "Acc_o", "acc_m": "Acc_m", "knn_excess": "kNN excess",
    "probe_excess": "probe excess",
}  # fmt: skip
Figures = Mapping[str, float]
Found = Mapping[str, Sequence[Sequence[Figures]]]
"""Method -> of each seed, the figures of each request; none of a training that diverged."""


@dataclass(frozen=True, eq=False)
class Lab:
    """A seed's base and requests, and what every method is measured with."""

    config: ForgetConfig
    bench: Bench
    working: ImageSet
    job: Job


def prepare(config: ForgetConfig, job: Job) -> Lab:
    """Load the images, train the base or find it in the folder."""
    train, test = (part.to(job.device) for part in load_images(config.data, job.seed))
    requests = requests_of(config, train)
    found = scopes(config, (train, test), requests)
    job = replace(job, folder=job.folder / _key(config.data, config.model, config.base, job.seed))
    base, _ = base_of(config, train, job)
    bench = Bench(config.audit, (train, test), requests, found, base, (), job.seed)
    return Lab(config, bench, working(config, train), job)


def _key(*parts: object) -> str:
    """Name a file or folder after what it depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def audits(lab: Lab, method: str, lr: float, folder: Path) -> Sequence[Audit]:
    """Serve the requests with a method, one after the other; audit after each."""
    bench, job, settings = lab.bench, replace(lab.job, folder=folder), replace(lab.config.baseline, lr=lr)
    if method == "base":
        return [bench.measure(method, bench.original, number) for number in range(len(bench.requests))]
    if method == "gold":
        kept = [scope.split.remain for scope in bench.scopes]
        part = replace(job, folder=lab.job.folder / _key(kept))
        models = gold_models(lab.config, bench.images, bench.scopes, part)
        return [bench.measure(method, model, number) for number, model in enumerate(models)]
    if method != "retrain":
        return compare((method,), bench.original, bench, lab.working, job, settings)[0].audits
    found = []
    for number, split in enumerate(bench.splits):
        drawn = fresh(lab.config.model, lab.working.classes, bench.images[0], job)
        parts = (lab.working.of_classes(split.forget), lab.working.of_classes(split.replayed))
        part = replace(job, folder=folder / str(number))
        model = run_baseline("retrain", drawn, *parts, replace(settings, epochs=0), part)
        found.append(bench.measure(method, model, number))
    return found


def served(lab: Lab, method: str, lr: float) -> list[Figures]:
    """Give the figures of each request; none where training diverged."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return [audit.figures() for audit in audits(lab, method, lr, Path(folder))]
        except Diverged:
            return []


@dataclass(eq=False)
class Store:
    """Figures in files, measured where there are none yet; the base is loaded when one is missing."""

    config: ForgetConfig
    job: Job
    lab: Lab | None = None

    def figures(self, method: str, lr: float, num: int = 0) -> list[Figures]:
        """Read or measure a method on all requests, or only on the first `num`."""
        config = self.config
        how: list[object] = [PRESETS.get(method), config.share, config.shots]
        if method in BASELINES:
            own = tuple(number for number in config.baseline.numbers if number.startswith(f"{method}."))
            how[0] = replace(config.baseline, lr=lr, numbers=own)
        setting = (config.data, config.model, config.base, config.tasks, config.requests, config.missing, config.audit)
        key = _key(setting, [] if method in ("base", "gold") else how, self.job.seed)
        whole = self.job.folder / "figures" / f"{method}-{key}.json"
        file = whole if not num or whole.exists() else whole.with_suffix(f".first-{num}.json")
        if not file.exists():
            found = served(self._limited(num), method, lr)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"method": method, "lr": lr, "seed": self.job.seed, "requests": found})
        read: list[Figures] = json.loads(file.read_text(encoding="utf-8"))["requests"]
        return read[: num or None]

    def _limited(self, num: int) -> Lab:
        self.lab = self.lab or prepare(self.config, self.job)
        if not num:
            return self.lab
        bench = replace(self.lab.bench, requests=self.lab.bench.requests[:num], scopes=self.lab.bench.scopes[:num])
        return replace(self.lab, bench=bench)


def tuned(store: Store, method: str, rates: Sequence[float]) -> float:
    """Choose a baseline's learning rate by H after the first request."""
    if method not in BASELINES or method == "gold" or BASELINES[method].objective is None or not rates:
        return store.config.baseline.lr
    if len(rates) == 1:
        return rates[0]
    found = {lr: store.figures(method, lr, 1) for lr in rates}
    return max(found, key=lambda lr: found[lr][0]["h"] if found[lr] else -math.inf)


def beside_gold(found: Found) -> Found:
    """Add to the figures what attacks find more than on gold of the same seed; nothing where gold was not measured."""
    if "gold" not in found:
        return found
    leaks = ("knn", "probe")

    def excess(own: Figures, gold: Figures) -> Figures:
        return {**own, **{f"{name}_excess": own[f"{name}_found"] - gold[f"{name}_found"] for name in leaks}}

    return {
        method: [[*map(excess, own, gold)] for own, gold in zip(seeds, found["gold"], strict=True)]
        for method, seeds in found.items()
    }


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Show the mean and, of several, its standard error."""
    middle = format(mean(values), form)
    return middle if len(values) == 1 else f"{middle} ± {stdev(values) / math.sqrt(len(values)):.1f}"


def cells(seeds: Sequence[Sequence[Figures]], number: int) -> list[str]:
    """Show a request of a method over seeds; nothing where there is nothing."""
    there = [requests[number] for requests in seeds if requests]
    return [
        spread([each[name] for each in there], "+.1f" if "excess" in name else ".1f")
        if there and all(name in each for each in there)
        else ""
        for name in COLUMNS
    ]


def table(found: Found, rates: Mapping[str, float], title: str) -> Table:
    """Show every method's requests."""
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(("method", "lr", "request", *COLUMNS.values())):
        shown.add_column(column, justify="right" if i else "left", no_wrap=True)
    for method, seeds in found.items():
        num = max(map(len, seeds))
        rate = f"{rates[method]:g}" if method in BASELINES and rates[method] else ""
        if not num:
            shown.add_row(method, rate, "diverged", end_section=True)
        for number in range(num):
            shown.add_row(method, rate, str(number + 1), *cells(seeds, number), end_section=number == num - 1)
    return shown


def lines(found: Found) -> list[str]:
    """Write a row of markdown for each method: H of each request, the last Acc_r, the worst Acc_f and Acc_o, leaks."""
    num = max(len(requests) for seeds in found.values() for requests in seeds)
    heads = [*(f"H {number + 1}" for number in range(num)), "Acc_r, last", "Acc_f, worst", "Acc_o, worst"]
    written = [f"| method | {' | '.join(heads)} | kNN excess | probe excess |", "| --- " * (len(heads) + 3) + "|"]
    for method, seeds in found.items():
        there = [requests for requests in seeds if requests]
        if not there:
            written.append(f"| {method} | diverged |")
            continue
        hs = [spread([requests[i]["h"] for requests in there]) for i in range(num)]
        worst = [
            f"{max(each.get(name, 0.0) for requests in there for each in requests):.1f}" for name in ("acc_f", "acc_o")
        ]
        leaks = [
            ", ".join(f"{mean(requests[i][name] for requests in there):.0f}" for i in range(num))
            if name in there[0][0]
            else ""
            for name in ("knn_excess", "probe_excess")
        ]
        kept = spread([requests[-1]["acc_r"] for requests in there])
        written.append(f"| {' | '.join([method, *hs, kept, *worst, *leaks])} |")
    return written


def _rate(text: str) -> tuple[str, float]:
    """Read "lwf=1e-3"."""
    name, _, number = text.partition("=")
    if name not in BASELINES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(BASELINES)} before the '=', found {name!r}")
    return name, float(number)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", type=Path, help="of postgrad forget, whose base is trained first")
    add("--seeds", type=int, default=1, help="how many, from 0 on")
    add("--shots", type=int, default=0, help="images of each class in place of the recipe's share")
    add("--missing", type=int, default=0, help="kept classes without any image")
    add("--methods", nargs="*", default=[], help="only these; none = all presets shown and the recipe's baselines")
    add("--rates", type=float, nargs="*", default=[], help="learning rates to try for each baseline")
    add("--epochs", type=int, default=0, help="of baselines; 0 = the recipe's")
    add("--lr", type=_rate, nargs="*", default=[], help="of single baselines, as lwf=1e-3: these are not tuned")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--folder", type=Path, default=Path("runs/benchmarks/forgetting_faces"), help="where everything is kept")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, print the tables."""
    options, console = parse(arguments), Console(width=max(Console().width, 150))
    config = load_config(ForgetConfig, options.recipe)
    audit = replace(config.audit, svc=False, relearn=replace(config.audit.relearn, steps=0))
    baseline = replace(config.baseline, epochs=options.epochs or config.baseline.epochs)
    config = replace(
        config, gold=True, shots=options.shots or config.shots, missing=options.missing or config.missing,
        audit=audit, baseline=baseline,
    )  # fmt: skip
    check(config)
    torch.set_num_threads(config.runtime.threads or torch.get_num_threads())
    named = options.methods or [*SHOWN, *chosen(config.baselines), *REFERENCES]
    methods = ["base", *dict.fromkeys(named)]
    folder, device = options.folder / options.recipe.stem, torch.device(options.device)
    jobs = [Job("benchmark", folder, seed, device, torch.float32, 0, 1, True) for seed in range(options.seeds)]
    stores = [Store(config, job) for job in jobs]
    rates: dict[str, float] = dict(options.lr)
    found: dict[str, Sequence[Sequence[Figures]]] = {}
    for store in stores:
        for method in methods:
            rates[method] = rates[method] if method in rates else tuned(store, method, options.rates)
            figures = store.figures(method, rates[method])
            found[method] = [*found.get(method, ()), figures]
            h = mean(each["h"] for each in figures) if figures else math.nan
            console.print(f"seed {store.job.seed}: {method}, lr {rates[method]:g}, H {h:.1f}")
        store.lab = None  # images and models of a seed are many
    found = dict(beside_gold(found))
    console.print(table(found, rates, f"{options.recipe.stem}, seeds: {options.seeds}; mean ± standard error"))
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
