"""Settings: published values, presets, the command line, and what a resumed run may change."""

import ast
import json
from dataclasses import fields
from pathlib import Path

import pytest

from rdarts_fast import config
from rdarts_fast.config import RandomSearchConfig, RetrainConfig, SearchConfig, defaults
from rdarts_fast.config_sources import checked, from_settings, parse
from rdarts_fast.errors import UserError


def search_line(*words: str) -> SearchConfig:
    return parse(SearchConfig, "", "search", words)


def test_published_search_values() -> None:
    c = defaults(SearchConfig, "cifar10", "default")
    assert c == defaults(SearchConfig, "cifar10", "paper").__class__(data="cifar10")
    assert (c.order, c.epsilon_scale, c.noise_per_pass) == ("second", 0.01, "fresh")
    assert (c.channels, c.layers, c.epochs, c.batch_size) == (16, 8, 50, 64)
    assert (c.learning_rate, c.learning_rate_min, c.momentum) == (0.025, 0.001, 0.9)
    assert (c.weight_decay, c.grad_clip) == (3e-4, 5.0)
    assert (c.alpha_learning_rate, c.alpha_weight_decay) == (3e-4, 1e-3)
    assert (c.alpha_beta1, c.alpha_beta2) == (0.5, 0.999)
    assert (c.drop_path_prob, c.cutout_prob, c.cutout_schedule) == (0.0, 1.0, "constant")


@pytest.mark.parametrize(
    ("preset", "size"),
    [("paper", (8, 16)), ("8x16", (8, 16)), ("20x16", (20, 16)), ("20x36", (20, 36))],
)
def test_published_retraining_values(preset: str, size: tuple[int, int]) -> None:
    c = defaults(RetrainConfig, "cifar10", preset)
    assert (c.layers, c.channels) == size
    assert (c.epochs, c.batch_size, c.learning_rate, c.learning_rate_min) == (600, 96, 0.025, 0.0)
    assert (c.auxiliary, c.auxiliary_weight, c.drop_path_prob, c.cutout_prob) == (True, 0.4, 0.2, 1)
    assert (c.momentum, c.weight_decay, c.grad_clip) == (0.9, 3e-4, 5.0)


def test_flags_win_over_presets_and_presets_over_the_data_sets_own() -> None:
    assert search_line().channels == defaults(SearchConfig, "digits", "default").channels == 8
    assert search_line("--data", "cifar10").channels == 16
    assert search_line("--preset", "paper").channels == 16
    assert search_line("--preset", "quick").epochs == 5
    given = search_line("--preset", "paper", "--epochs", "7", "--weight-decay", "0.0027")
    assert (given.epochs, given.weight_decay, given.layers) == (7, 0.0027, 8)
    assert from_settings(SearchConfig, {"preset": "quick", "epochs": 9}).epochs == 9


def test_every_setting_is_a_flag_with_a_help_text(capsys) -> None:
    for kind in (SearchConfig, RandomSearchConfig, RetrainConfig):
        with pytest.raises(SystemExit) as stop:
            parse(kind, "About.", "program", ["--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for field in fields(kind):
            if field.name != "source":
                assert config.flag(field.name) in text or f"--no-{field.name}" in text
    help_of_paper = ["--preset", "paper", "--help"]
    with pytest.raises(SystemExit):
        parse(SearchConfig, "", "program", help_of_paper)
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 16)" in text  # the channels that the flags beside --help mean


def test_every_help_text_is_one_line() -> None:
    """tyro keeps the line breaks of a text, which would break it in the middle of a sentence."""
    source = ast.parse(Path(config.__file__).read_text())
    texts = [
        node.value.value
        for owner in ast.walk(source)
        if isinstance(owner, ast.ClassDef)
        for node in owner.body[1:]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    assert len(texts) > 30
    assert [text for text in texts if "\n" in text] == []


def test_an_unknown_flag_gets_the_nearest(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        search_line("--spase", "s4")
    assert stop.value.code == 2
    assert "--space" in capsys.readouterr().err


def test_unknown_words_get_the_nearest() -> None:
    with pytest.raises(UserError, match=r'unknown preset "papr".*Did you mean "paper"'):
        search_line("--preset", "papr")
    with pytest.raises(UserError, match=r'unknown setting "epoch".*Did you mean "epochs"'):
        from_settings(SearchConfig, {"epoch": 3})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "--epochs: expected a whole number of at least 1, got 0"),
        ("batch_size", 1, "--batch-size: expected a whole number of at least 2, got 1"),
        ("epoch_steps", 0, "--epoch-steps"),
        ("threads", 0, "--threads"),
        ("image_size", 7, "--image-size: expected a whole number of at least 8"),
        ("seed", -1, "--seed"),
        ("seed", 2**64, "--seed"),
        ("learning_rate", -1.0, "--learning-rate: expected a number of at least 0, got -1.0"),
        ("learning_rate", -1, "--learning-rate: expected a number of at least 0, got -1"),
        ("learning_rate", float("nan"), "--learning-rate"),
        ("weight_decay", float("inf"), "--weight-decay"),
        ("drop_path_prob", 1.0, "--drop-path-prob: expected a number of at least 0 and below 1"),
        ("cutout_prob", 1.1, "--cutout-prob: expected a number of at least 0 and at most 1"),
        ("alpha_beta1", 1.0, "--alpha-beta1"),
        ("epsilon_scale", 0.0, "--epsilon-scale: expected a number above 0"),
        ("grad_clip", 0.0, "--grad-clip: expected a number above 0"),
        ("cutout_length", 0, "--cutout-length"),
        ("layers", 2.5, "--layers: expected a whole number"),
        ("learning_rate", "fast", "--learning-rate: expected a number, got 'fast'"),
        ("order", "third", "--order: expected first or second, got 'third'"),
        ("data", 3, "--data: expected text, got 3"),
        ("tensorboard", "yes", "--tensorboard: expected True or False, got 'yes'"),
    ],
)
def test_bad_values_name_the_flag(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError) as error:
        from_settings(SearchConfig, {name: value})
    assert message in str(error.value)


