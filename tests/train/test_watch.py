from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tailseg.core import Progress, StepOutput, Task
from tailseg.train.host_copy import HostCopy
from tailseg.train.metrics_log import read_metrics
from tailseg.train.watch import Watch

TASK = Task(("background", "liver", "spleen", "adrenal"), 1, 3, (2.0, 2.0, 2.0), (9000, 900, 99, 1))
TOTAL = 40


def make_watch(folder: Path, *, out: io.StringIO | None = None, **options) -> Watch:
    console = Console(file=out or io.StringIO(), width=40)
    return Watch(folder, TASK, **{"log_every": 5, "alarm_after": 10, "console": console, **options})


def run(watch: Watch, start: int, stop: int, *, predicted=(50, 5, 5, 5), logs=None) -> None:
    """Steps start+1 to stop; the loss of step s is s, so that a mean tells its steps."""
    for step in range(start, stop):
        losses = {"sup": torch.tensor(step + 1.0), "cps": torch.tensor(0.5, requires_grad=True)}
        output = StepOutput(losses, torch.tensor(predicted), logs or {})
        watch.step(Progress(step, TOTAL, steps_per_epoch=10), output, lr=0.1)


def kinds(folder: Path, kind: str) -> list[dict]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == kind]


def test_a_train_line_holds_means_since_the_line_before(tmp_path):
    logs = {"ramp": torch.tensor(2.0), "weight": torch.tensor([1.0, 2.0, float("nan"), 4.0])}
    with make_watch(tmp_path) as watch:
        run(watch, 0, 12, logs=logs)
    first, second = kinds(tmp_path, "train")
    assert (first["step"], first["epoch"], first["lr"]) == (5, 1, 0.1)
    assert first["losses"] == {"sup": 3.0, "cps": 0.5}
    assert (second["step"], second["losses"]["sup"]) == (10, 8.0)
    assert second["logs"]["ramp"] == 2.0
    assert second["logs"]["weight"] == {"background": 1.0, "liver": 2.0, "spleen": None, "adrenal": 4.0}
    assert 0 <= second["seconds_per_step"] < 1


def test_a_train_line_tells_what_share_of_the_predictions_each_class_had(tmp_path):
    with make_watch(tmp_path) as watch:
        run(watch, 0, 3, predicted=(60, 20, 10, 10))
        run(watch, 3, 5, predicted=(100, 0, 0, 0))
    (line,) = kinds(tmp_path, "train")
    assert line["predicted"] == pytest.approx({"background": 0.76, "liver": 0.12, "spleen": 0.06, "adrenal": 0.06})


def test_a_validation_line_tells_how_long_it_took(tmp_path):
    with make_watch(tmp_path) as watch:
        run(watch, 0, 10)
        time.sleep(0.02)
        watch.validation(Progress(10, TOTAL, 10), [0.5, 0.2, 0.1], is_best=True)
        watch.validation(Progress(10, TOTAL, 10), [0.5, 0.2, 0.1], is_best=False)
    timed, untimed = kinds(tmp_path, "validation")
    assert 0.02 <= timed["seconds"] < 5
    assert untimed["seconds"] is None


def test_a_loss_given_in_some_steps_only_is_averaged_over_those(tmp_path):
    with make_watch(tmp_path, log_every=2) as watch:
        for step, losses in enumerate(({"a": torch.tensor(1.0)}, {"a": torch.tensor(3.0), "b": torch.tensor(8.0)})):
            watch.step(Progress(step, TOTAL, 10), StepOutput(losses, torch.ones(4)), lr=0.1)
    assert kinds(tmp_path, "train")[0]["losses"] == {"a": 2.0, "b": 8.0}


def test_the_last_step_is_logged_even_between_two_lines(tmp_path):
    with make_watch(tmp_path, log_every=15) as watch:
        run(watch, 0, TOTAL)
    assert [line["step"] for line in kinds(tmp_path, "train")] == [15, 30, 40]


def test_every_line_is_readable_at_once(tmp_path):
    watch = make_watch(tmp_path)
    run(watch, 0, 5)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    watch.close()


def test_a_log_that_is_neither_scalar_nor_per_class_is_refused(tmp_path):
    with make_watch(tmp_path) as watch, pytest.raises(ValueError, match=r"log 'queue' has shape \(7,\)"):
        run(watch, 0, 1, logs={"queue": torch.zeros(7)})


