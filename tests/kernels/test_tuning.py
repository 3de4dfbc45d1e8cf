"""Choosing tiles: the search, what is kept of it, and which of what is known counts. No GPU: times are made up."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os

import pytest
import torch

from lacompile.errors import BadOptionValue
from lacompile.kernels.tuning import choose, table
from lacompile.kernels.tuning.identity import Identity, source_digest
from lacompile.kernels.tuning.search import search
from lacompile.kernels.tuning.space import Kind, candidates

ABOUT = Identity("Some GPU 80GB", "3.6.0", "12.8", "abc")
KIND = Kind.of("backward", 96, 128, torch.bfloat16, False, True, True)
FOUND = candidates(96, 128, torch.bfloat16, True)
GPU = torch.device("cuda", 0)


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class TestSearch:
    def test_the_fastest_wins(self):
        assert search(4, [3.0, 1.0, None, 2.0].__getitem__, 1e9).place == 1

    def test_noise_is_no_reason_to_leave_the_safe_one(self):
        assert search(3, [1.0, 0.99, 2.0].__getitem__, 1e9).place == 0

    def test_what_does_not_run_never_wins(self):
        found = search(3, [None, None, 5.0].__getitem__, 1e9)
        assert found.place == 2 and found.milliseconds == (None, None, 5.0)
        assert search(2, lambda n: None, 1e9).place == 0

    def test_no_candidate_is_begun_after_the_budget(self):
        clock, said = Clock(), []

        def measure(n):
            clock.now += 4.0
            return 10.0 - n

        found = search(9, measure, 10.0, lambda *progress: said.append(progress), clock)
        assert found.milliseconds == (10.0, 9.0, 8.0) and found.place == 2
        assert said == [(0, 0.0), (1, 4.0), (2, 8.0), (3, 12.0)]

    def test_the_first_is_tried_whatever_the_budget(self):
        assert search(3, lambda n: 1.0, 0.0).milliseconds == (1.0,)


def _keep(directory: str, n: int) -> None:
    os.environ["LACOMPILE_CACHE_DIR"] = directory
    kind = dataclasses.replace(KIND, dk=n)
    table.store(ABOUT, kind, table.Winner.of(FOUND[0], [float(n)], True))


class TestTable:
    @pytest.fixture(autouse=True)
    def own_place(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LACOMPILE_CACHE_DIR", str(tmp_path))

    def test_what_is_kept_comes_back(self):
        winner = table.Winner.of(FOUND[1], [2.0, 1.0, None], True)
        table.store(ABOUT, KIND, winner)
        assert table.read(table.stored_path(ABOUT)) == {str(KIND): winner}
        assert winner.place(FOUND) == 1 and winner.place(FOUND[2:]) is None

    def test_processes_that_write_at_the_same_time_lose_nothing(self, tmp_path):
        context = multiprocessing.get_context("fork")
        writers = [context.Process(target=_keep, args=(str(tmp_path), n)) for n in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert sorted(w.milliseconds for w in table.read(table.stored_path(ABOUT)).values()) == [(n,) for n in range(8)]
        assert not list(tmp_path.glob("*.part"))

    @pytest.mark.parametrize("text", ["", "[]", '{"winners": {"a": 1}}', '{"winners": 3}', "{"])
    def test_a_broken_file_is_ignored_and_replaced(self, text, caplog):
        path = table.stored_path(ABOUT)
        path.write_text(text)
        assert table.read(path) == {}
        assert str(path) in caplog.text
        table.store(ABOUT, KIND, table.Winner.of(FOUND[0], [1.0], False))
        assert list(table.read(path)) == [str(KIND)]

    def test_a_failed_write_leaves_the_old_file(self, monkeypatch, tmp_path):
        table.store(ABOUT, KIND, table.Winner.of(FOUND[0], [1.0], True))
        monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
        table.store(ABOUT, KIND, table.Winner.of(FOUND[1], [1.0], True))
        (kept,) = table.read(table.stored_path(ABOUT)).values()
        assert kept.place(FOUND) == 0 and not list(tmp_path.glob("*.part"))

    @pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Identity)])
    def test_another_compiler_gpu_or_source_is_another_file(self, field):
        assert table.stored_path(dataclasses.replace(ABOUT, **{field: "other"})) != table.stored_path(ABOUT)

    def test_the_digest_is_of_the_kernels(self):
        assert len(source_digest()) == 16


class TestChoice:
    @pytest.fixture(autouse=True)
    def somewhere(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LACOMPILE_CACHE_DIR", str(tmp_path / "stored"))
        monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.delenv("LACOMPILE_AUTOTUNE", raising=False)
        choose.forget()
        yield
        choose.forget()

    @staticmethod
    def ship(place):
        table.write(table.shipped_path(ABOUT.gpu), ABOUT, {str(KIND): table.Winner.of(FOUND[place], [1.0], True)})

    @staticmethod
    def chosen(measure=None):
        def never(n):
            raise AssertionError("measured")

        return choose.place(KIND, FOUND, GPU, lambda device: ABOUT, measure or never)

    def test_without_a_table_the_safe_one(self):
        assert self.chosen() == 0

    def test_what_is_shipped_counts_and_what_is_stored_counts_more(self):
        self.ship(2)
        assert self.chosen() == 2
        choose.forget()
        table.store(ABOUT, KIND, table.Winner.of(FOUND[1], [1.0], True))
        assert self.chosen() == 1

    def test_off_is_the_safe_one_whatever_is_known(self, monkeypatch):
        self.ship(2)
        monkeypatch.setenv("LACOMPILE_AUTOTUNE", "off")
        assert self.chosen() == 0

    def test_a_winner_that_may_no_longer_be_chosen_is_not(self):
        odd = table.Winner.of(dataclasses.replace(FOUND[0], stages=9), [1.0], True)
        table.write(table.shipped_path(ABOUT.gpu), ABOUT, {str(KIND): odd})
        assert self.chosen() == 0

    def test_quick_measures_a_few_once_and_only_what_is_not_known(self, monkeypatch):
        monkeypatch.setenv("LACOMPILE_AUTOTUNE", "quick")
        tried = []
        assert self.chosen(lambda n: tried.append(n) or 5.0 - n) == choose.FEW - 1
        assert tried == list(range(choose.FEW))
        assert self.chosen() == choose.FEW - 1
        choose.forget()  # as in the next process
        assert self.chosen() == choose.FEW - 1
        self.ship(0)
        table.stored_path(ABOUT).unlink()
        choose.forget()
        assert self.chosen() == 0

    def test_full_measures_all_of_them_though_one_is_shipped(self, monkeypatch):
        self.ship(0)
        monkeypatch.setenv("LACOMPILE_AUTOTUNE", "full")
        assert self.chosen(lambda n: 9.0 - n) == len(FOUND) - 1
        choose.forget()
        assert self.chosen() == len(FOUND) - 1

    def test_nothing_is_measured_while_a_graph_is_captured(self, monkeypatch):
        monkeypatch.setenv("LACOMPILE_AUTOTUNE", "full")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert self.chosen() == 0

    def test_an_unknown_mode_is_an_error_that_names_the_known_ones(self, monkeypatch):
        monkeypatch.setenv("LACOMPILE_AUTOTUNE", "fast")
        with pytest.raises(BadOptionValue, match="'quick'"):
            self.chosen()


class TestShipped:
    FILES = sorted(table.SHIPPED.glob("*.json"))

    @pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
    def test_every_winner_is_a_candidate_of_its_kind(self, path):
        assert json.loads(path.read_text())["about"]["date"]
        found = table.read(path)
        assert found
        kinds = {
            str(kind): candidates(size, size, torch.bfloat16, descriptors, gradient)
            for size in (64, 128, 256)
            for descriptors in (False, True)
            for per_token in (False, True)
            for use, gradient in (("forward", False), ("backward", False), ("backward", True))
            for kind in [Kind.of(use, size, size, torch.bfloat16, per_token, gradient, descriptors)]
        }
        for name, winner in found.items():
            at = winner.place(kinds[name])
            assert at is not None
            assert at == search(len(winner.milliseconds), winner.milliseconds.__getitem__, 1e9).place


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dk, dv", [(64, 128), (16, 256), (128, 128), (24, 20), (256, 192)])
def test_a_place_is_a_pair_that_one_backward_kernel_can_have(dk, dv, dtype, descriptors):
    there, back = (candidates(*sizes, dtype, descriptors and dtype != torch.float32) for sizes in ((dk, dv), (dv, dk)))
    assert [(t.body, t.chunk) for t in there] == [(t.body, t.chunk) for t in back]
    assert len(set(there)) == len(there)
