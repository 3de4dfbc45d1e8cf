"""What a user can set, where it can be set, and what happens to a misspelt name.

Precedence: ``options={...}`` of torch.compile, then ``LACOMPILE_<NAME>`` in the environment, then the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from .errors import BadOptionValue, UnknownMode, UnknownOption

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PREFIX = "lightning."
VARIABLE = "LACOMPILE_"
OF_KERNELS = ("LACOMPILE_AUTOTUNE", "LACOMPILE_CACHE_DIR")
"""Variables that kernels/tuning reads."""

Buffers = Literal["check", "trust", "never"]
Validate = Literal["budget", "always", "off"]


@dataclass(frozen=True)
class Options:
    """Settings of the lightning backend.

    Attributes:
        buffers: how values of buffers may be used: "check" them before each call, "trust" that they never change, or
            "never" use them. Masks that are passed in are looked at in each call, unless "never".
        validate: run every match against the original on random inputs: within a time "budget", "always", or "off".
        strict: an error instead of a report where a decayed attention was not rewritten, or none was found.
        dry_run: analyse and report, rewrite nothing.
    """

    buffers: Buffers = "check"
    validate: Validate = "budget"
    strict: bool = False
    dry_run: bool = False

    @classmethod
    def split(cls, options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
        """Ours, and what is Inductor's.

        Raises:
            UnknownOption: a name that neither knows; the message holds the nearest known one.
            BadOptionValue: a value that an option does not take.
        """
        from ._compat import inductor_option_names

        names = {f.name for f in fields(cls)}
        ours = _of_environment(names)
        inductor: dict[str, Any] = {}
        for key, value in (options or {}).items():
            name = key.removeprefix(PREFIX)
            if name in names:
                ours[name] = value
            elif key.replace("-", "_") in inductor_option_names():
                inductor[key.replace("-", "_")] = value
            else:
                raise UnknownOption(key, names | inductor_option_names())
        for name, value in ours.items():
            _check(name, value)
        return cls(**ours), inductor


def _of_environment(names: set[str]) -> dict[str, Any]:
    """What is set there."""
    known = {VARIABLE + name.upper(): name for name in names}
    given = {variable: raw for variable, raw in os.environ.items() if variable.startswith(VARIABLE)}
    for variable in given:
        if variable not in known and variable not in OF_KERNELS:
            raise UnknownOption(variable, {*known, *OF_KERNELS})
    return {known[v]: _parsed(known[v], raw) for v, raw in given.items() if v in known}


def _parsed(name: str, raw: str) -> Any:
    if Options.__dataclass_fields__[name].type in ("bool", bool):
        return {"1": True, "true": True, "0": False, "false": False}.get(raw.lower(), raw)
    return raw.lower()


def _check(name: str, value: Any) -> None:
    choices = {"buffers": get_args(Buffers), "validate": get_args(Validate)}.get(name)
    if choices is not None and value not in choices:
        raise BadOptionValue(name, value, "one of " + ", ".join(map(repr, choices)))
    if choices is None and not isinstance(value, bool):
        raise BadOptionValue(name, value, "True or False")


def check_mode(mode: str | None) -> None:
    """Raises UnknownMode for a ``mode=`` that torch.compile does not define."""
    if mode is not None and mode not in MODES:
        raise UnknownMode(mode, MODES)
