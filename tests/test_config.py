"""Recipes: how files merge, and the sentence for everything that can be wrong with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sapwood.config import Recipe, dump_recipe, load_recipe, parse_recipe
from sapwood.engines.scripted import ScriptedEngine
from sapwood.envs.prompts import Prompts
from sapwood.errors import ConfigError, UnknownPlugin

BASE = """\
run:
  dir: runs/x
  steps: 10
env:
  name: prompts
  items: [{prompt: hi, answer: "1"}]
algorithm:
  name: grpo
  group_size: 4
engine: {name: scripted, max_new_tokens: 8}
optim:
  learning_rate: 1e-4
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", BASE)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def sentence(*arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(*arguments)
    return str(caught.value)


# ---- what a good recipe gives ---------------------------------------------------------------------------------


def test_defaults_are_filled_in_and_plugins_are_built(base: Path) -> None:
    recipe = load_recipe(base)
    assert recipe.model.name == "smollm2-135m"
    assert recipe.model.lora is not None
    assert recipe.model.lora.alpha == 32.0  # 2 x rank 16
    assert recipe.optim.learning_rate == 1e-4  # YAML 1.1 would read 1e-4, without a dot, as text
    assert isinstance(recipe.build_env(), Prompts)
    assert recipe.build_algorithm().model_dump()["group_size"] == 4
    assert recipe.algorithm["baseline"] == "mean"  # an option that the file doesn't name
    assert [type(reward).__name__ for reward in recipe.build_rewards()] == ["EnvReward"]
    assert recipe.sampling().max_new_tokens == 8
    assert recipe.sampling().temperature == 1.0


def test_alpha_follows_the_rank_unless_given(base: Path) -> None:
    def alpha(*overrides: str) -> float:
        lora = load_recipe(base, overrides).model.lora
        assert lora is not None
        return lora.alpha

    assert alpha("model.lora.rank=4") == 8.0
    assert alpha("model.lora.rank=4", "model.lora.alpha=5") == 5.0


