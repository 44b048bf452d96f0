"""Arguments and config files: precedence, types, and each mistake by its message.

    python -m pytest tests/test_arguments.py
"""
import json
from pathlib import Path

import pytest

import common
from evidence import splitting


def make_parser():
    parser = common.Parser("test")
    common.add_shared_arguments(parser, lr=5e-5)
    parser.add_argument("--d_model", type=int, default=768, help="width")
    parser.add_argument("--sample_weight", action="append", help="repeatable")
    parser.add_argument("--target_columns", nargs="+", help="names")
    return parser


def parse(*argv):
    return common.parse_arguments(make_parser(), list(argv))


def parse_config(tmp_path, text, *argv, name="c.yaml"):
    path = tmp_path / name
    path.write_text(text, errors="surrogateescape")
    return parse("--config", str(path), *argv)


def test_defaults_are_the_scripts_and_the_command_line_wins(tmp_path):
    assert parse().lr == 5e-5
    args = parse_config(tmp_path, "lr: 1e-4\nepochs: 7\n", "--epochs", "9")
    assert (args.lr, args.epochs) == (1e-4, 9)
    assert "epochs" in args.given and "lr" not in args.given


def test_an_unknown_flag_is_said_before_one_that_is_missing(capsys):
    parser = make_parser()
    parser.add_argument("--images_dir", required=True)
    with pytest.raises(SystemExit):
        common.parse_arguments(parser, ["--image_dir", "a"])
    assert "unknown flag --image_dir (did you mean --images_dir?)" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--split_file", "--files"])
