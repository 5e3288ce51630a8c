"""The command line: what each command prints, exit codes, and one line for every error."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import frostline
from frostline.cli import app
from frostline.cli.replay import parse_options
from frostline.clock import process_start
from frostline.errors import ConfigError, FrostlineError
from tests.recipes.workbench import BLOCKS, recipe_content, write_recipe_file

COMMAND = [sys.executable, "-m", "frostline"]


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_is_quick_and_teaches() -> None:
    code = "import sys, frostline.cli as c; print([m for m in ('transformers', 'datasets') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    for arguments, example in (
        (["--help"], "frostline run trec-demo"),
        (["run", "--help"], "freeze.percentile=75"),
        (["run", "--help"], "interlayer (SlimFit)"),
        (["run", "--help"], "freeze.policy=interlayer memory.level=slimfit"),
    ):
        code_, out, _ = invoke(*arguments)
        assert code_ == 0
        assert example in out


def test_version() -> None:
    assert invoke("--version") == (0, f"frostline {frostline.__version__}\n", "")


def test_recipes_are_listed_shown_and_copied(tmp_path: Path) -> None:
    code, out, _ = invoke("recipes", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "20newsgroups", "fashion-mnist", "fashion-mnist-cnn", "movie", "reuters8", "trec", "trec-demo",
    ]  # fmt: skip
    code, shown, _ = invoke("recipes", "show", "trec")
    assert shown.startswith("# MiniLM on TREC-6")
    assert invoke("recipes", "copy", "trec", tmp_path)[0] == 0
    assert (tmp_path / "trec.yaml").read_text() == shown
    code, _, err = invoke("recipes", "copy", "trec", tmp_path / "trec.yaml")
    assert code == 2
    assert "exists already" in err


def test_fetch_lists_assets_and_names_close_matches() -> None:
    code, out, _ = invoke("fetch")
    assert code == 0
    assert "minilm" in out
    code, _, err = invoke("fetch", "minlm")
    assert code == 2
    assert "did you mean 'minilm'" in err


def test_a_run_and_everything_that_reads_it(workbench: Path) -> None:
    recipe = write_recipe_file(workbench / "tiny.yaml", recipe_content(workbench))
    ended = subprocess.run([*COMMAND, "run", str(recipe), "baseline=full"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    folder = workbench / "run"
    assert "test accuracy" in ended.stdout
    assert f"next: frostline report {folder}" in ended.stdout
    assert "depth 3/4" in ended.stderr  # the progress bar
    assert "Warning" not in ended.stderr
    summary = json.loads((folder / "summary.json").read_text())
    # Counted from the start of the process: importing torch and transformers alone takes this long.
    assert summary["seconds"]["other"] > 1.0

    code, out, _ = invoke("compare", folder, folder / "baseline")
    assert code == 0
    assert "gradient-norm" in out
    code, out, _ = invoke("replay", folder, "--policy", "gradient-norm", "--percentile", "60")
    assert code == 0
    assert "no divergence" in out
    assert "percentile=60" in out
    code, out, _ = invoke("report", folder)
    assert code == 0
    assert out.strip() == str(folder / "report.html")
    assert "<svg" in (folder / "report.html").read_text()


def test_ctrl_c_says_how_to_go_on(workbench: Path) -> None:
    content = recipe_content(workbench)
    # Seconds of training after the first checkpoint, so that Ctrl-C comes in time on a busy machine too.
    content["training"] |= {"num_train_epochs": 60, "save_strategy": "steps", "save_steps": 100, "eval_strategy": "no"}
    recipe = write_recipe_file(workbench / "tiny.yaml", content)
    with subprocess.Popen(
        [*COMMAND, "run", str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Tests that run in the background of a script inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        state = workbench / "run" / "checkpoints" / "checkpoint-100" / "trainer_state.json"
        deadline = time.monotonic() + 120
        while not state.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "resume=true continues from the last checkpoint" in err.splitlines()[-1]
    code, out, err = invoke("run", recipe, "resume=true")
    assert code == 0, err
    assert "720 steps" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["freeze.policy=gradnorm"], "unknown policy 'gradnorm': did you mean 'gradient-norm'"),
        (["freeze.percentile=101"], "percentile=101: Input should be less than or equal to 100"),
        (["model=minilmm"], "did you mean 'minilm'"),
        (["training.learning_rat=1"], "did you mean 'learning_rate'"),
        (["data.text_column=txt"], "unknown column 'txt'"),
        (["freeze={policy: static, depth: 4}"], str(BLOCKS)),
        (["output_dir=/proc/frostline/run"], "cannot be written"),
        (["resume=true"], "nothing to resume"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(workbench: Path, arguments: list[str], message: str) -> None:
    recipe = write_recipe_file(workbench / "tiny.yaml", recipe_content(workbench))
    code, _, err = invoke("run", recipe, *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("tiny ")]  # the progress bar
    assert code == 2
    assert [line for line in lines if line][-1].startswith("error: ")
    assert message in err
    assert sum("error: " in line for line in lines) == 1
    assert not (workbench / "run").exists()


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("train", [], "empty"),
        ("train", [{"text": None, "label": "sea"}, {"text": "b", "label": "sky"}], "row 1 has no text"),
        ("train", [{"text": "a", "label": "sea"}, {"text": "b", "label": "sea"}], "one class only"),
        ("test", [{"text": "a", "label": "moon"}], "label that train lacks"),
    ],
)
def test_bad_data_are_one_line_and_leave_nothing(
    workbench: Path, file: str, rows: list[dict[str, str]], message: str
) -> None:
    (workbench / "data" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe_file(workbench / "tiny.yaml", recipe_content(workbench))
    code, out, err = invoke("run", recipe)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (workbench / "run").exists()


def test_a_missing_run_is_one_line(tmp_path: Path) -> None:
    for arguments in (["report", "RUN"], ["compare", "RUN", "RUN"], ["replay", "RUN"]):
        code, out, err = invoke(*(str(tmp_path / "nothing") if word == "RUN" else word for word in arguments))
        assert (code, out) == (2, "")
        assert err.startswith("error: no run at")
        assert err.count("\n") == 1


def test_the_debug_variable_lets_the_traceback_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_DEBUG", "1")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert isinstance(result.exception, FrostlineError)


def test_options_of_a_replayed_policy() -> None:
    words = ["--percentile", "75", "--evaluations-per-epoch=4", "--fraction", "5e-1"]
    assert parse_options(words) == {"percentile": 75, "evaluations_per_epoch": 4, "fraction": 0.5}
    for wrong in (["percentile", "75"], ["--percentile"], ["--percentile", "--x=1"]):
        with pytest.raises(ConfigError, match="--percentile"):
            parse_options(wrong)


def test_the_start_of_the_process_is_before_now() -> None:
    assert 0 < time.time() - process_start() < 3600
