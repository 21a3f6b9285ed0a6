"""Options of a study that do not belong together are refused before anything is imported or started."""

import pytest

from megatron_coreward.cli import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rates", "1e-4"], "--rates: found without --study; allowed: with --study stability, rephrasing or methods"),
        (["--methods", "entropy", "--seeds", "1"], "--methods, --seeds: found without --study"),
        (["--study", "stability", "steps=3"], "--study: found with steps=3; allowed: no overrides"),
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