def test_whole_numbers_are_fine_where_a_number_is_asked_for() -> None:
    c = from_settings(SearchConfig, {"cutout_prob": 1, "out": "somewhere"})
    assert checked(c).cutout_prob == 1
    assert c.out == Path("somewhere")
    assert from_settings(SearchConfig, {"space": Path("mine.json")}).space == str(
        Path("mine.json").absolute()
    )


def write_run(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    stored = config.to_json(from_settings(SearchConfig, {"preset": "quick", "out": folder}))
    (folder / "config.json").write_text(json.dumps(stored | changes))
    return folder


def test_a_resumed_run_keeps_its_settings(tmp_path) -> None:
    run = write_run(tmp_path / "run", epochs=4)
    resumed = search_line("--resume", str(run))
    assert (resumed.epochs, resumed.channels, resumed.preset) == (4, 4, "quick")
    assert resumed.resume == run
    assert search_line("--resume", str(run), "--epochs", "4") == resumed
    assert search_line("--resume", str(run), "--threads", "1").threads == 1
    with pytest.raises(UserError, match="--epochs: the run was started with 4, got 50"):
        search_line("--resume", str(run), "--epochs", "50")
    with pytest.raises(UserError, match="--seed: the run was started with 0, got 1"):
        from_settings(SearchConfig, {"resume": run, "seed": 1})


def test_what_cannot_be_resumed_says_why(tmp_path) -> None:
    with pytest.raises(UserError, match=r"--resume .*nowhere: not a run's folder"):
        search_line("--resume", str(tmp_path / "nowhere"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        search_line("--resume", str(tmp_path / "text"))
    wrong = write_run(tmp_path / "wrong", epochs="two")
    with pytest.raises(UserError, match=r"config.json: --epochs: expected a whole number"):
        search_line("--resume", str(wrong))
    other = write_run(tmp_path / "other", colour="blue")
    with pytest.raises(UserError, match=r"not a search of this version.*colour"):
        search_line("--resume", str(other))
    with pytest.raises(UserError, match="not a retrain of this version"):
        parse(RetrainConfig, "", "retrain", ["--resume", str(tmp_path / "other")])


def test_retraining_takes_its_data_from_the_run(tmp_path) -> None:
    run = write_run(tmp_path / "run", data="cifar100", data_root="elsewhere")
    c = parse(RetrainConfig, "", "retrain", [str(run), "--epochs", "5"])
    assert (c.data, c.channels, c.epochs) == ("cifar100", 16, 5)
    assert c.data_root == Path("elsewhere").absolute()
    assert parse(RetrainConfig, "", "retrain", [str(run), "--data", "digits"]).channels == 8
    assert from_settings(RetrainConfig, {"source": "genotype.json"}).data == "digits"


def test_a_config_survives_its_file() -> None:
    c = from_settings(SearchConfig, {"image_size": 32, "out": "x"})
    stored = json.loads(json.dumps(config.to_json(c)))
    assert "resume" not in stored
    assert from_settings(SearchConfig, stored) == c
