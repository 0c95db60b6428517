"""The certificate holds here, and every line of it can fail: something is broken, and the line must see it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import yaml
from torch import Tensor, nn

from cmacc.cli import main
from cmacc.encoders import Backbone, Encoding, Modality
from cmacc.negatives import kmeans_plusplus, selectors
from cmacc.pretraining import (
    ObjectiveConfig,
    PretrainConfig,
    Trainer,
    config_from_plain,
    step,
)
from cmacc.pretraining.verify import certificate as certificate_module
from cmacc.pretraining.verify import choice as choice_module
from cmacc.pretraining.verify import cut, subject_of, title, verify
from cmacc.pretraining.verify import lines as lines_module
from cmacc.pretraining.verify import loader as loader_module
from cmacc.pretraining.verify import ranks as ranks_module
from cmacc.pretraining.verify.lines import Line, Subject, compare, trace, trainer_of

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def certificate() -> list[Line]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")  # compiling takes half a minute
        # Thousands of small calls, of which the checks of shapes would be most of the time.
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            return verify(device=CPU)
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def subject() -> Subject:
    return subject_of(device=CPU)


def test_all_lines_hold_on_this_machine(certificate: list[Line]) -> None:
    assert [line for line in certificate if line.passed is False] == []
    assert [line.name for line in certificate if line.passed is None] == ["compiled = eager"]
    assert [line.name for line in certificate if line.name.startswith("2 processes")] == [
        "2 processes = 1, no dictionary",
        "2 processes = 1, dictionary",
        "2 processes = 1, active batches",
    ]
    exact = [line for line in certificate if line.tolerance == 0]
    assert len(exact) == 4  # interrupted runs, and the loader
    assert all(line.difference == 0 for line in exact)
    measured = [(line.difference, line.tolerance) for line in certificate if line.passed]
    assert len(measured) == 12
    assert all(d is not None and t is not None and 0 <= d <= t for d, t in measured)


def _without_momentum(trainer: Trainer) -> None:
    for state in trainer.learner.optimizer.state.values():
        state["exp_avg"].zero_()


def _without_inputs(trainer: Trainer) -> None:
    assert trainer.learner.input_buffer is not None
    trainer.learner.input_buffer = lines_module.trainer_of(trainer.config, CPU, torch.float32).learner.input_buffer


def _without_order(trainer: Trainer) -> None:
    assert trainer.learner.memory is not None
    trainer.learner.memory.epoch.fill_(-1)


@pytest.mark.parametrize(
    ("scenario", "forget"),
    [("dictionary", _without_momentum), ("dictionary", _without_inputs), ("active batches", _without_order)],
)
def test_a_resumed_run_that_lost_something_fails(
    scenario: str, forget: Callable[[Trainer], None], subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = lines_module.resume

    def forgetful(trainer: Trainer, *arguments: Any) -> int:
        first = resume(trainer, *arguments)
        forget(trainer)
        return first

    monkeypatch.setattr(lines_module, "resume", forgetful)
    (line,) = lines_module.interrupted(subject, scenario)
    assert line.passed is False
    assert line.note


def test_several_processes_that_lose_a_factor_of_the_gradient_fail(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By processes of their own, which break it themselves."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # spawned processes get the path
    import broken_ranks  # type: ignore[import-not-found]

    monkeypatch.setattr(ranks_module, "worker", broken_ranks.worker)
    subject.__dict__["scenarios"] = {"no dictionary": subject.scenarios["no dictionary"]}
    (line,) = ranks_module.over_processes(subject, 2)
    assert line.passed is False
    assert "gradient norms differ by 5.0e-01" in line.note


def _half_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(processes: object, encodings: dict[Modality, Encoding]) -> dict[Modality, Encoding]:
        def half(rows: Tensor) -> Tensor:
            return rows.detach() + (rows - rows.detach()) / 2

        return {name: replace(encoding, embedding=half(encoding.embedding)) for name, encoding in encodings.items()}

    monkeypatch.setattr(step, "gather_encodings", gathered)


def _other_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded = step.seeded_rng
    monkeypatch.setattr(step, "seeded_rng", lambda *key: seeded(*key, 1))


@pytest.mark.parametrize(
    ("break_it", "note"), [(_half_gradient, "gradient norms differ by"), (_other_generator, "other audio dictionary")]
)
def test_traces_of_one_process_differ_when_the_step_is_broken(
    break_it: Callable[[pytest.MonkeyPatch], None], note: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the lines over processes compare, without processes."""
    wanted = trace(trainer_of(subject.config, CPU))
    break_it(monkeypatch)
    line = compare("broken", "", trace(trainer_of(subject.config, CPU)), wanted, lines_module.ROUNDING)
    assert line.passed is False
    assert note in line.note