def test_dump_loads_back_to_the_same_recipe(base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(base, ["trackers=[tensorboard]", "optim.betas=[0.9,0.95]", "model.init_from=runs/y"])
    text = dump_recipe(recipe)
    again = load_recipe(write(tmp_path / "dumped.yaml", text))
    assert again == recipe
    assert dump_recipe(again) == text


def test_a_mapping_and_a_file_give_the_same_recipe(base: Path) -> None:
    data = yaml.safe_load(BASE)
    data["optim"]["learning_rate"] = 1e-4
    assert parse_recipe(data) == load_recipe(str(base))


def test_a_run_folder_stands_for_its_recipe(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder / "recipe.yaml", dump_recipe(load_recipe(base)))
    assert load_recipe(folder) == load_recipe(base)


def test_a_recipe_is_immutable(base: Path) -> None:
    recipe = load_recipe(base)
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


# ---- merging ---------------------------------------------------------------------------------------------------


def test_overlays_merge_deeply_and_the_last_wins(base: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "optim: {weight_decay: 0.1, betas: [0.5, 0.5]}\nrun: {seed: 3}")
    second = write(tmp_path / "b.yaml", "optim: {betas: [0.1, 0.2]}")
    recipe = load_recipe([base, first, second], ["run.seed=4"])
    assert recipe.optim.learning_rate == 1e-4  # from base
    assert recipe.optim.weight_decay == 0.1  # from a
    assert recipe.optim.betas == (0.1, 0.2)  # lists replace
    assert recipe.run.seed == 4


def test_null_removes_and_a_later_key_brings_back(base: Path, tmp_path: Path) -> None:
    assert load_recipe(base, ["model.lora=null"]).model.lora is None
    overlay = write(tmp_path / "full.yaml", "model: {lora: null}")
    lora = load_recipe([base, overlay], ["model.lora.rank=2"]).model.lora
    assert lora is not None
    assert lora.rank == 2


def test_another_plugin_drops_the_options_of_the_earlier(base: Path, tmp_path: Path) -> None:
    overlay = write(tmp_path / "hvac.yaml", "env: {name: hvac, horizon: 2}")
    recipe = load_recipe([base, overlay])
    assert recipe.env["horizon"] == 2
    assert "items" not in recipe.env  # hvac would refuse it
    same = write(tmp_path / "same.yaml", "algorithm: {name: grpo}")
    assert load_recipe([base, same]).algorithm["group_size"] == 4


def test_plugin_names_count_before_their_options_whatever_the_order(base: Path) -> None:
    recipe = load_recipe(base, ["env.horizon=2", "env.name=hvac"])
    assert recipe.env["horizon"] == 2


def test_sampling_options_outlive_a_change_of_engine(base: Path, tmp_path: Path) -> None:
    module = write(
        tmp_path / "mine.py",
        "from pydantic import BaseModel\n"
        "from sapwood.engines.scripted import ScriptedEngine\n"
        "class OPTIONS(BaseModel):\n    model_config = {'extra': 'forbid'}\n    speed: int = 3\n"
        "class Mine(ScriptedEngine): pass\n",
    )
    recipe = load_recipe(base, [f"engine.name={module}:Mine", "engine.speed=5"])
    assert recipe.sampling().max_new_tokens == 8
    assert recipe.engine_options() == {"speed": 5}
    back = load_recipe(base, ["engine.name=scripted"])
    assert "speed" not in back.engine_options()
    assert "did you mean 'speed'" in sentence(base, [f"engine.name={module}:Mine", "engine.sped=5"])


def test_rewards_by_index(base: Path) -> None:
    changed = load_recipe(base, ["rewards.0.weight=2"]).rewards
    assert [(item["name"], item["weight"]) for item in changed] == [("env", 2.0)]
    appended = load_recipe(base, ["rewards.1={name: exact_match, weight: 0.5}"]).build_rewards()
    assert [reward.weight for reward in appended] == [1.0, 0.5]
    renamed = load_recipe(base, ["rewards.0.weight=2", "rewards.0.name=exact_match"]).rewards
    assert (renamed[0]["name"], renamed[0]["weight"]) == ("exact_match", 2.0)


def test_short_forms(base: Path) -> None:
    recipe = load_recipe(base, ["algorithm=grpo", "rewards=[env, exact_match]", "engine=scripted"])
    assert recipe.algorithm["name"] == "grpo"
    assert [item["name"] for item in recipe.rewards] == ["env", "exact_match"]


def test_values_of_overrides_are_yaml(base: Path) -> None:
    recipe = load_recipe(base, ['engine.stop=["a=b", "\\n"]', "optim.learning_rate=3e-5", "run.dir=runs/2026-01-01"])
    assert recipe.sampling().stop == ("a=b", "\n")
    assert recipe.optim.learning_rate == 3e-5
    assert recipe.run.dir == Path("runs/2026-01-01")


# ---- sentences -------------------------------------------------------------------------------------------------

OVERRIDES = [
    ("algoritm=grpo", "override algoritm=grpo: unknown key 'algoritm'; did you mean 'algorithm'?"),
    ("optim.learnin_rate=1", "unknown key 'learnin_rate' in optim; did you mean 'learning_rate'?"),
    ("optim.zzz=1", "unknown key 'zzz' in optim; known are batch_size, betas, critic_learning_rate, eps,"),
    ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'optim.learning_rate'?"),
    ("model.lora.rnk=1", "unknown key 'rnk' in model.lora; did you mean 'rank'?"),
    ("algorithm.group_sise=2", "unknown key 'group_sise' in algorithm; did you mean 'group_size'?"),
    ("env.itms=2", "unknown key 'itms' in env; did you mean 'items'?"),
    ("engine.temprature=2", "unknown key 'temprature' in engine; did you mean 'temperature'?"),
    ("rewards.0.wieght=2", "unknown key 'wieght' in rewards.0; did you mean 'weight'?"),
    ("optim.learning_rate=fast", "optim.learning_rate is 'fast'; it should be a valid number"),
    ("optim.learning_rate=0", "optim.learning_rate is 0; it should be greater than 0"),
    ("optim.learning_rate=.inf", "optim.learning_rate is inf; it should be a finite number"),
    ("optim.eps=.nan", "optim.eps is nan; it should be a finite number"),
    ("algorithm.kl_coef=.inf", "algorithm.kl_coef is inf; it should be a finite number"),
    ("rewards.0.weight=.nan", "rewards.0.weight is nan; it should be a finite number"),
    ("engine.temperature=.inf", "engine.temperature is inf; it should be a finite number"),
    ("rewards.1={name: format, pattern: '('}", "rewards.1.pattern: not a regular expression: missing )"),
    ("run.dir={x: 3}", "run.dir is {'x': 3}; it should be a path"),
    ("optim.betas=[0.9]", "optim.betas.1 is missing"),
    ("run.steps=0", "run.steps is 0; it should be greater than or equal to 1"),
    ("run.steps=2.5", "run.steps is 2.5; it should be a valid integer"),
    ("run.steps=yes", "run.steps is True; it should be a number"),
    ("run.steps=", "run.steps is missing: give run.steps, or run.epochs for passes over the data"),
    ("run.seed=-1", "run.seed is -1; it should be greater than or equal to 0"),
    ("run.epochs=2", "run.epochs and run.steps are both given; keep one"),
    ("run=5", "run is 5; it should be a mapping of keys and values"),
    ("model.dtype=bf16", "it should be 'auto', 'float32', 'bfloat16' or 'float16' (did you mean 'bfloat16'?)"),
    ("model.device=gpu", "model.device is 'gpu'; it should be 'auto', 'cpu', 'cuda' or one GPU such as 'cuda:1'"),
    ("model.trust_remote_code=1", "model.trust_remote_code is 1; it should be a valid boolean"),
    ("model.lora.dropout=1", "model.lora.dropout is 1; it should be less than 1"),
    ("model.lora.target_modules=3", "model.lora.target_modules is 3; it should be 'all-linear' or a list"),
    ("eval.tasks=0", "eval.tasks is 0; it should be greater than or equal to 1"),
    ("optim.warmup_steps=20", "optim.warmup_steps (20) is more than run.steps (10)"),
    ("optim.min_learning_rate=1", "optim.min_learning_rate (1) is above optim.learning_rate (0.0001)"),
    ("trackers.0=wandbb", "override trackers.0=wandbb: unknown tracker 'wandbb'; did you mean 'wandb'?"),
    ("trackers=[3]", "trackers.0 is 3; it should be a mapping of keys and values"),
    ("trackers.0.flush_seconds=0", "trackers.0.flush_seconds is 0; it should be greater than or equal to 1"),
    ("trackers.0.flush=3", "unknown key 'flush' in trackers.0; known are flush_seconds."),
    ("trackers.2.name=wandb", "'2' is no entry of the list; its entries are 0 to 0"),
    ("trackers.0=tests.worlds:Guess", "is not a class derived from sapwood.trackers.Tracker"),
    ("trackers=tensorboard", "trackers is 'tensorboard'; it should be a list"),
    ("rewards=[]", "rewards is empty, so nothing would be learnt"),
    ("rewards.5.weight=1", "'5' is no entry of the list; its entries are 0 to 0"),
    ("rewards.x.weight=1", "'x' is no entry of the list"),
    ("rewards.0.name=null", "rewards.0.name is missing; known: "),
    ("env.name=null", "env.name is missing; known: "),
    ("algorithm.group_size=1", "override algorithm.group_size=1: group_size 1"),
    ("engine.top_p=0", "engine.top_p is 0; it should be greater than 0"),
    ("engine.max_new_tokens=0", "engine.max_new_tokens is 0; it should be greater than or equal to 1"),
    ("foo.bar=1", "override foo.bar=1: unknown key 'foo'; known are algorithm"),
    ("critic.kind=head", "override critic.kind=head: algorithm grpo has no critic; remove the section"),
    ("engine=[", "override 'engine=[': the value is not valid YAML"),
    ("=3", "override '=3': write it as section.key=value"),
    ("optim..x=3", "override 'optim..x=3': write it as section.key=value"),
    ("optim", "override 'optim': write it as section.key=value"),
]


@pytest.mark.parametrize(("text", "expected"), OVERRIDES, ids=[text for text, _ in OVERRIDES])
def test_a_bad_override_is_refused_by_a_sentence(base: Path, text: str, expected: str) -> None:
    told = sentence(base, [text])
    assert expected in told
    assert told.startswith((f"override {text}: ", f"override {text!r}: "))
    assert "\n" not in told
    assert told.endswith((".", "?"))


PLUGINS = [
    ("algorithm.name=grop", "unknown algorithm 'grop'; did you mean 'grpo'?"),
    ("env.name=hvca", "unknown env 'hvca'; did you mean 'hvac'?"),
    ("engine.name=scriptd", "unknown engine 'scriptd'; did you mean 'scripted'?"),
    ("rewards.0.name=exactmatch", "unknown reward 'exactmatch'; did you mean 'exact_match'?"),
    ("env.name=no_such_package.module:Env", "no module 'no_such_package'; is it installed?"),
    ("env.name=nowhere/env.py:Env", "there is no file 'nowhere/env.py'; paths begin at"),
]


@pytest.mark.parametrize(("text", "expected"), PLUGINS, ids=[text for text, _ in PLUGINS])
def test_an_unknown_plugin_is_refused_with_its_place(base: Path, text: str, expected: str) -> None:
    with pytest.raises(UnknownPlugin) as caught:
        load_recipe(base, [text])
    assert str(caught.value).startswith(f"override {text}: ")
    assert expected in str(caught.value)


def test_a_class_of_the_wrong_kind_is_refused(base: Path) -> None:
    told = sentence(base, ["env=sapwood.engines.scripted:ScriptedEngine"])
    assert "is not a class derived from sapwood.envs.EnvFamily" in told
    told = sentence(base, ["engine=sapwood.envs.prompts:Prompts"])
    assert "is not a class derived from sapwood.engines.Engine" in told
    assert "has no 'Nothing'" in sentence(base, ["env=sapwood.envs.prompts:Nothing"])
    assert ScriptedEngine.__module__ == "sapwood.engines.scripted"


FILES = [
    ("", "bad.yaml: the recipe is empty"),
    ("# only a comment\n", "bad.yaml: the recipe is empty"),
    ("- a\n- b\n", "bad.yaml: a recipe is a mapping of sections"),
    ("just text\n", "bad.yaml: a recipe is a mapping of sections"),
    ("run: {dir: x\noptim: 3\n", "bad.yaml line 2: not valid YAML"),
    ("run:\n\tdir: x\n", "bad.yaml line 2: not valid YAML"),
    ("run: !!python/object/apply:os.system [ls]\n", "bad.yaml line 1: not valid YAML"),
    ("run: {dir: x}\noptim: {eps: 1}\nrun: {dir: y}\n", "bad.yaml line 3: run was already set on line 1"),
    ("optim:\n  eps: 1\n  eps: 2\n", "bad.yaml line 3: optim.eps was already set on line 2"),
    (BASE.replace("algorithm:", "algoritm:"), "bad.yaml line 7: unknown key 'algoritm'; did you mean 'algorithm'?"),
    (BASE.replace("steps: 10", "steps: ten"), "bad.yaml line 3: run.steps is 'ten'; it should be a valid integer"),
    (BASE.replace("  steps: 10\n", ""), "bad.yaml line 1: run.steps is missing: give run.steps, or run.epochs"),
    (BASE.replace("  steps: 10\n", "  epochs: 1\n"), "bad.yaml line 3: run.epochs counts passes over data"),
    (BASE.replace("group_size: 4", "group_size: 1"), "bad.yaml line 9: group_size 1"),
    (BASE.replace("  name: grpo\n", ""), "bad.yaml line 7: algorithm.name is missing; known: "),
    (BASE + "model: {lora: null, quantize: 4bit}\n", "quantised weights can't be trained"),
]


@pytest.mark.parametrize(("text", "expected"), FILES)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in sentence(write(tmp_path / "bad.yaml", text))


def test_files_that_cannot_be_read(tmp_path: Path, base: Path) -> None:
    assert sentence(tmp_path / "bse.yaml") == f"{tmp_path}/bse.yaml: no such recipe; did you mean {str(base)!r}?"
    assert "no such recipe" in sentence(tmp_path / "no" / "folder.yaml")
    assert "recipe.yaml: no such recipe" in sentence(tmp_path)  # a folder that is no run
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in sentence(binary)
    assert "no recipe given" in sentence([])


def test_every_mistake_is_told_at_once(base: Path) -> None:
    told = sentence(base, ["run.steps=0", "optim.eps=x", "modle.name=3"]).split("\n")
    assert len(told) == 3


def test_an_error_in_an_overlay_names_the_overlay(base: Path, tmp_path: Path) -> None:
    overlay = write(tmp_path / "over.yaml", "# comment\noptim:\n  schedule: cosin\n")
    told = sentence([base, overlay])
    assert told.startswith(f"{overlay} line 3: optim.schedule is 'cosin'")
    assert "did you mean 'cosine'?" in told


def test_recursive_yaml_ends(tmp_path: Path) -> None:
    assert "line 1: not valid YAML: a value holds itself" in sentence(
        write(tmp_path / "loop.yaml", "env: &a {name: prompts, items: *a}\n")
    )


def test_a_class_that_is_not_finished_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("from sapwood.rewards import Reward\nclass Half(Reward):\n    pass\n")
    told = sentence(base, [f"rewards=[{tmp_path}/half.py:Half]"])
    assert told.endswith("half.py:Half' lacks the method score, which every Reward has; write it.")


def test_a_character_that_yaml_has_not_names_its_line(tmp_path: Path) -> None:
    told = sentence(write(tmp_path / "bell.yaml", "run:\n  dir: x\x07\n"))
    assert told == f"{tmp_path / 'bell.yaml'} line 2: not valid YAML: the character U+0007 can't stand here."


def test_rewards_that_only_a_world_pays_teach_nothing_on_prompts(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^rewards\.0: prompts pay nothing by themselves; give another reward"):
        load_recipe(base).check_trainable()
    load_recipe(base, ["rewards=[env, exact_match]"]).check_trainable()
    load_recipe(base, ["env=hvac"]).check_trainable()
    data = write(tmp_path / "d.yaml", "run: {dir: x, steps: 1}\n" + RECORDS + "algorithm: grpo\nrewards: [format]\n")
    with pytest.raises(ConfigError, match=r"^rewards\.0: format reads what an env parsed, and there is none: give"):
        load_recipe(data).check_trainable()
    load_recipe(data, ["rewards.0.pattern=x+"]).check_trainable()


def test_greedy_sampling_cannot_train(base: Path) -> None:
    load_recipe(base, ["rewards=[exact_match]"]).check_trainable()
    with pytest.raises(ConfigError, match=r"engine\.temperature is 0: greedy replies"):
        load_recipe(base, ["engine.temperature=0"]).check_trainable()


def test_a_recipe_made_by_hand_refuses_when_it_builds() -> None:
    recipe = Recipe.model_validate(
        {"run": {"dir": "x", "steps": 1}, "env": {"name": "prompts", "itms": []}, "algorithm": "grpo"}
    )
    with pytest.raises(ConfigError, match="unknown key 'itms' in env"):
        recipe.build_env()


# ---- soft keys -------------------------------------------------------------------------------------------------

DATA = """\
run: {dir: runs/x, epochs: 3}
data: pairs.jsonl
algorithm: {name: dpo}
"""


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.yaml", DATA)


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """Soft in every way: options, whole sections, counts."""
    text = """\
run:
  epochs?: 1
  steps?: 3
env:
  answer_field?: solution
data?: {max_samples: 5}
algorithm:
  group_size?: 2
  beta?: 0.5
  epochs?: 4
engine?: {max_new_tokens: 64}
rewards?: [exact_match]
critic?: {kind: head}
reference?: {precompute: true}
"""
    return write(tmp_path / "over.yaml", text)


def test_a_soft_key_applies_where_the_recipe_has_it(base: Path, pairs: Path, overlay: Path) -> None:
    rollouts = load_recipe([base, overlay])
    assert (rollouts.run.steps, rollouts.run.epochs) == (3, None)
    assert (rollouts.algorithm["group_size"], rollouts.algorithm["epochs"]) == (2, 4)
    assert rollouts.env is not None
    assert rollouts.env["answer_field"] == "solution"
    assert rollouts.sampling().max_new_tokens == 64
    assert [item["name"] for item in rollouts.rewards or ()] == ["exact_match"]
    assert rollouts.data is rollouts.critic is rollouts.reference is None

    data = load_recipe([pairs, overlay])
    assert (data.run.steps, data.run.epochs) == (None, 1)
    assert data.algorithm["beta"] == 0.5
    assert "group_size" not in data.algorithm
    assert data.algorithm["epochs"] == 1  # an option of every algorithm, but it counts passes over rollouts
    assert data.data is not None
    assert data.data.max_samples == 5
    assert data.env is data.engine is data.rewards is data.critic is None
    assert data.reference is not None
    assert data.reference.precompute


def test_a_soft_critic_needs_an_algorithm_with_one(base: Path, overlay: Path) -> None:
    recipe = load_recipe([base, overlay], ["algorithm=ppo", "reference?=null"])
    assert recipe.critic is not None
    assert recipe.critic.kind == "head"


def test_a_key_without_a_question_mark_is_never_dropped(pairs: Path, tmp_path: Path) -> None:
    hard = write(tmp_path / "hard.yaml", "algorithm: {group_size: 2}")
    assert "hard.yaml line 1: unknown key 'group_size' in algorithm" in sentence([pairs, hard])
    hard = write(tmp_path / "hard.yaml", "engine: {max_new_tokens: 64}")
    assert "engine has no effect: dpo learns from data" in sentence([pairs, hard])


def test_later_keys_win_soft_or_not(base: Path, tmp_path: Path) -> None:
    soft = write(tmp_path / "soft.yaml", "algorithm:\n  group_size?: 6\n")
    hard = write(tmp_path / "hard.yaml", "algorithm: {group_size: 3}")

    def size(*files: Path, overrides: tuple[str, ...] = ()) -> int:
        return load_recipe(list(files), overrides).algorithm["group_size"]

    assert size(base, soft) == 6
    assert size(base, soft, hard) == 3
    assert size(base, hard, soft) == 6
    assert size(base, soft, overrides=("algorithm.group_size=5",)) == 5
    assert size(base, hard, overrides=("algorithm.group_size?=7",)) == 7
    assert size(base, soft, overrides=("algorithm=rloo",)) == 6  # a soft key isn't the option of one plugin


def test_a_soft_number_is_raised_to_the_least_that_the_option_takes(base: Path) -> None:
    for algorithm, least in {"grpo": 2, "rloo": 2, "ppo": 1, "reinforce_pp": 1}.items():
        recipe = load_recipe(base, [f"algorithm={algorithm}", "algorithm.group_size?=1"])
        assert recipe.algorithm["group_size"] == least, algorithm
    assert "group_size 1" in sentence(base, ["algorithm.group_size=1"])  # a plain key is taken at its word


def test_a_soft_section_of_a_plugin_takes_its_name_first(pairs: Path, base: Path, tmp_path: Path) -> None:
    soft = write(tmp_path / "soft.yaml", "engine?: {max_batch: 3, name: local}")
    assert load_recipe([base, soft]).engine_options()["max_batch"] == 3  # base names an engine without it
    assert load_recipe([pairs, soft]).engine is None


SOFT = [
    ("algorithm:\n  group_sise?: 2\n", "line 2: no algorithm has it: unknown key 'group_sise' in algorithm; did you"),
    ("env:\n  itms?: 2\n", "line 2: no env has it: unknown key 'itms' in env; did you mean 'items'?"),
    ("engine:\n  temprature?: 2\n", "line 2: no engine has it: unknown key 'temprature' in engine; did you mean"),
    ("optim:\n  learning_rate?: 1\n", "line 2: optim.learning_rate? asks whether the recipe can have"),
    ("modle?: {name: x}\n", "line 1: unknown key 'modle'; did you mean 'model'?"),
    ("run:\n  steps: 3\n  steps?: 4\n", "line 3: run.steps was already set on line 2; keep one."),
    ("algorithm: {group_size?: 2}\n", "within braces a soft key wants quotes"),
    ("algorithm:\n  group_size?: many\n", "line 2: algorithm.group_size is 'many'; it should be a valid integer"),
    ("engine?:\n  temprature: 2\n", "unknown key 'temprature' in engine; did you mean 'temperature'?"),
]


@pytest.mark.parametrize(("text", "expected"), SOFT)
def test_a_bad_soft_key_is_refused_by_a_sentence(base: Path, tmp_path: Path, text: str, expected: str) -> None:
    told = sentence([base, write(tmp_path / "over.yaml", text)])
    assert told.startswith(f"{tmp_path}/over.yaml line ")
    assert expected in told


def test_quoted_soft_keys_within_braces(base: Path, tmp_path: Path) -> None:
    overlay = write(tmp_path / "over.yaml", 'algorithm: {"group_size?": 2}')
    assert load_recipe([base, overlay]).algorithm["group_size"] == 2


def test_a_mapping_may_have_soft_keys() -> None:
    data = yaml.safe_load(BASE) | {"critic?": {"kind": "head"}}
    data["optim"]["learning_rate"] = 1e-4
    assert parse_recipe(data).critic is None
    data["algorithm"] = {"name": "ppo", "group_size?": 3}
    recipe = parse_recipe(data)
    assert recipe.critic is not None
    assert recipe.algorithm["group_size"] == 3


# ---- sections that would have no effect ------------------------------------------------------------------------

ROLLOUTS = "env: {name: prompts, items: [{prompt: hi}]}\n"
RECORDS = "data: x.jsonl\n"
REFUSED = [
    (ROLLOUTS + RECORDS + "algorithm: grpo\n", "grpo learns from rollouts, either in env or on the prompts of data"),
    (ROLLOUTS + "algorithm: dpo\n", "dpo learns from pairs: give data"),
    (ROLLOUTS + "algorithm: sft\n", "sft learns from demonstrations: give data"),
    (ROLLOUTS + "algorithm: kto\n", "kto learns from labels: give data"),
    (ROLLOUTS + "algorithm: grpo\ncritic: {kind: head}\n", "algorithm grpo has no critic; remove the section"),
    (
        ROLLOUTS + "algorithm: grpo\nreference: {name: x}\n",
        "algorithm grpo with these options uses no reference; remove",
    ),
    (RECORDS + "algorithm: sft\nreference: {name: x}\n", "algorithm sft with these options uses no reference"),
    (
        ROLLOUTS + "algorithm: {name: grpo, kl_coef: 0.1}\nreference: {precompute: true}\n",
        "reference.precompute is for data, but grpo samples its replies; remove it.",
    ),
    (RECORDS + "algorithm: dpo\nrewards: [exact_match]\n", "rewards has no effect: dpo learns from data"),
    (RECORDS + "algorithm: dpo\nengine: {temperature: 1}\n", "engine has no effect: dpo learns from data"),
    (RECORDS + "algorithm: dpo\neval: {metrics: [x]}\n", "eval.metrics measure replies in an env; give env"),
    (RECORDS + "algorithm: dpo\neval: {tasks: 4}\n", "eval.tasks has no effect: dpo learns from data and no env is"),
    (RECORDS + "algorithm: dpo\neval: {temperature: 1.0}\n", "eval.temperature has no effect: dpo learns from data"),
    (RECORDS + "algorithm: dpo\noptim: {max_gap: 0.5}\n", "optim.max_gap has no effect: dpo learns from no samples"),
    (RECORDS + "algorithm: dpo\noptim: {head_learning_rate: 0.1}\n", "has no effect: dpo has no scalar head"),
    (RECORDS + "algorithm: reward\noptim: {critic_learning_rate: 0.1}\n", "has no effect: reward has no critic"),
    (
        ROLLOUTS + "algorithm: ppo\noptim: {critic_learning_rate: 0.1, head_learning_rate: 0.1}\n",
        "optim.head_learning_rate has no effect: a critic's head learns at optim.critic_learning_rate; keep one",
    ),
    (
        ROLLOUTS + RECORDS + "algorithm: sft\nengine: {temperature: 0.7}\n",
        "engine.temperature has no effect: sft samples for evaluation only; set eval.temperature",
    ),
    (
        "data: {path: x.jsonl, train_on: last}\nrewards: [exact_match]\nalgorithm: grpo\n",
        "data.train_on has no effect: grpo learns from the replies that it samples; remove it",
    ),
    (
        "data: {path: x.jsonl, max_length: 64, long_reply: cut_end}\nrewards: [exact_match]\nalgorithm: grpo\n",
        "data.long_reply has no effect: grpo samples its replies: engine.max_new_tokens bounds them; remove it",
    ),
    (
        "data: {path: x.jsonl, max_length: 64, long_prompt: cut_start}\nrewards: [exact_match]\nalgorithm: grpo\n",
        "data.long_prompt: cut_start cuts tokens, and grpo asks whole messages; use drop_turns or drop.",
    ),
    (RECORDS + "algorithm: grpo\n", "rewards is missing: prompts pay nothing by themselves"),
    ("algorithm: grpo\n", "env is missing: give env to learn from rollouts in a world, or data"),
]


@pytest.mark.parametrize(("text", "expected"), REFUSED)
def test_a_section_without_effect_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    told = sentence(write(tmp_path / "bad.yaml", "run: {dir: x, steps: 3}\n" + text))
    assert expected in told
    assert told.startswith(str(tmp_path))
    assert told.endswith(".")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: {dir: x}\n" + RECORDS, "run.steps is missing: give run.steps, or run.epochs for passes over the data"),
        ("run: {dir: x, epochs: 1, steps: 3}\n" + RECORDS, "run.epochs and run.steps are both given; keep one."),
        ("run: {dir: x, epochs: 1}\n" + ROLLOUTS, "run.epochs counts passes over data, but an env makes its tasks"),
        ("run: {dir: x, epochs: 0}\n" + RECORDS, "run.epochs is 0; it should be greater than 0"),
        ("run: {dir: x, steps: 1}\nreference: {}\n" + RECORDS, "reference is empty: give reference.name"),
        ("run: {dir: x, steps: 1}\ncritic: {kind: head, name: y}\n" + RECORDS, "critic.name has no effect with"),
        ("run: {dir: x, steps: 1}\ncritic: {detach: true}\n" + RECORDS, "critic.detach has no effect with"),
        ("run: {dir: x, steps: 1}\ncritic: {kind: head, init_from: y}\n" + RECORDS, "critic.kind: head has no adapter"),
    ],
)
def test_run_reference_and_critic_are_checked(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in sentence(write(tmp_path / "bad.yaml", text + "algorithm: sft\n"))


def test_what_a_recipe_for_data_resolves_to(pairs: Path) -> None:
    recipe = load_recipe(pairs)
    assert recipe.rewards is recipe.engine is recipe.env is None
    assert not recipe.plays
    assert recipe.build_rewards() == []
    assert recipe.data is not None
    assert [source.path for source in recipe.data.sources] == ["pairs.jsonl"]
    with pytest.raises(ConfigError, match="env is missing: this recipe learns from data"):
        recipe.build_env()


def test_prompts_of_data_are_played_for_rewards(tmp_path: Path) -> None:
    text = (
        "run: {dir: x, epochs: 1}\ndata: {path: x.jsonl, input: q, output: a}\nalgorithm: ppo\nrewards: [exact_match]\n"
    )
    recipe = load_recipe(write(tmp_path / "x.yaml", text))
    assert recipe.plays
    assert recipe.engine is not None
    assert recipe.engine["name"] == "local"
    assert recipe.data is not None
    assert recipe.data.sources[0].mapping() == {"input": "q", "output": "a"}


def test_data_with_an_env_is_evaluated_by_play(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "x.yaml", "run: {dir: x, steps: 1}\nalgorithm: sft\n" + RECORDS + ROLLOUTS))
    assert recipe.plays
    assert recipe.rewards is not None
    assert [item["name"] for item in recipe.rewards] == ["env"]


