"""Settings are strict and come back from their file; recipes are whole configurations; words become one of them."""

from __future__ import annotations

import os

import pytest
import yaml

from freqkd_analysis.errors import RunError
from freqkd_train import choose, config, recipes
from freqkd_train.config import Config, ConfigError


def test_a_file_gives_back_what_was_written(tmp_path):
    made = Config().updated({"training.lr": 3e-5, "data.size": [64, 96], "loss.forms": ["mse", "cosine"], "seed": 7})
    config.write(tmp_path / "a.yaml", made)
    assert config.read(tmp_path / "a.yaml") == made
    assert made.training.lr == 3e-5 and made.data.size == (64, 96) and made.loss.forms == ("mse", "cosine")


def test_settings_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        Config().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"training.epoch": 3}, r'no setting "training\.epoch"\. Did you mean "training\.epochs"\?'),
        ({"trainin.epochs": 3}, r'no setting "trainin\.epochs"\. Did you mean "training\.epochs"\?'),
        ({"training.epochs": "many"}, r"training\.epochs: .*valid integer.*got 'many'"),
        ({"training.epochs": -1}, r"training\.epochs: .*greater than or equal to 0.*got -1"),
        ({"training.lr": 0}, r"training\.lr: .*greater than 0"),
        ({"student.adapt": "lra"}, r'expected student\.adapt auto, lora, full, head or last:K, got "lra"'),
        ({"student.adapt": "last:0"}, r"expected student\.adapt"),
        ({"student.weights": "random", "student.merge": 0.5}, r"student\.merge 0\.5 would mix in random weights"),
        ({"data.scale": [0.9, 0.2]}, r"expected data\.scale LOW,HIGH"),
        ({"data.scale": [0.5, 1], "data.geometry": "pad"}, r"data\.scale 1,1 with data\.geometry pad"),
        ({"loss.name": "measured"}, r"needs a run of the analysis: --weights-from RUN"),
        ({"loss.weights_from": "runs/a"}, r"goes with the loss `measured`, got `released`"),
        ({"loss.normalize": "band"}, r"needs the energies of a run"),
        ({"loss.rule": "precision"}, r"loss\.rule precision .*use the loss `measured`, got `released`"),
        ({"loss.name": "none", "loss.match_gradient": "released"}, r"loss\.match_gradient released scales a loss"),
        ({"training.cache_gb": 1, "data.scale": [0.5, 1]}, r"it needs data\.scale 1,1"),
        ({"training.cache_gb": 1, "data.pairing": "shuffled"}, r"needs the teacher's image unchanged"),
        ({"training.accumulate": 64}, r"training\.accumulate of at most training\.batch 32"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        Config().updated(changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, says", [
    ("a: [", "is no YAML"), ("- 1", "expected settings such as"), ("loss: {nme: mse}", r'no setting "loss\.nme"'),
    ("loss: 3", "loss"),
])  # fmt: skip
def test_a_broken_file_is_named(tmp_path, text, says):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        config.read(path)
    assert "broken.yaml" in str(caught.value)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{'seed' if k == 9 else f'a{k}'}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 10))  # fmt: skip
HURTFUL = [
    (BOMB, "is no YAML (line 2: aliases are not taken)"),
    ("a: &a {k: 1}\nb: {<<: [*a, *a]}", "is no YAML (line 2: aliases are not taken)"),
    ("data: &a [*a]", "aliases are not taken"),
    (f"seed: 1{':59' * 3000}", "is no YAML"),
    (f"seed: 0x{'f' * 5000}", "is no YAML"),
    ("seed: " + "[" * 5000, "is no YAML"),
    (f"seed: {'x' * 5000}", "got 'xxxx"),
    (f"seed: !{'x' * 5000} 1", "(line 1: "),
    ("seed: 1 #" + "x" * 2**17, "is no settings file: it holds more than 128 KiB"),
    ("seed: '\x00'", "is no YAML"),
]


@pytest.mark.parametrize("text, says", HURTFUL, ids=[f"{k}" for k in range(len(HURTFUL))])
def test_a_file_made_to_hurt_is_refused_in_one_short_line(tmp_path, text, says):
    """By structure and size alone: expanding the first one would take all memory there is."""
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.read(path)
    line = str(caught.value)
    assert says in line and str(path) in line and "\n" not in line and len(line) < 300 + len(str(path)), line


def test_other_bytes_and_holes_are_no_settings(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"seed: \xff")
    with pytest.raises(ConfigError, match=r"c\.yaml is no YAML\."):
        config.read(path)
    os.truncate(path, 10**11)  # a hole of 100 GB takes no room on disk, but all there is once read
    with pytest.raises(ConfigError, match="more than 128 KiB"):
        config.read(path)


@pytest.mark.parametrize("value", ["[" * 5000, f"1{':59' * 3000}", "&a [*a]", "[1,"])
def test_a_value_made_to_hurt_is_refused_in_one_short_line(value):
    with pytest.raises(ConfigError, match="--set seed: .* is no YAML value") as caught:
        config.assignment(f"seed={value}")
    assert len(str(caught.value)) < 200


def test_what_is_written_has_no_alias(tmp_path):
    """The same list twice is written twice: our own files must be readable."""
    twice = [0.5, 0.5]
    settings = Config().updated({"data.scale": twice, "training.epochs": 2})
    config.write(tmp_path / "c.yaml", settings)
    assert "&" not in config.text(settings) and config.read(tmp_path / "c.yaml") == settings


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no settings file"):
        config.read(tmp_path / "none.yaml")


