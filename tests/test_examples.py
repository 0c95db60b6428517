"""The examples run, and what they show is so."""

import runpy
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_active_dictionary_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out retrieval rises far above chance (0.002) with both selectors, and the table is printed."""
    main = runpy.run_path(str(EXAMPLES / "01_active_dictionary.py"))["main"]
    results = main(steps=100)
    assert set(results) == {"newest", "active"}
    for result in results.values():
        assert result["recall_before"] < 0.02
        assert result["recall_after"] > 0.1
        assert result["loss_after"] < result["loss_before"] - 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert f"{results['active']['recall_after']:.3f}" in printed[2]


@pytest.mark.slow
def test_badge_example_beats_random_labels(capsys: pytest.CaptureFixture[str]) -> None:
    """After 120 labels, mean of 4 seeds; ten seeds give a gap several times the spread of the mean."""
    main = runpy.run_path(str(EXAMPLES / "02_badge.py"))["main"]
    results = main(seeds=4)
    assert results["badge"][0] == results["random"][0]
    assert results["badge"][-1] > results["random"][-1] + 0.03
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.slow
def test_own_encoder_example_stands_beside_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "03_own_encoder.py"))["main"]
    loudness, statistics = main()
    assert loudness.data == statistics.data
    row = next(row for row in loudness.results if row.protocol == "linear")
    assert row.low > row.chance
    assert "| labelled | linear@1 | audio | accuracy |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("users_checks")  # for speed
def test_own_problem_example_finds_the_other_half(capsys: pytest.CaptureFixture[str]) -> None:
    """Chance is 0.003; untrained encoders find hardly more."""
    main = runpy.run_path(str(EXAMPLES / "04_own_problem.py"))["main"]
    before, after = main()
    assert before < 0.05
    assert after > 0.2
    assert f"{after:.3f} trained" in capsys.readouterr().out


@pytest.mark.slow
def test_active_batches_example_finds_more_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    """Five worlds, paired, one-sided t test at 0.05; chance is 0.002."""
    main = runpy.run_path(str(EXAMPLES / "05_active_batches.py"))["main"]
    results = main()
    assert min(results["random"]) > 0.1
    assert ttest_rel(results["active"], results["random"], alternative="greater").pvalue < 0.05
    assert len(capsys.readouterr().out.splitlines()) == 3
