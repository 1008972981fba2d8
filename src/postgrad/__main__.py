"""The command line: postgrad METHOD [recipe.toml] [--field value] [--dry-run].

Settings come from the defaults, then the recipe, then the flags; of a flag's name its end is enough where no other
ends so. Nothing heavy is imported before a method is
named, so `postgrad --help` answers at once.
"""

import errno
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from postgrad import __version__
from postgrad.core.config import dump_config, flatten_config, load_config
from postgrad.errors import ConfigError, Interrupted, PostgradError, UserError
from postgrad.methods import METHODS, config_class, method, summary

OK, FAILED, MISUSED, STOPPED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:    argv: what follows `postgrad`; None = the process's own arguments.
    Returns: 0 done, 1 failed, 2 something the user can mend, 130 stopped on request.
    """
    try:
        return _command(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return _complain(str(error), MISUSED)
    except (Interrupted, KeyboardInterrupt) as error:
        return _complain(f"{str(error) or 'Stopped.'} The same command continues.", STOPPED)
    except PostgradError as error:
        return _complain(str(error), FAILED)
    except Exception as error:
        if not _disk_full(error):
            raise
        return _complain(f"The disk is full: {error}. Free some space; the same command continues.", FAILED)


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_methods()
        return OK
    if arguments[0] == "--version":
        print(f"postgrad {__version__}")
        return OK
    name, rest = arguments[0], arguments[1:]
    module = method(name)
    dry_run = "--dry-run" in rest
    try:
        config = _configure(name, [argument for argument in rest if argument != "--dry-run"])
    except SystemExit as stop:  # tyro has printed help, or what is wrong with a flag
        return stop.code if isinstance(stop.code, int) else MISUSED
    if dry_run:
        _print_plan(name, module, config)
        return OK
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for every file that is loaded or saved would drown our own
    report = module.run(config)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this command once a device
        from postgrad.core.report import print_report

        print_report(report)
    return OK


def _configure(name: str, arguments: list[str]) -> Any:
    import tyro

    cls = config_class(name)
    default = cls()
    if arguments and not arguments[0].startswith("-"):
        default = load_config(cls, arguments.pop(0))
    description = (
        f"{summary(name)}\n\n"
        "recipe.toml holds settings, under the names listed here; a flag wins over it. "
        "Of a name like --train.optim.lr its end is enough, --optim.lr or --lr, where no other ends so. "
        "--dry-run prints the settings and the plan, and stops."
    )
    arguments = [_spelled_out(argument, list(flatten_config(default))) for argument in arguments]
    prog = f"postgrad {name} [recipe.toml]"
    return tyro.cli(cls, args=arguments, default=default, prog=prog, description=description)


def _spelled_out(argument: str, keys: Sequence[str]) -> str:
    """Complete a flag that is the end of one setting's name; leave anything else to the parser.

    Raises:  ConfigError: several settings end so.
    """
    flag, equals, value = argument.partition("=")
    if not flag.startswith("--"):
        return argument
    known = [key.replace("_", "-") for key in keys]
    head, dot, last = flag.removeprefix("--").replace("_", "-").rpartition(".")
    for prefix in ("", "no-"):  # a switch is turned off by --a.b.no-c
        name = f"{head}{dot}{last.removeprefix(prefix)}"
        if name in known:
            return argument
        found = [key for key in known if key.endswith(f".{name}") and last.startswith(prefix)]
        if len(found) > 1:
            listed = ", ".join(f"--{key}" for key in found)
            raise ConfigError(f"{flag}: several settings end so: {listed}. Write one out.")
        if found:
            start, dot, leaf = found[0].rpartition(".")
            return f"--{start}{dot}{prefix}{leaf}{equals}{value}"
    return argument


def _print_methods() -> None:
    console = Console(highlight=False)
    console.print("usage: postgrad METHOD \\[recipe.toml] \\[--field value] \\[--dry-run]\n")
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name in METHODS:
        table.add_row(Text(name, style="bold"), Text(summary(name)))
    console.print(table)
    console.print("\npostgrad METHOD --help lists the settings of a method; postgrad --version the version.")


def _print_plan(name: str, module: ModuleType, config: Any) -> None:
    module.check(config)
    print(f"# postgrad {name}\n{dump_config(config)}")
    table = Table("plan", "", title_justify="left")
    for key, value in module.plan(config).items():
        table.add_row(Text(key), Text(_format(value), justify="right"))
    Console(highlight=False).print(table)


def _format(value: str | int | float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value


def _complain(message: str, status: int) -> int:
    Console(stderr=True, highlight=False).print(Text(message, style="red"), soft_wrap=True)
    return status


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # what libraries that write from C++ and Rust raise
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    sys.exit(main())