def test_what_depends_on_the_parts_of_a_batch_is_skipped(subject: Subject) -> None:
    config = replace(subject.config, encoder=replace(subject.config.encoder, norm="batch"))
    by_batch = replace(subject, config=config)
    for lines in (lines_module.chunks(by_batch), ranks_module.over_processes(by_batch, 2)):
        assert all("batch norm in the backbones (encoder.norm batch)" in line.result for line in lines)
        assert all(line.passed is None for line in lines)


def test_an_input_norm_over_chunks_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Backbone, inputs: Tensor, prepared: bool = False) -> Tensor:
        return self.pool(self.body(self.prepare(inputs)))

    monkeypatch.setattr(Backbone, "forward", forward)
    (line,) = lines_module.chunks(subject)
    assert line.passed is False


def test_a_compiler_that_computes_something_else_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr(nn.Module, "compile", lambda module: None)
    (line,) = lines_module.compiled(subject)
    assert line.difference == 0
    assert line.passed
    monkeypatch.setattr(
        nn.Module, "compile", lambda module: module.register_forward_hook(lambda *call: 1.05 * call[-1])
    )
    (line,) = lines_module.compiled(subject)
    assert line.passed is False


def test_noise_in_bf16_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Conv3d.forward

    def noisy(module: nn.Conv3d, inputs: Tensor) -> Tensor:
        result = plain(module, inputs)
        return result + result.std() * torch.randn_like(result) if torch.is_autocast_enabled("cpu") else result

    monkeypatch.setattr(nn.Conv3d, "forward", noisy)
    gradients, loss = lines_module.bf16_is_near(subject)
    assert gradients.passed is False
    assert "video.layers" in gradients.note
    assert loss.passed is False


def test_a_gradient_that_is_not_a_number_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = lines_module._backbones

    def spoilt(trainer: Trainer) -> tuple[list[Tensor], dict[str, Tensor]]:
        features, gradients = measured(trainer)
        if trainer.config.precision == "bf16":
            gradients["video.layers.3.weight"][0] = torch.nan
        return features, gradients

    monkeypatch.setattr(lines_module, "_backbones", spoilt)
    gradients, loss = lines_module.bf16_is_near(subject)
    assert gradients.result == "FAILED: video.layers.3.weight"
    assert loss.passed


def _drawn_wrongly(power: float) -> Callable[..., Tensor]:
    """k-means++ whose weights are another power of the distance than the second; 0 is uniform."""

    def draw(points: tuple[Tensor, Tensor], count: int, **options: Any) -> Tensor:
        rows = (points[0][:, :, None] * points[1][:, None, :]).flatten(1)
        eligible = options.get("eligible")
        weights = torch.ones(len(rows)) if eligible is None else eligible.float()
        picks: list[int] = []
        for _ in range(count):
            picks.append(int(torch.multinomial(weights, 1, generator=options["generator"])))
            nearest = torch.cdist(rows, rows[picks]).amin(1)
            weights = nearest**power * (weights > 0)
            weights[picks] = 0
        return torch.tensor(picks)

    return draw


@pytest.fixture
def few_draws(users_checks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice_module, "_DRAWS", 1000)


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("power", [0, 1])
def test_draws_by_another_power_of_the_distance_fail(
    power: int, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice_module, "kmeans_plusplus", _drawn_wrongly(power))
    monkeypatch.setattr(selectors, "kmeans_plusplus", _drawn_wrongly(power))
    for measure in (choice_module.drawn_by_k_means, choice_module.drawn_by_the_dictionary):
        (line,) = measure(subject)
        assert line.difference is not None
        assert line.passed is False