@pytest.mark.parametrize("word, expected", [
    ("training.lr=1e-4", ("training.lr", 1e-4)), ("data.size=[64, 96]", ("data.size", [64, 96])),
    ("loss.weights=[1, 1e-1]", ("loss.weights", [1, 0.1])), ("student.name=", ("student.name", "")),
    ("loss.weight=null", ("loss.weight", None)),
    ("data.spec=kit:a=b", ("data.spec", "kit:a=b")),
])  # fmt: skip
def test_assignments(word, expected):
    assert config.assignment(word) == expected


@pytest.mark.parametrize("word", ["training.lr", "=3", "a=["])
def test_assignments_that_are_none(word):
    with pytest.raises(ConfigError, match="--set"):
        config.assignment(word)


def test_every_key_has_its_place_and_differences_name_it():
    tree = yaml.safe_load(config.text(Config()))
    assert len(config.all_keys()) == len(set(config.all_keys())) > 50
    for key in config.all_keys():
        node = tree
        for part in key.split("."):
            node = node[part]
    other = Config().updated({"data.rgb.noise": 0.1, "training.epochs": 1})
    assert config.difference(Config(), other) == {"data.rgb.noise": (0.0, 0.1), "training.epochs": (12, 1)}


@pytest.mark.parametrize("preset", recipes.PRESETS)
@pytest.mark.parametrize("name, value", [(n, v) for n, (_, values) in recipes.RECIPES.items() for v in values or ("",)])
def test_every_recipe_is_a_whole_configuration(name, value, preset):
    made = recipes.make(f"{name}:{value}" if value else name, preset)
    assert made.recipe.partition(":")[0] == name
    assert config.parse(yaml.safe_load(config.text(made))) == made
    card = recipes.card(name)
    assert "Source:" in card and "Command:" in card and "Expected:" in card


def test_the_paper_preset_has_the_releases_numbers():
    made = recipes.make("kaist", "paper")
    assert (made.student.rank, made.student.alpha, made.student.dropout, made.student.merge) == (64, 64.0, 0.05, 0.5)
    assert made.student.targets == ("qkv", "fc1", "fc2") and made.teacher.layers == "7,15,19,21,23"
    t = made.training
    assert (t.epochs, t.batch, t.lr, t.weight_decay, t.clip) == (12, 32, 2e-4, 1e-4, 1.0)
    assert (t.warmup, t.warmup_start, t.min_lr) == (500, 0.01, 1e-7)
    assert made.data.geometry == "pad" and made.data.size == (512, 640) and made.data.flip == 0.5


def test_ablations_change_one_thing():
    base = recipes.make("kaist", "paper")
    for text, keys in [("ablation_cutoff:0.25", {"loss.bands"}),
                       ("ablation_rank:16", {"student.rank", "student.alpha"}),
                       ("ablation_merge:1", {"student.merge"}), ("ablation_rank:full", {"student.adapt"}),
                       ("ablation_high_form:signed_log,1", {"loss.forms", "loss.weights"}),
                       ("controls:grey", {"data.teacher_input"})]:  # fmt: skip
        assert set(config.difference(base, recipes.make(text, "paper"))) == keys | {"recipe"}, text


@pytest.mark.parametrize("text, preset, says", [
    ("kaits", "compact", 'no recipe "kaits". Did you mean "kaist"'), ("kaist:3", "compact", "takes no value"),
    ("ablation_cutoff:0.3", "compact", "expected ablation_cutoff:0.1|0.25|0.5|0.75"),
    ("kaist", "papr", 'Did you mean "paper"'),
])  # fmt: skip
def test_recipes_that_are_none(text, preset, says):
    with pytest.raises(ConfigError) as caught:
        recipes.make(text, preset)
    assert says in str(caught.value)


def test_options_come_before_set_and_after_the_recipe():
    made = choose.settings({"training.epochs": 3, "data.size": "96x64"}, ["training.epochs=4"], recipe="kaist",
                           preset="paper")  # fmt: skip
    assert made.training.epochs == 4 and made.data.size == (96, 64) and made.student.rank == 64


def test_weights_from_alone_means_measured():
    assert choose.settings({"loss.weights_from": "runs/a"}, []).loss.name == "measured"


def test_a_file_and_a_recipe_do_not_mix(tmp_path):
    with pytest.raises(ConfigError, match="--config or --recipe"):
        choose.settings({}, [], tmp_path / "a.yaml", "kaist")


def test_settings_by_recipe_file_or_run(tmp_path):
    config.write(tmp_path / "config.yaml", Config().updated({"seed": 5}))
    assert (
        choose.named(str(tmp_path), "compact").seed == choose.named(str(tmp_path / "config.yaml"), "compact").seed == 5
    )
    with pytest.raises(ConfigError, match=r'got "kaits"\. Did you mean "kaist"'):
        choose.named("kaits", "compact")


def test_the_newest_unfinished_run_is_taken_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="no interrupted distillation"):
        choose.folder(None, True)
    for name in ("a", "b"):
        config.write(tmp_path / "runs" / name / "config.yaml", Config())
    (tmp_path / "runs" / "b" / "manifest.json").write_text("{}")
    assert choose.folder(None, True).name == "a"
    assert choose.folder(None, False).name.endswith("-distill")