@pytest.mark.parametrize("next_", ["step", "validation", "checkpoint", "end"])
def test_a_line_whose_numbers_are_still_on_the_device_is_written_with_what_comes_next(
    tmp_path, monkeypatch, next_: str
):
    monkeypatch.setattr(HostCopy, "here", property(lambda copy: False))
    with make_watch(tmp_path) as watch:
        run(watch, 0, 5)
        assert kinds(tmp_path, "train") == []
        if next_ == "step":
            run(watch, 5, 6, predicted=(0, 0, 0, 65))
        elif next_ == "validation":
            watch.validation(Progress(5, TOTAL, 5), [0.5, 0.5, 0.5], is_best=True)
        elif next_ == "checkpoint":
            watch.state_dict()
        else:
            watch.close()
        (line,) = kinds(tmp_path, "train")
    assert (line["step"], line["losses"]["sup"]) == (5, 3.0)
    assert line["predicted"]["background"] == pytest.approx(50 / 65)
    assert kinds(tmp_path, "train") == [line]


def test_between_two_lines_no_step_reads_the_device(tmp_path):
    on_device = torch.ones(4, device="meta")  # has no values: reading one raises
    output = StepOutput({"sup": on_device.sum()}, on_device, {"weight": on_device})
    with make_watch(tmp_path, log_every=TOTAL) as watch:
        for step in range(TOTAL - 1):
            watch.step(Progress(step, TOTAL, 10), output, lr=0.1)
        with pytest.raises(NotImplementedError, match="meta"):
            watch.step(Progress(TOTAL - 1, TOTAL, 10), output, lr=0.1)


