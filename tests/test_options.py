"""Where a setting comes from, what belongs to Inductor, and what a wrong value says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from lacompile.errors import BadOptionValue, UnknownMode, UnknownOption
from lacompile.options import MODES, Options, check_mode


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in Options.__dataclass_fields__:
        monkeypatch.delenv(f"LACOMPILE_{name.upper()}", raising=False)


def test_the_defaults_are_the_careful_ones():
    ours, inductors = Options.split(None)
    assert ours == Options(buffers="check", validate="budget", strict=False, dry_run=False)
    assert inductors == {}


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(FrozenInstanceError):
        Options().strict = True


@pytest.mark.parametrize("prefix", ["", "lightning."])
def test_own_options_with_and_without_the_prefix(prefix):
    ours, inductors = Options.split({f"{prefix}buffers": "never", f"{prefix}strict": True})
    assert (ours.buffers, ours.strict) == ("never", True)
    assert inductors == {}


def test_what_inductor_knows_is_handed_on():
    ours, inductors = Options.split({"max_autotune": True, "triton.cudagraphs": False, "dry_run": True})
    assert ours == Options(dry_run=True)
    assert inductors == {"max_autotune": True, "triton.cudagraphs": False}


def test_dashes_are_underscores_to_inductor():
    assert Options.split({"max-autotune": True})[1] == {"max_autotune": True}


class TestEnvironment:
    def test_replaces_the_default(self, monkeypatch):
        monkeypatch.setenv("LACOMPILE_VALIDATE", "off")
        assert Options.split({})[0].validate == "off"

    def test_gives_way_to_options(self, monkeypatch):
        monkeypatch.setenv("LACOMPILE_VALIDATE", "off")
        assert Options.split({"validate": "always"})[0].validate == "always"

    def test_a_misspelt_name_is_an_error(self, monkeypatch):
        monkeypatch.setenv("LACOMPILE_STRCT", "1")
        with pytest.raises(UnknownOption, match="LACOMPILE_STRICT"):
            Options.split({})

    def test_the_kernels_have_variables_of_their_own(self, monkeypatch):
        monkeypatch.setenv("LACOMPILE_AUTOTUNE", "off")
        monkeypatch.setenv("LACOMPILE_CACHE_DIR", "here")
        assert Options.split({})[0] == Options()

    def test_case_does_not_matter(self, monkeypatch):
        monkeypatch.setenv("LACOMPILE_VALIDATE", "Off")
        assert Options.split({})[0].validate == "off"

    @pytest.mark.parametrize(
        ("raw", "value"), [("1", True), ("true", True), ("True", True), ("0", False), ("FALSE", False)]
    )
    def test_switches(self, monkeypatch, raw, value):
        monkeypatch.setenv("LACOMPILE_STRICT", raw)
        assert Options.split({"dry_run": True})[0].strict is value

    @pytest.mark.parametrize(("name", "raw"), [("STRICT", "yes"), ("BUFFERS", "sometimes"), ("DRY_RUN", "")])
    def test_a_wrong_value_is_an_error(self, monkeypatch, name, raw):
        monkeypatch.setenv(f"LACOMPILE_{name}", raw)
        with pytest.raises(BadOptionValue, match=f"option '{name.lower()}'"):
            Options.split(None)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("buffers", "maybe", "one of 'check', 'trust', 'never'"),
        ("validate", True, "one of 'budget', 'always', 'off'"),
        ("strict", 1, "True or False"),
        ("dry_run", "true", "True or False"),
    ],
)
def test_a_wrong_value_says_what_is_expected(name, value, expected):
    with pytest.raises(BadOptionValue) as caught:
        Options.split({name: value})
    assert str(caught.value) == f"option {name!r}: expected {expected}, got {value!r}"


@pytest.mark.parametrize("mode", [None, *MODES])
def test_every_mode_of_torch_compile_is_taken(mode):
    check_mode(mode)


def test_every_mode_means_something_to_inductor():
    from torch._inductor import list_mode_options

    assert set(MODES) <= set(list_mode_options())


class TestThroughTorchCompile:
    """torch.compile checks neither names nor values for a backend that is not Inductor."""

    def test_an_unknown_option(self):
        with pytest.raises(Exception, match="did you mean 'buffers'") as caught:
            torch.compile(torch.tril, backend="lightning", options={"bufers": "never"})(torch.ones(2, 2))
        assert _raised_from(caught.value, UnknownOption)

    def test_an_unknown_mode(self):
        with pytest.raises(Exception, match="did you mean 'max-autotune'") as caught:
            torch.compile(torch.tril, backend="lightning", mode="max-autotun")(torch.ones(2, 2))
        assert _raised_from(caught.value, UnknownMode)


def _raised_from(error, kind):
    """Dynamo wraps what a backend raises."""
    chain = [error, error.__cause__, getattr(error, "inner_exception", None)]
    return any(isinstance(e, kind) for e in chain)
