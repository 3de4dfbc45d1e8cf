"""Errors say what happened and what to do; a misspelt name is answered with the nearest one there is."""

from __future__ import annotations

import pytest
import torch

from lacompile import errors
from lacompile.errors import BadArgument, BadOptionValue, LacompileError, NotRewritten, UnknownMode, UnknownOption
from lacompile.ops import ForwardModeRefused
from lacompile.options import Options, check_mode
from lacompile.report import last_report


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("bufers", "buffers"),
        ("Strict", "strict"),
        ("dryrun", "dry_run"),
        ("validation", "validate"),
        ("max_autotun", "max_autotune"),
        ("epilogue_fussion", "epilogue_fusion"),
    ],
)
def test_an_unknown_option_names_the_nearest_of_ours_and_of_inductors(typo, meant):
    with pytest.raises(UnknownOption) as caught:
        Options.split({typo: True})
    assert str(caught.value) == f"unknown option {typo!r} for backend 'lightning'; did you mean {meant!r}?"


def test_an_unknown_mode_names_the_nearest():
    with pytest.raises(UnknownMode, match=r"unknown mode 'max-autotun'.*did you mean 'max-autotune'"):
        check_mode("max-autotun")


def test_a_name_close_to_nothing_lists_what_there_is():
    assert errors.nearest("xyzzy", ["beta", "alpha"]) == "known: alpha, beta"
    with pytest.raises(UnknownMode, match="known: default, max-autotune"):
        check_mode("xyzzy")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadArgument("q", "a tensor", "float"), ValueError),
        (UnknownOption("a", ["b"]), ValueError),
        (BadOptionValue("a", 1, "True or False"), ValueError),
        (UnknownMode("a", ["b"]), ValueError),
        (NotRewritten("..."), RuntimeError),
        (ForwardModeRefused(), NotImplementedError),
    ],
)
def test_every_error_is_ours_and_a_builtin_one(error, kind):
    assert isinstance(error, LacompileError) and isinstance(error, kind)


def test_every_class_of_the_module_is_covered_above():
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, LacompileError)}
    assert classes == {LacompileError, BadArgument, UnknownOption, BadOptionValue, UnknownMode, NotRewritten}


# ------------------------------------------------------------------------------------------------------- strict mode


def undecayed(q, k, v):
    return (q @ k.transpose(-1, -2)).tril() @ v


def bidirectional(q, k, v):
    return (q @ k.transpose(-1, -2)) @ v


def strictly(fn, **options):
    """``fn`` on small inputs, compiled under strict mode."""
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="lightning", options={"strict": True, **options})
    return compiled(*(torch.ones(1, 2, 8, 4) for _ in range(3)))


def test_strict_mode_is_silent_where_everything_is_rewritten():
    out = strictly(undecayed)
    assert torch.allclose(out[0, 0, :, 0], 4 * torch.arange(1.0, 9.0))
    report = last_report()
    assert report is not None and len(report.rewrites) == 1


def test_strict_mode_raises_where_nothing_is_rewritten():
    with pytest.raises(Exception, match=r"strict mode: rewrote 0 decayed attentions in 1 graph") as caught:
        strictly(bidirectional)
    assert "NotRewritten" in str(caught.value) or isinstance(caught.value, NotRewritten)


def test_strict_mode_raises_on_a_near_miss_and_shows_it(monkeypatch):
    from lacompile import decision
    from lacompile.passes.facts import Refusal

    refusal = Refusal("legality", "unchanged", None, "a tensor left alone", "add_ writes into it")
    monkeypatch.setattr(decision, "settled", lambda schedule, match: refusal)
    with pytest.raises(Exception, match=r"legality/unchanged: expected a tensor left alone, found add_ writes into it"):
        strictly(undecayed)
