"""The command line of `python -m evaluate.features`, read before Hydra; nothing heavy is imported, for `--help`."""

from __future__ import annotations

import re
from collections.abc import Iterable


def with_own_text(arguments: Iterable[str]) -> list[str]:
    """Turn `text=<any words>` on the command line into a quoted `own_text='...'`, as Hydra reads it.

    `text` itself is a group of settings (text.paths), and words hold the commas, colons and brackets that Hydra reads
    as its own.
    """
    given = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name == "text" and equals:
            # OmegaConf would put a value in the place of ${...}; a backslash keeps it as it is.
            value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
            # Within single quotes only a quote, and backslashes before one, are escaped.
            escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
            argument = f"own_text='{escaped}'"
        given.append(argument)
    return given
