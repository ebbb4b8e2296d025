"""Flags in groups by what they are for, and the help that lists them so.

    prompts = Group(values, "prompts")
    prompts.number("num", 4, "Problems of --task.")

A command's --help shows the groups of SHORT and fits a screen, --helpfull also the others: of one decoder each, of the
machine, and flags without a group.
"""

import textwrap
from typing import Any

from absl import flags

SHORT = ("recipe", "prompts", "problems", "model", "decoding", "output")  # as help orders them
REST = "other"
WIDTH, INDENT = 100, 26
KINDS = {"int": "N", "float": "X", "string": "TEXT", "comma separated list of strings": "A,B"}


class Group:
    """Defines flags of one group, which absl keeps as the name of their module. A default of None is not shown: say in
    the help, in brackets, what it stands for."""

    def __init__(self, values: flags.FlagValues, name: str):
        self.common: dict[str, Any] = {"flag_values": values, "module_name": name}

    def text(self, name: str, default: str | None, help: str) -> None:
        flags.DEFINE_string(name, default, help, **self.common)

    def items(self, name: str, help: str) -> None:
        """Separated by commas; None where not given."""
        flags.DEFINE_list(name, None, help, **self.common)

    def switch(self, name: str, default: bool, help: str) -> None:
        flags.DEFINE_bool(name, default, help, **self.common)

    def number(self, name: str, default: int | None, help: str, *, least: int = 1, most: int | None = None) -> None:
        flags.DEFINE_integer(name, default, help, lower_bound=least, upper_bound=most, **self.common)

    def real(self, name: str, default: float | None, help: str) -> None:
        flags.DEFINE_float(name, default, help, **self.common)


def help_page(command: str, summary: str, values: flags.FlagValues, *, full: bool) -> str:
    """What --help prints, or --helpfull: at most WIDTH columns."""
    groups = _grouped(values)
    lines = [f"cdlm {command}: {summary}"]
    for name, members in groups.items():
        if full or name in SHORT:
            lines += ["", name, *(line for flag in members for line in _lines(flag))]
    if hidden := [name for name in groups if not full and name not in SHORT]:
        lines += ["", *textwrap.wrap(f"More by --helpfull: {', '.join(hidden)}.", WIDTH)]
    return "\n".join(lines)


def _grouped(values: flags.FlagValues) -> dict[str, list[flags.Flag]]:
    """The groups that have flags. What no Group defined stands under a module's name, and is of the last one."""
    modules = values.flags_by_module_dict()
    homes = {flag.name: REST for members in modules.values() for flag in members}
    homes |= {flag.name: name for name, members in modules.items() if "." not in name for flag in members}
    order = dict.fromkeys([*SHORT, *homes.values()])
    order[REST] = order.pop(REST, None)
    found = {group: [values[name] for name, home in homes.items() if home == group] for group in order}
    return {group: members for group, members in found.items() if members}


def _lines(flag: flags.Flag) -> list[str]:
    """The flag and its value, then beside it what it is for, with its default."""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={KINDS.get(flag.flag_type(), 'NAME')}"
    text, default = flag.help or "", flag.default_as_str or ""
    if isinstance(flag.default, bool | int | float | str):
        text = f"{text.removesuffix('.')} [{default[1:-1]}]."
    return textwrap.wrap(f"  {name:<{INDENT - 3}} {text}", WIDTH, subsequent_indent=" " * INDENT)
