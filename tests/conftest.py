"""What every test shares: shape and type checks on postgrad, one thread, fixtures, skips with a reason."""

import os
from pathlib import Path

# Before torch and the hub client are imported: they read these once.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
from xdist.remote import Producer  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402

install_import_hook("postgrad", "typecheck.typecheck")
torch.set_num_threads(1)
# The same examples every time, however slow the machine.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("suite")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --slow, which runs the tests marked slow."""
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine or this command cannot run, and say why."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    not_slow = pytest.mark.skip(reason="slow; runs with --slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(not_slow)


class _ByMethod(LoadScopeScheduling):
    """Gives one worker all contract tests of a method: they look at one run. Other tests go one by one."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid[nodeid.rindex("[") :] if "/test_contract.py" in nodeid and "[" in nodeid else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByMethod:
    """Share the tests out between the workers."""
    return _ByMethod(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the checkout; its tests are skipped where it is missing."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the reference data in {folder}")
    return folder