def test_output_is_never_a_file_that_the_command_reads(tmp_path, capsys, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    parser = make_parser()
    parser.add_argument("--output", type=common.new_file, default="predictions.csv")
    parser.add_argument("--files", type=Path, nargs="+")
    (tmp_path / "predictions.csv").write_text("mine")
    for written in (["--output", str(tmp_path / "predictions.csv")], []):
        with pytest.raises(SystemExit):
            common.parse_arguments(parser, [flag, "predictions.csv", *written])
        assert f"--output and {flag} name the same file" in capsys.readouterr().err
    (tmp_path / "loop").symlink_to("loop")
    assert common.parse_arguments(parser, [flag, "loop"]), "found later, as a file that is not there"


@pytest.mark.parametrize("spelled", ["--batch-size", "--batch_size"])
def test_dashes_and_underscores_are_the_same(spelled):
    assert parse(spelled, "4").batch_size == 4
    assert parse(f"{spelled}=5").batch_size == 5


def test_aliases():
    args = parse("--max_epochs", "3", "--early_stop_patience", "4", "--accumulate_grad_batches", "2")
    assert (args.epochs, args.patience, args.accumulate) == (3, 4, 2)
    assert parse("--learning_rate", "1e-3").lr == 1e-3


def test_names_of_the_network_and_of_the_picture_size_are_understood_in_all_scripts():
    import train_assessor
    import train_dreamer
    import train_video
    data = {train_assessor: ["--images_dir", "a", "--ratings_file", "b"], train_dreamer: ["--data_dir", "a"],
            train_video: ["--manifest", "m.csv"]}
    for script, flags in data.items():
        for name in ("--backbone", "--encoder"):
            args = vars(script.parse_args([*flags, name, "resnet18", "--img_size", "96"]))
            assert args["image_size"] == 96 and "resnet18" in (args.get("backbone"), args.get("encoder"))


def test_help_shows_every_default():
    parser = make_parser()
    parser.set_defaults(val_batch_size=8)
    text = " ".join(parser.format_help().split())
    assert "without it, --batch_size (default: 8)" in text, "that of the script"
    assert "peak learning rate (default: 5e-05)" in text and "width (default: 768)" in text
    assert "scored once at the end (default: 0.0)" in text, "0 is not False"
    assert "(default: None)" not in text and "(default: False)" not in text and "start from random weights (default" not in text


@pytest.mark.parametrize("given, expected", [
    ([], (0.8, 0.2, 0.0)), (["--test_ratio", "0.15"], (0.65, 0.2, 0.15)),
    (["--train_ratio", "0.5", "--val_ratio", "0.25", "--test_ratio", "0.25"], (0.5, 0.25, 0.25))])
def test_the_training_takes_what_the_other_parts_leave(given, expected):
    args = parse(*given)
    splitting.check_flags(make_parser(), args)
    assert list(splitting.ratios_of_flags(args).values()) == pytest.approx(expected)


@pytest.mark.parametrize("given, words", [
    (["--train_ratio", "0.5"], ["add up to 1", "0.7"]), (["--val_ratio", "0.6", "--test_ratio", "0.5"], ["add up to 1"]),
    (["--val_ratio", "0.5", "--test_ratio", "0.5"], ["the train part must not be empty"]),
    (["--val_ratio", "0.9", "--test_ratio", "0.1"], ["the train part must not be empty"]),  # -3e-17 are left
    (["--train_ratio", "1", "--val_ratio", "0"], ["the val part must not be empty"]),
    (["--folds", "3", "--val_ratio", "1"], ["the train part must not be empty"]),
    (["--split_file", "s.json", "--val_ratio", "0.1", "--test_ratio", "0"], ["leave out test_ratio and val_ratio"])])
def test_shares_that_cannot_be_are_refused_before_any_file_is_read(given, words, capsys):
    with pytest.raises((SystemExit, common.UserError)) as caught:
        splitting.check_flags(make_parser(), parse(*given))
    message = f"{caught.value} {capsys.readouterr().err}"
    assert all(word in message for word in words)


def test_folds_and_a_split_file_take_no_shares(tmp_path, capsys):
    splitting.check_flags(make_parser(), parse("--folds", "3", "--val_ratio", "0"))
    config = tmp_path / "c.yaml"
    config.write_text("val_ratio: 0.5\ntest_ratio: 0.5\n")
    splitting.check_flags(make_parser(), parse("--split_file", "s.json", "--config", str(config)))
    config.write_text("train_ratio: 0.7\nval_ratio: 0.15\ntest_ratio: 0.15\n")
    splitting.check_flags(make_parser(), parse("--folds", "3", "--config", str(config)))
    with pytest.raises(SystemExit):
        splitting.check_flags(make_parser(), parse("--folds", "3", "--test_ratio", "0.15"))
    assert "--folds 3 scores every row once: --test_ratio 0.15 has none" in capsys.readouterr().err


@pytest.mark.parametrize("argv, expected", [([], "auto"), (["--use_amp"], "on"), (["--use_amp", "off"], "off")])
def test_bare_use_amp_means_on(argv, expected):
    assert parse(*argv).use_amp == expected


def test_a_dry_run_is_one_epoch():
    args = parse("--dry_run", "--epochs", "9", "--save_every", "2", "--warmup_epochs", "3")
    assert (args.epochs, args.patience, args.save_every) == (1, 0, 0)


def test_what_may_change_on_resume_is_said_where_a_flag_is_declared():
    parser = common.Parser("test")
    add = parser.group("some")
    add("--here", may_change=True, help="path")
    add("--always", help="setting")
    args = common.parse_arguments(parser, ["--here", "x"])
    assert args.may_change == {"here"} and common.flags_of(args) == {"here": "x", "always": None}
    assert {"output_dir", "num_workers", "device", "fold"} <= parse().may_change
    assert not {"seed", "lr", "batch_size", "augment"} & parse().may_change


def test_config_sections_switches_and_lists(tmp_path):
    args = parse_config(tmp_path, "model: {d_model: 64}\nrun:\n  deterministic: true\n  use_amp: off\n"
                                  "target_columns: [A b, C]\nsample_weight: [x=1, y=2]\n")
    assert (args.d_model, args.deterministic, args.use_amp) == (64, True, "off")
    assert args.target_columns == ["A b", "C"] and args.sample_weight == ["x=1", "y=2"]


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
@pytest.mark.parametrize("value, expected", [("true", "on"), ("false", "off")])
def test_a_config_may_write_use_amp_as_a_switch(tmp_path, name, value, expected):
    assert parse_config(tmp_path, f'{{"use_amp": {value}}}', name=name).use_amp == expected


def test_help_lists_the_augmentations_that_a_script_knows():
    parser = common.Parser()
    common.add_shared_arguments(parser, augments=("none", "light"), augment="light")
    assert "--augment {none,light}" in parser.format_help() and parser.parse_args([]).augment == "light"
    assert "--augment {none,light,full," in make_parser().format_help()


def test_config_can_switch_pretrained_off(tmp_path):
    assert parse_config(tmp_path, "no_pretrained: true").pretrained is False
    assert parse_config(tmp_path, "pretrained: false").pretrained is False
    assert parse_config(tmp_path, "pretrained: true").pretrained is True


def test_config_wins_over_the_resumed_run_and_loses_to_the_command_line(tmp_path):
    flags = {"lr": 0.5, "seed": 1, "epochs": 3, "deterministic": True, "sample_weight": ["a=1"], "pretrained": False}
    (tmp_path / "args.json").write_text(json.dumps({"script": "x", "command": "python x", "flags": flags}))
    args = parse_config(
        tmp_path, "seed: 2\nmax_epochs: 4\ndeterministic: false\nsample_weight: [b=2]\npretrained: true\n",
        "--resume", str(tmp_path), "--epochs", "5",
    )
    assert (args.lr, args.seed, args.epochs) == (0.5, 2, 5)
    assert args.deterministic is False and args.pretrained is True and args.sample_weight == ["b=2"]


def test_an_empty_list_is_a_value_of_a_flag_that_takes_none(tmp_path):
    """`--missing_codes` alone: no code at all; lost, a resumed run would stop over the codes again."""
    record = {"script": "x", "command": "python x", "flags": {"missing_codes": [], "sample_weight": []}}
    (tmp_path / "args.json").write_text(json.dumps(record))
    for flag, given in (("--resume", tmp_path), ("--config", tmp_path / "args.json")):
        parser = make_parser()
        parser.add_argument("--missing_codes", type=float, nargs="*")
        args = common.parse_arguments(parser, [flag, str(given)])
        assert args.missing_codes == [] and args.sample_weight is None


def test_resume_may_stand_in_a_config_but_not_in_the_record_of_a_run(tmp_path):
    assert parse_config(tmp_path, "resume: auto\n").resume == "auto"
    assert parse_config(tmp_path, "resume: auto\n", "--resume", str(finished(tmp_path, lr=0.5))).resume == str(tmp_path)
    args = parse_config(tmp_path, f"resume: {tmp_path}\nseed: 2\n")
    assert (args.resume, args.lr, args.seed) == (str(tmp_path), 0.5, 2)
    finished(tmp_path, lr=0.5, config="c.yaml")
    assert parse("--config", str(tmp_path / "args.json")).resume is None


def finished(folder, is_part=False, **flags):
    """A run folder that was itself continued by --resume auto."""
    record = {"script": "x", "command": "python x", "flags": {"resume": "auto", **flags}, "is_part": is_part}
    (folder / "args.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("part", ["fold_1", "baseline", "fold_1/baseline", "run_resnet18"])
def test_resume_of_a_part_of_a_run_is_resume_of_the_run_with_its_flags(tmp_path, part):
    (tmp_path / part).mkdir(parents=True)
    for folder in (tmp_path / part, (tmp_path / part).parent):
        finished(folder, is_part=True, lr=0.1)
    finished(tmp_path, lr=0.5)
    (tmp_path / part / "last.pth").write_bytes(b"")
    assert common.run_folder_of(tmp_path / part / "last.pth") == tmp_path == common.run_folder_of(tmp_path)
    assert parse("--resume", str(tmp_path / part)).lr == 0.5


def test_a_run_whose_output_dir_is_another_run_is_continued_itself(tmp_path):
    (tmp_path / "run_2").mkdir()
    finished(tmp_path, lr=0.5)
    finished(tmp_path / "run_2", lr=0.1)
    assert common.run_folder_of(tmp_path / "run_2") == tmp_path / "run_2"
    assert parse("--resume", str(tmp_path / "run_2")).lr == 0.1


def test_scripts_without_config_and_resume_refuse_both(capsys):
    for flag in ("--config", "--resume"):
        with pytest.raises(SystemExit):
            common.parse_arguments(common.Parser("bare"), [flag, "none"])
        assert f"unknown flag {flag}" in capsys.readouterr().err


def test_args_json_of_a_run_is_a_config(tmp_path):
    record = {
        "script": "x",
        "command": "python x",
        "flags": {"lr": 0.5, "resume": None, "deterministic": False, "pretrained": False},
        "versions": {"torch": "9"},
        "data": {"fingerprint": "f"},
    }
    args = parse_config(tmp_path, json.dumps(record), name="args.json")
    assert args.lr == 0.5 and args.deterministic is False and args.pretrained is False


@pytest.mark.parametrize("name, text", [
    ("c.yaml", "pixel_range: [0, 4095]\nuse_amp: on\nclip_grad: 1e-1\nweights: 010\n"),
    ("c.json", '\ufeff{"pixel_range": [0, 4095.0], "use_amp": "on", "clip_grad": 1e-1, "weights": "010"}')])
def test_config_values_are_read_as_if_they_were_typed(tmp_path, name, text):
    args = parse_config(tmp_path, text, name=name)
    assert args.pixel_range == [0, 4095] and args.use_amp == "on"
    assert args.clip_grad == 0.1 and str(args.weights) == "010"


@pytest.mark.parametrize("text, words", [
    ("epochz: 3", ["epochz", "(did you mean epochs?)"]), ("wd: 3", ["unknown key 'wd'; a key is a flag"]),
    ("lr: NO", ["lr", "NO"]), ("epochs: 3.5", ["epochs", "3.5"]),
    ("lr: -1", ["lr", "-1"]), ("lr: .nan", ["lr", "nan"]), ("epochs: 1\nepochs: 2", ["epochs", "twice"]),
    ("a: {epochs: 1}\nb: {epochs: 2}", ["epochs", "two sections"]), ("a: &x {epochs: 1}\nb: *x", ["anchors"]),
    ("- epochs", ["list"]), ("epochs: 3\nmax_epochs: 5", ["epochs and max_epochs are names of one flag"]),
    ("pretrained: true\nno_pretrained: true", ["pretrained and no_pretrained"]), ("config: base.yaml", ["copy its lines"]),
    ("name: K\udcfche", ["in UTF-8"]), ("a: [", ["cannot be read"]), ("scheduler: cosin", ["scheduler", "cosine"]),
    ("deterministic: 3", ["deterministic", "true or false"]), ("lr: [1e-4, 1e-3]", ["lr", "expected float", "1e-3"]),
    ("pixel_range: [0]", ["pixel_range", "expected 2"]), ("pixel_range: [0, 1, 27]", ["more values", "27"]),
    ("? [a]\n: 1", ["unknown key"]), ("lr: {a: {b: " + "{c: " * 5000, ["nested too deeply"]),
    ("[" * 100_000, ["nested too deeply"]), ("- " * 100_000, ["nested too deeply"]),
    ("!!python/object/apply:os.system ['true']", ["cannot be read"]),
])
def test_config_mistakes_are_one_line(tmp_path, text, words):
    with pytest.raises(common.UserError) as caught:
        parse_config(tmp_path, text)
    assert "\n" not in str(caught.value) and "c.yaml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("text, word", [
    ("[" * 100_000, "nested too deeply"), ('{"lr": NaN}', "NaN"), ('{"lr": 1, "lr": 2}', "twice")])