def test_validation_names_classes_and_keeps_the_best(tmp_path):
    out = io.StringIO()
    with make_watch(tmp_path, out=out) as watch:
        watch.validation(Progress(10, TOTAL, 10), [0.9, 0.5, float("nan")], is_best=True)
        watch.validation(Progress(20, TOTAL, 10), [0.8, 0.4, 0.0], is_best=False)
    first, second = kinds(tmp_path, "validation")
    assert (first["step"], first["epoch"], first["best"]) == (10, 1, True)
    assert first["dice"] == {"liver": 0.9, "spleen": 0.5, "adrenal": None}
    assert first["mean"] == pytest.approx(0.7)
    assert (second["epoch"], second["mean"], second["best"]) == (2, pytest.approx(0.4), False)
    assert "validation epoch 2/4  Dice 0.400 (best 0.700)" in out.getvalue()
    assert "liver 0.800  spleen 0.400  *adrenal 0.000" in out.getvalue()
    assert "*adrenal no case" in out.getvalue()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    with make_watch(tmp_path) as watch:
        run(watch, 0, 20)
        watch.validation(Progress(20, TOTAL, 10), [0.9, 0.9, 0.9], is_best=True)
        state = watch.state_dict()
        run(watch, 20, 33)
        watch.validation(Progress(33, TOTAL, 10), [1.0, 1.0, 1.0], is_best=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # killed while writing

    out = io.StringIO()
    with make_watch(tmp_path, out=out) as resumed:
        resumed.load_state_dict(state)
        run(resumed, 20, 30)
        resumed.validation(Progress(30, TOTAL, 10), [0.5, 0.5, 0.5], is_best=False)
    assert [line["step"] for line in kinds(tmp_path, "train")] == [5, 10, 15, 20, 25, 30]
    assert [line["step"] for line in kinds(tmp_path, "validation")] == [20, 30]
    assert "(best 0.900)" in out.getvalue()
    assert list(tmp_path.glob(".*")) == []


def test_a_new_run_in_the_folder_starts_an_empty_log(tmp_path):
    for _ in range(2):
        with make_watch(tmp_path) as watch:
            run(watch, 0, 10)
    assert [line["step"] for line in kinds(tmp_path, "train")] == [5, 10]


def test_a_log_with_a_broken_line_inside_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        run(make_watch(tmp_path), 0, 1)


def test_the_alarm_names_a_class_that_is_never_predicted_and_clears(tmp_path):
    out = io.StringIO()
    with make_watch(tmp_path, out=out) as watch:
        run(watch, 0, 15, predicted=(50, 5, 5, 0))
        assert out.getvalue().count("ALARM: Class 'adrenal' has not been predicted for 10 steps") == 1
        assert "0.0100% of the labelled voxels" in out.getvalue()
        assert "method.weighter_a=dist" in out.getvalue()
        run(watch, 15, 20)
    assert "Class 'adrenal' is predicted again." in out.getvalue()
    alarms = kinds(tmp_path, "alarm")
    assert [(line["step"], line["class"], line["absent_steps"]) for line in alarms] == [(10, "adrenal", 10)]
    assert alarms[0]["share"] == pytest.approx(1 / 10000)
    assert [(line["step"], line["class"]) for line in kinds(tmp_path, "alarm_cleared")] == [(20, "adrenal")]


def test_the_alarm_repeats_at_most_every_alarm_after_steps(tmp_path):
    with make_watch(tmp_path) as watch:
        run(watch, 0, TOTAL, predicted=(50, 0, 5, 5))
    assert [line["step"] for line in kinds(tmp_path, "alarm")] == [10, 20, 30, 40]


def test_a_class_seen_now_and_then_raises_no_alarm(tmp_path):
    with make_watch(tmp_path) as watch:
        for step in range(TOTAL):
            run(watch, step, step + 1, predicted=(50, 5, 5, int(step % 9 == 8)))
    assert kinds(tmp_path, "alarm") == []


def test_the_alarm_counts_on_after_a_resume(tmp_path):
    with make_watch(tmp_path) as watch:
        run(watch, 0, 8, predicted=(50, 5, 5, 0))
        torch.save(watch.state_dict(), tmp_path / "state.pt")
    with make_watch(tmp_path) as resumed:
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        run(resumed, 8, 10, predicted=(50, 5, 5, 0))
    assert [line["step"] for line in kinds(tmp_path, "alarm")] == [10]


def test_a_class_without_labelled_voxels_is_said_to_be_unlearnable(tmp_path):
    out = io.StringIO()
    task = Task(TASK.classes, 1, 3, TASK.spacing, (9000, 900, 99, 0))
    with Watch(tmp_path, task, log_every=5, alarm_after=10, console=Console(file=out)) as watch:
        run(watch, 0, 10, predicted=(50, 5, 5, 0))
    assert "no labelled training case holds it" in out.getvalue()
    assert "weighter" not in out.getvalue()


def test_without_a_terminal_the_run_is_plain_whole_lines(tmp_path):
    out = io.StringIO()
    with make_watch(tmp_path, out=out, plain_every=0.0) as watch:
        run(watch, 0, 6)
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/40" for step in range(1, 7)]
    assert lines[-1].endswith("left  sup 3  cps 0.5  lr 0.1")


def test_plain_lines_keep_their_distance(tmp_path):
    out = io.StringIO()
    with make_watch(tmp_path, out=out, plain_every=3600) as watch:
        run(watch, 0, TOTAL)
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/40", "step 40/40"]


def test_on_a_terminal_a_bar_shows_step_epoch_losses_and_dice(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=True, width=160, _environ={})
    with make_watch(tmp_path, console=console) as watch:
        run(watch, 0, 10, predicted=(50, 5, 5, 0))
        watch.validation(Progress(10, TOTAL, 10), [0.9, 0.5, 0.1], is_best=True)
        run(watch, 10, 11)
    for text in ("11/40", "epoch 2/4", "sup 8", "lr 0.1", "Dice 0.500 (best 0.500)", "alarm", "not been predicted"):
        assert text in out.getvalue()


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with make_watch(tmp_path) as watch:
        run(watch, 0, 10, logs={"weight": torch.arange(4.0)})
        watch.validation(Progress(10, TOTAL, 10), [0.9, 0.5, float("nan")], is_best=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss/sup")] == [(5, 3.0), (10, 8.0)]
    assert events.Scalars("weight/adrenal")[0].value == 3.0
    assert events.Scalars("dice/mean")[0].value == pytest.approx(0.7)
    assert "dice/adrenal" not in events.Tags()["scalars"]


def test_other_processes_write_and_print_nothing(tmp_path):
    out = io.StringIO()
    with make_watch(tmp_path / "run", out=out, enabled=False, plain_every=0.0) as watch:
        run(watch, 0, 20, predicted=(50, 5, 5, 0))
        watch.validation(Progress(20, TOTAL, 10), [0.9, 0.5, 0.1], is_best=True)
    assert not (tmp_path / "run").exists()
    assert out.getvalue() == ""


def test_every_line_is_json_without_nan(tmp_path):
    with make_watch(tmp_path) as watch:
        run(watch, 0, 5, logs={"spread": torch.tensor(float("inf"))})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text)["logs"]["spread"] is None
