"""A study runs the cells that are missing, each with its own settings, and one that was cut off begins again."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_coreward.config.load import dump_config
from megatron_coreward.config.schema import RunConfig
from megatron_coreward.data.parquet import read_rows
from megatron_coreward.demo import rephrasings, stability, study
from megatron_coreward.demo.study import run_cells
from megatron_coreward.errors import InputError


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "stop_ray", lambda: None)
    monkeypatch.setattr(study, "write_start", lambda console, run_dir, seed, splits: run_dir / f"start-{seed}")


class Runner:
    """Writes what a run leaves behind; dies at the cell `fails`."""

    def __init__(self, fails: int | None = None) -> None:
        self.configs: list[RunConfig] = []
        self.fails = fails

    def __call__(self, config: RunConfig) -> None:
        self.configs.append(config)
        (config.run_dir / "metrics.jsonl").write_text("")
        (config.run_dir / "config.yaml").write_text(dump_config(config))
        if len(self.configs) == self.fails:
            raise KeyboardInterrupt
        (config.run_dir / "hf").mkdir()
        (config.run_dir / "hf" / "config.json").write_text("{}")


def names(runner: Runner) -> list[str]:
    return ["/".join(config.run_dir.parts[-3:]) for config in runner.configs]


def test_a_study_that_was_cut_off_goes_on_with_the_cell_that_it_had_begun(tmp_path: Path) -> None:
    cells = stability.cells(["majority_voting", "entropy"], [1e-4, 2e-4], [1])
    first, second, third = Runner(fails=2), Runner(), Runner()
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_cells(tmp_path, "stability", cells, first, lambda cell, target: done.append(cell.name))
    assert done == ["majority_voting/lr-0.0001"]
    run_dirs = run_cells(tmp_path, "stability", cells, second)
    run_cells(tmp_path, "stability", cells, third)
    assert names(first) == ["majority_voting/lr-0.0001/seed-1", "entropy/lr-0.0001/seed-1"]
    assert names(second) == [
        "entropy/lr-0.0001/seed-1",
        "majority_voting/lr-0.0002/seed-1",
        "entropy/lr-0.0002/seed-1",
    ]
    assert names(third) == []
    assert [run_dir.relative_to(tmp_path / "stability").as_posix() for run_dir in run_dirs] == [
        f"{cell.name}/seed-1" for cell in cells
    ]


def test_a_cell_whose_settings_are_others_now_is_run_again_and_one_that_was_moved_is_not(tmp_path: Path) -> None:
    (cell,) = stability.cells(["entropy"], [1e-4], [1])
    longer = replace(cell, overrides=(*cell.overrides, "steps=226"))
    first, second, third = Runner(), Runner(), Runner()
    run_cells(tmp_path / "here", "stability", [cell], first)
    run_cells(tmp_path / "here", "stability", [longer], second)
    assert [runner.configs[0].steps for runner in (first, second)] == [225, 226]
    (tmp_path / "here").rename(tmp_path / "there")
    run_cells(tmp_path / "there", "stability", [longer], third)
    assert names(third) == []


def test_every_method_gets_the_same_rates_seeds_and_budget() -> None:
    cells = stability.cells()
    assert len(cells) == len(stability.ARMS) * 3 * 3 == len({(cell.name, cell.seed) for cell in cells})
    assert [cell.seed for cell in cells] == [1] * 21 + [2] * 21 + [3] * 21  # a part of the study is one seed of all
    rates: dict[str, set[str]] = {}
    for cell in cells:
        arm, rate = cell.name.split("/")
        rates.setdefault(arm, set()).add(rate)
        assert set(stability.SETTINGS) < set(cell.overrides)
    assert rates == {arm: {"lr-0.0001", "lr-0.0002", "lr-5e-05"} for arm in stability.ARMS}
    assert stability.STEPS >= 3 * 75


def test_a_cell_trains_with_its_own_settings_from_the_start_of_its_seed(tmp_path: Path) -> None:
    runner = Runner()
    run_cells(tmp_path, "stability", stability.cells(["co_rewarding_ii_without_ema"], [2e-4], [3]), runner)
    (config,) = runner.configs
    assert (config.method, config.seed, config.steps, config.actor.lr) == ("co_rewarding_ii", 3, 225, 2e-4)
    assert (config.teacher.decay_start, config.teacher.decay_end, config.data.batch_size) == (0, 0, 8)
    assert config.model.hf_path == tmp_path / "start-3"
    assert len(read_rows(config.data.train_files[0])) == study.TRAINED_QUESTIONS


def test_an_unknown_method_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match="--methods: found 'voodoo'; allowed: ground_truth, majority_voting"):
        stability.cells(["voodoo"])


def test_damaged_rephrasings_reach_the_run_and_the_filter_takes_them_out(tmp_path: Path) -> None:
    runner = Runner()
    run_cells(tmp_path, "rephrasing", rephrasings.cells([0.5], [1]), runner)
    plain, filtered = (
        [row.messages[0]["content"] for row in read_rows(config.data.rephrased_files[0])] for config in runner.configs
    )
    assert len(plain) == study.TRAINED_QUESTIONS
    assert len(filtered) < 0.6 * len(plain)
    assert [config.method for config in runner.configs] == ["co_rewarding_i"] * 2


def test_the_rephrasing_study_has_each_share_with_and_without_the_filter() -> None:
    found = sorted(cell.name for cell in rephrasings.cells(seeds=[1]))
    assert found == [
        "damage-0",
        "damage-0.1",
        "damage-0.1-filtered",
        "damage-0.25",
        "damage-0.25-filtered",
        "damage-0.5",
        "damage-0.5-filtered",
    ]