@pytest.mark.usefixtures("few_draws")
def test_other_gradients_or_forbidden_samples_in_the_choice_fail(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = selectors.gradient_factors
    with monkeypatch.context() as patch:
        patch.setattr(selectors, "gradient_factors", lambda *given: factors(*given[:3], "feature"))
        (line,) = choice_module.drawn_by_the_dictionary(subject)
        assert line.passed is False
    monkeypatch.setattr(
        selectors, "kmeans_plusplus", lambda *given, eligible, **options: kmeans_plusplus(*given, **options)
    )
    (line,) = choice_module.drawn_by_the_dictionary(subject)
    assert "which is impossible" in line.note


@pytest.mark.parametrize(
    ("broken", "failing"),
    [
        (lambda options: {"rank": 0}, "loader, parts of processes = whole batches"),
        (
            lambda options: {"first_step": 1, "last_step": 4} if options["workers"] == 2 else {},
            "loader, workers = none",
        ),
    ],
)
def test_a_loader_that_gives_other_clips_fails(
    broken: Callable[[dict[str, Any]], dict[str, int]],
    failing: str,
    subject: Subject,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = loader_module.training_loader
    monkeypatch.setattr(
        loader_module, "training_loader", lambda *given, **options: load(*given, **options | broken(options))
    )
    lines = loader_module.loader_order(subject)
    assert [line.name for line in lines if line.passed is False] == [failing]
    monkeypatch.setattr(loader_module, "_can_write_videos", lambda: False)
    assert {line.result for line in loader_module.loader_order(subject)} == {"skipped: PyAV is not installed"}


def test_a_line_that_raises_has_failed_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Line]:
        raise RuntimeError("\n\n-- Process 0 terminated:\nTraceback ...\nValueError: no such thing\n")

    monkeypatch.setattr(
        certificate_module,
        "_groups",
        lambda subject: [("first", broken), ("second", lambda: [Line("second", "x", 0.0, 0.0, True)])],
    )
    told: list[tuple[str, int, int]] = []
    first, second = verify(device=CPU, progress=lambda *what: told.append(what))
    assert first.result == "FAILED: RuntimeError: ValueError: no such thing"
    assert second.passed
    assert told == [("lines", 0, 2), ("lines", 1, 2), ("lines", 2, 2)]


def test_what_is_not_a_number_or_not_there_is_a_difference() -> None:
    wanted = {"losses": torch.tensor([1.0, 2.0]), "ids": torch.tensor([1, 2])}
    assert compare("", "", dict(wanted), wanted, 0.0).passed
    for change in (
        {"losses": torch.tensor([torch.nan, 2.0])},
        {"losses": torch.tensor([1.0])},
        {"ids": wanted["ids"][:1]},
    ):
        assert compare("", "", wanted | change, wanted, 1.0).passed is False
    assert compare("", "", {"losses": wanted["losses"]}, wanted, 1.0).note == "other ids"


def test_a_run_that_compares_nothing_is_no_certificate(subject: Subject) -> None:
    with pytest.raises(RuntimeError, match="no loss or no choice within the steps"):
        trace(trainer_of(subject.config, CPU), 1)
    with pytest.raises(RuntimeError, match="no active batch within the steps"):
        trace(trainer_of(subject.scenarios["active batches"], CPU), 2)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_can_be_cut(file: Path) -> None:
    config = config_from_plain(yaml.safe_load(file.read_text()))
    if config.objective.terms.cross_modal == 0:
        with pytest.raises(ValueError, match=r"^verify: objective\.terms must be cross_modal alone, got within_modal$"):
            subject_of(config, device=CPU)
        return
    for processes in (1, 2, 5, 16):
        small = subject_of(config, device=CPU, processes=processes)
        assert small.config.optim.batch_size == (16 if processes == 16 else 8)
        assert small.config.data.clip == config.data.clip
        assert small.config.encoder == config.encoder
        assert set(small.scenarios) == {"no dictionary", "dictionary", "active batches"}
    assert cut(small.config, 16) == small.config
    assert "batches of 16, dictionaries of 48, pools of 64" in title(small)


def test_the_papers_loss_has_something_to_compare(subject: Subject) -> None:
    """Without negatives in the batch, there is no loss at first."""
    objective = ObjectiveConfig(in_batch=False, batch_keys="momentum", decoupled=False)
    paper = replace(subject, config=replace(subject.config, objective=objective))
    (line,) = lines_module.chunks(paper)
    assert line.passed
    assert all(line.passed for line in lines_module.bf16_is_near(paper))


def test_the_command_prints_a_table_or_json_and_its_exit_code_says_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = [Line("first", "this [and] that", 1e-12, 1e-9, True, "", 2.5), Line.skipped("second", "no compiler")]
    given: list[tuple[PretrainConfig | None, int]] = []

    def fake(config: PretrainConfig | None, *, processes: int, progress: object) -> list[Line]:
        given.append((config, processes))
        return lines

    monkeypatch.setattr("cmacc.pretraining.verify.verify", fake)
    assert main(["verify"]) == 0
    table = capsys.readouterr().out
    for text in ("this [and] that", "1e-12", "ok", "skipped: no compiler", "2.5", "batches of 8"):
        assert text in table
    lines.append(Line("third", "losses", float("nan"), 1e-9, False, "losses differ by nan"))
    assert main(["verify", "--json", "--processes", "4"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["passed"] is False
    assert [line["passed"] for line in found["lines"]] == [True, None, False]
    settings = tmp_path / "settings.yaml"
    settings.write_text("objective: {temperature: 0.05}\n")
    assert main(["verify", "--config", str(settings)]) == 1
    assert [processes for _, processes in given] == [2, 4, 2]
    assert given[-1][0] == PretrainConfig(objective=ObjectiveConfig(temperature=0.05))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "processes must be at least 1, got 0"),
        (["--config", "SETTINGS"], "optim.batch_sise"),
        (["--config", "no-such-file.yaml"], "no-such-file.yaml"),
    ],
)
def test_errors_of_the_command(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("optim: {batch_sise: 4}\n")
    assert main(["verify", *(str(settings) if text == "SETTINGS" else text for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_lines_by_number_of_processes() -> None:
    names = [name for name, _ in certificate_module._groups(subject_of(device=CPU, processes=6))]
    assert [name for name in names if "processes" in name] == ["2 processes = 1", "4 processes = 1"]
    names = [name for name, _ in certificate_module._groups(subject_of(device=CPU, processes=1))]
    assert not [name for name in names if "processes" in name]