# ---- options of the optimisation -------------------------------------------------------------------------------


def test_every_option_of_the_optimisation_is_taken_up(base: Path) -> None:
    recipe = load_recipe(
        base,
        [
            "optim.name=adamw_8bit",
            "optim.schedule=plateau",
            "optim.plateau_metric=eval/return",
            "optim.plateau_factor=0.1",
            "optim.plateau_patience=4",
            "optim.warmup_steps=3",
            "optim.max_grad_norm=0.5",
            "algorithm.name=ppo",
            "optim.critic_learning_rate=1e-5",
            "optim.batch_size=2",
            "optim.gradient_accumulation=8",
            "early_stopping={metric: eval/kl, mode: min, patience: 10, min_delta: 0.01}",
            "model.autocast=float16",
            "model.gradient_checkpointing=true",
            "model.cache_dir=cache",
            "model.device_map=auto",
            "model.device=cuda:1",
            "eval.max_samples=2",
        ],
    )
    optim = recipe.optim
    assert (optim.name, optim.schedule, optim.plateau_metric) == ("adamw_8bit", "plateau", "eval/return")
    assert (optim.plateau_factor, optim.plateau_patience, optim.warmup_steps) == (0.1, 4, 3)
    assert (optim.max_grad_norm, optim.critic_learning_rate) == (0.5, 1e-5)
    assert optim.groups_per_step == 16
    assert recipe.early_stopping is not None
    assert recipe.early_stopping.model_dump() == {
        "metric": "eval/kl",
        "mode": "min",
        "patience": 10,
        "min_delta": 0.01,
    }
    model = recipe.model
    assert (model.autocast, model.gradient_checkpointing, model.cache_dir) == ("float16", True, Path("cache"))
    assert (model.device_map, model.device) == ("auto", "cuda:1")
    assert recipe.eval.task_count == 2  # of 16


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "plateau"])
def test_schedules(base: Path, schedule: str) -> None:
    assert load_recipe(base, [f"optim.schedule={schedule}"]).optim.schedule == schedule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.name=adam8bit", "did you mean 'adamw_8bit'?"),
        ("optim.plateau_metric=eval/return", "optim.plateau_metric has no effect with schedule: constant"),
        ("optim.plateau_factor=0.1", "optim.plateau_factor has no effect with schedule: constant"),
        ("optim.min_learning_rate=1e-6", "optim.min_learning_rate has no effect with schedule: constant"),
        ("optim.gradient_accumulation=0", "optim.gradient_accumulation is 0; it should be greater than or equal to 1"),
        ("early_stopping.patience=0", "early_stopping.patience is 0; it should be greater than or equal to 1"),
        ("early_stopping.mode=down", "early_stopping.mode is 'down'; it should be 'max', 'min' or 'auto'"),
        ("model.autocast=fp16", "model.autocast is 'fp16'; it should be 'none', 'bfloat16' or 'float16'"),
        ("model={dtype: float16, lora: null}", "float16 weights lose small updates; set model.dtype=float32 with"),
        ("model.device=cuda:x", "it should be 'auto', 'cpu', 'cuda' or one GPU such as 'cuda:1'"),
        ("eval.max_samples=0", "eval.max_samples is 0; it should be greater than or equal to 1"),
        ("eval.max_samples=yes", "eval.max_samples is True; it should be a number"),
    ],
)
def test_a_bad_option_of_the_optimisation_is_refused(base: Path, text: str, expected: str) -> None:
    assert expected in sentence(base, [text])