def test_json_config_mistakes(tmp_path, text, word):
    with pytest.raises(common.UserError, match=word):
        parse_config(tmp_path, text, name="c.json")


def test_missing_config(tmp_path):
    with pytest.raises(common.UserError, match="none.yaml cannot be read.*No such file"):
        parse("--config", str(tmp_path / "none.yaml"))


def test_a_config_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(common.UserError, match="c.yaml cannot be read as a config file .*Permission denied"):
        parse_config(tmp_path, "lr: 1")


@pytest.mark.parametrize("argv, words", [
    (["--epoch", "3"], ["--epoch", "--epochs"]),
    (["--epochs", "0"], ["--epochs", "outside"]), (["--epochs", "9" * 400], ["--epochs", "outside"]),
    (["--lr", "nan"], ["--lr", "outside"]),
    (["--folds", "x"], ["--folds", "invalid int value"]),
    (["--pixel_range", "255", "0"], ["--pixel_range 255 0", "black"]), (["--pixel_range", "0", "inf"], ["outside"]),
    (["--warmup_epochs", "10", "--epochs", "5"], ["--warmup_epochs 10 of 5 epochs"])])
def test_command_line_mistakes_leave_with_2(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    for word in words:
        assert word in message


def test_every_shared_flag_has_help():
    assert all(action.help for action in make_parser()._actions)
