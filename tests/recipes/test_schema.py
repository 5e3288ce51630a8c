"""Recipes: what they may say, overrides, and errors that come all at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from frostline.cache import CacheOptions
from frostline.errors import ConfigError
from frostline.memory import MemoryOptions
from frostline.packing import PackOptions
from frostline.recipes import recipe_names, recipe_summary
from frostline.recipes.document import apply_overrides, parse_yaml
from frostline.recipes.schema import Recipe, Schedule, load_recipe
from frostline.tasks.data import ImageSpec, TextSpec
from frostline.tasks.registry import TASKS
from tests.recipes.workbench import recipe_content, write_recipe_file


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_says_what_it_shows(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.directory == Path(f"runs/{name}-seed0")
    assert recipe.freeze.policy == "gradient-norm"
    assert recipe_summary(name).endswith((".", ")."))


def test_trec_has_the_published_rule_and_schedule() -> None:
    recipe = load_recipe("trec")
    assert recipe.model == "minilm"
    assert recipe.data.source == "trec"
    own = {"initial_depth": 2, "start": 0.65}
    assert recipe.freeze.options == {"percentile": 75, "evaluations_per_epoch": 10, **own}
    assert recipe.schedule == Schedule(at=[0.3, 0.6], factor=[0.7, 0.4])
    given = {"num_train_epochs": 4, "per_device_train_batch_size": 16, "learning_rate": 5e-5, "report_to": "none"}
    assert {key: recipe.training[key] for key in given} == given
    assert recipe.training["optim"] == "adamw_torch_fused"


def test_the_task_says_which_data_and_which_size_a_recipe_has() -> None:
    assert set(TASKS) == {"text-classification", "image-classification"}
    text, images = load_recipe("trec", ["max_length=null"]), load_recipe("fashion-mnist")
    assert (type(text.data), text.max_length, text.image_size, text.sample_size) == (TextSpec, 128, None, 128)
    assert (type(images.data), images.max_length, images.image_size, images.sample_size) == (ImageSpec, None, 98, 98)
    assert load_recipe("fashion-mnist", ["image_size=null"]).sample_size is None
    assert load_recipe("fashion-mnist", ["data.image_column=img"]).data.columns() == {"image": "img", "label": "label"}


def test_overrides_are_dotted_yaml() -> None:
    recipe = load_recipe(
        "trec",
        ["freeze.percentile=90", "training.learning_rate=1e-4", "data.train_limit=10", "seed=3", "schedule=null"],
    )
    assert recipe.freeze.options["percentile"] == 90
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.data.train_limit == 10
    assert recipe.directory == Path("runs/trec-seed3")
    assert recipe.schedule is None


def test_another_policy_drops_the_options_of_the_old_one() -> None:
    recipe = load_recipe("trec", ["freeze.policy=static", "freeze.depth=3"])
    assert (recipe.freeze.policy, recipe.freeze.options) == ("static", {"depth": 3})
    assert load_recipe("trec", ["freeze.policy=gradient-norm"]).freeze.options["percentile"] == 75


def test_a_section_in_one_word_is_what_it_is_in_python(tmp_path: Path) -> None:
    recipe = load_recipe("trec", ["memory=slimfit", "cache=disk", "pack=performance"])
    assert (recipe.memory, recipe.pack) == (MemoryOptions(level="slimfit"), PackOptions(mode="performance"))
    assert recipe.cache == CacheOptions(mode="disk"), "the recipe's own settings of the cache are replaced"
    for nothing in ("null", "off", "false"):
        recipe = load_recipe("trec", [f"memory={nothing}", f"cache={nothing}"])
        assert (recipe.memory, recipe.cache) == (MemoryOptions(), CacheOptions())
    path = write_recipe_file(tmp_path / "mine.yaml", recipe_content(tmp_path, memory="max", cache="memory"))
    recipe = load_recipe(str(path), ["memory.budget=6GiB"])
    assert recipe.memory == MemoryOptions(level="max", budget=6 * 2**30), "one word may be added to"
    assert recipe.cache == CacheOptions(mode="memory")


def test_off_is_a_word_and_5e_5_a_number() -> None:
    assert parse_yaml("{a: off, b: 5e-5, c: true, d: 1.5, e: 3, f: no, g: .inf}", "test") == {
        "a": "off", "b": 5e-5, "c": True, "d": 1.5, "e": 3, "f": "no", "g": math.inf,
    }  # fmt: skip


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            "trec",
            [
                "frese.percentile=1",
                "freeze.percentile=101",
                "freeze.speed=2",
                "cache.mode=gpu",
                "data.text_colum=words",
                "schedule.at=[0.6]",
                "max_length=long",
                "training.learning_rat=1",
                "training.bf16=maybe",
                "training.optim=sgdx",
                "training.num_train_epochs=-1",
                "training.output_dir=elsewhere",
            ],
        )
    head, *lines = str(caught.value).splitlines()
    assert head == f"recipe trec has {len(lines)} faults:"
    for fragment in (
        "unknown key 'frese': did you mean",
        "percentile=101: Input should be less than or equal to 100",
        "unknown option of policy 'gradient-norm' 'speed'",
        "cache.mode: unknown cache mode 'gpu': Valid choices: auto, disk, memory, off",
        "unknown key in data 'text_colum': did you mean 'text_column'",
        "schedule: at has 1 values and factor 2",
        "max_length='long': Input should be a valid integer",
        "training: unknown key 'learning_rat': did you mean 'learning_rate'",
        "training: bf16='maybe': Input should be a valid boolean",
        "training: sgdx is not a valid OptimizerNames",
        "training: num_train_epochs=-1: must be at least 0",
        "training: output_dir is not set here: set output_dir at the top level",
    ):
        assert sum(fragment in line for line in lines) == 1, fragment


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("trek", [], "unknown recipe 'trek': did you mean 'trec'.*20newsgroups.*or the path of a YAML file"),
        ("trec", ["seed"], "override 'seed': write key=value"),
        ("trec", ["seed=[1"], "override 'seed=\\[1'.*not valid YAML"),
        ("trec", ["seed.x=1"], "override seed.x: seed is the value 0, not a section"),
        ("trec", ["freeze.policy=gradnorm"], "unknown policy 'gradnorm': did you mean 'gradient-norm'"),
        ("trec", ["schedule.at=[0.6, 0.3]"], "the fractions must increase"),
        ("trec", ["training.lr_scheduler_type=cosine"], "both set the learning rate: drop one"),
        ("trec", ["resume=true", "overwrite=true"], "exclude each other"),
        ("trec", ["baseline=half"], "baseline='half': Input should be 'none' or 'full'"),
        ("trec", ["model=null"], "model=None"),
        ("trec", ["task=image-clasification"], "task: unknown task 'image-clasification': did you mean 'image-class"),
        ("trec", ["image_size=98"], "image_size: task 'text-classification' does not have it: .* is max_length"),
        ("fashion-mnist", ["max_length=9"], "max_length: task 'image-classification' does not have it: .* image_size"),
        ("fashion-mnist", ["image_size=0"], "image_size=0: Input should be greater than or equal to 1"),
        (
            "fashion-mnist",
            ["data.text_column=a"],
            "unknown key in data 'text_column':.* Valid choices: image_column, l",
        ),
        (
            "trec",
            ["memory=slimft"],
            "memory.level: unknown memory level 'slimft': did you mean 'slimfit'.*max, off, pub",
        ),
        ("trec", ["memory=6GiB"], "memory.level: a level is one of off, safe, .*{'budget': '6GiB'}"),
        (
            "trec",
            ["memory=true"],
            r"memory: must be a level \(off, safe, .*\) or .* options \(level, budget\), not True",
        ),
        ("trec", ["memory=[a]"], r"memory: must be a level .*, not \['a'\]"),
        (
            "trec",
            ["memory.level=[a]"],
            r"memory.level: unknown memory level .*Valid choices: max, off, published, safe",
        ),
        ("trec", ["memory.budget=50%"], "memory.budget='50%': must be bytes, or a number with KB"),
        ("trec", ["cache=dsk"], "cache.mode: unknown cache mode 'dsk': did you mean 'disk'"),
        ("trec", ["freeze.blcks=x"], "unknown option of policy 'gradient-norm' 'blcks': did you mean 'blocks'"),
        ("trec", ["data.image_column=a"], "unknown key in data 'image_column':.* text_column"),
    ],
)
def test_a_single_fault_is_one_line(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(name, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "line 2, column 1: not valid YAML: the key 'model' stands there twice"),
        ("model: [a\n", "not valid YAML"),
        ("- model\n", "a recipe is a mapping"),
        ("model: a\n", "data: missing; it is required"),
    ],
)
def test_a_malformed_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_a_recipe_of_the_users_is_named_after_its_file(tmp_path: Path) -> None:
    path = write_recipe_file(tmp_path / "mine.yaml", recipe_content(tmp_path))
    assert load_recipe(str(path)).name == "mine"


@pytest.mark.parametrize(("name", "ours"), [("trec-demo", "text_column"), ("fashion-mnist", "image_column")])
def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path, name: str, ours: str) -> None:
    recipe = load_recipe(name, ["training.logging_steps=7"])
    content = yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert ours in content["data"], "what each task's data add is written, too"
    assert load_recipe(str(write_recipe_file(tmp_path / "again.yaml", content))) == recipe


def test_overrides_leave_the_given_mapping_alone() -> None:
    content = {"freeze": {"policy": "static", "depth": 1}}
    assert apply_overrides(content, ["freeze.depth=2"]) == {"freeze": {"policy": "static", "depth": 2}}
    assert content == {"freeze": {"policy": "static", "depth": 1}}


def test_the_schedule_steps_at_fractions_of_the_run() -> None:
    schedule = Schedule(at=[0.3, 0.6], factor=[0.7, 0.4])
    assert [schedule.at_step(step, 10) for step in range(10)] == [1.0] * 3 + [0.7] * 3 + [0.4] * 4


def test_a_recipe_built_in_python_is_checked_the_same_way(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key 'lr': "):
        Recipe.model_validate(recipe_content(tmp_path, training={"lr": 1}))
