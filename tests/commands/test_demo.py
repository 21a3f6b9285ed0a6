"""Options of a study that do not belong together are refused before anything is imported or started."""

import pytest

from megatron_coreward.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rates", "1e-4"], "--rates: found without --study; allowed: with --study stability, rephrasing or methods"),
        (["--methods", "entropy", "--seeds", "1"], "--methods, --seeds: found without --study"),
        (["--study", "stability", "steps=3"], "--study: found with steps=3; allowed: no overrides"),
        (
            ["--study", "stability", "--method", "entropy", "--seed", "0"],
            "--method, --seed: found with --study; allowed: without it, or --methods and --seeds with it",
        ),
        (["--study", "rephrasing", "--compare"], "--compare: found with --study; allowed: without it"),
        (
            ["--compare", "--method", "entropy"],
            "--method: found with --compare, which runs the paper's seven; allowed:",
        ),
        (
            ["--study", "stability", "--recorded", "x", "--seeds", "1"],
            "--seeds: found with --recorded, which draws all runs",
        ),
        (["--study", "rephrasing", "--rates", "1e-4"], "--methods, --rates: found with --study rephrasing"),
        (["--study", "stability", "--methods", "voodoo"], "--methods: found 'voodoo'; allowed: ground_truth,"),
        (["--study", "stability", "--recorded", "nowhere"], "nowhere: found no recorded run (*.csv.gz)"),
    ],
)
def test_what_does_not_belong_together(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_forecast_refuses_a_factor_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forecast", "recipe.yaml", "--rate-factor", "0.5"]) == 2
    assert "--rate-factor: found 0.5; allowed: 1 to 100" in capsys.readouterr().err


def test_a_demo_that_names_nothing_has_the_method_and_seed_of_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_coreward.demo import run

    called: list[tuple[object, ...]] = []
    monkeypatch.setattr(run, "demo", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(run, "compare", lambda *arguments: called.append(arguments))
    for more in ([], ["--seed", "0", "--method", "entropy"], ["--compare"]):
        assert main(["demo", *more]) == 0
    assert [words[:1] + words[2:3] for words in called] == [("co_rewarding_i", 1), ("entropy", 0), (called[2][0], [])]
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "method to train with (default: co_rewarding_i)" in shown
    assert "random seed of weights, data and rollouts (default: 1)" in shown
