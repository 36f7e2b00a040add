"""A run file becomes tables, or every one of its mistakes is told at once."""

import os
from pathlib import Path

import pytest

from meshwright.launcher.runfile.input_file import input_bytes
from meshwright.launcher.runfile.keys import all_keys, field_of
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.runfile.read import read_run_file

SOUND = """
[run]
name = "x"
[model]
preset = "dense-tiny"
[data]
store = "s"
seq_len = 64
[train]
steps = 100
global_batch_size = 8
[learning_rate]
peak = 1e-3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str, world_size: int | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_run_file(path, list(overrides), world_size=world_size)
    return caught.value.problems


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write(tmp_path, SOUND)


def test_a_sound_file_becomes_its_tables(sound: Path) -> None:
    run_file = read_run_file(sound, world_size=2)
    assert run_file.model.hidden_size == 64
    assert run_file.train.steps == 100
    assert run_file.optimizer.betas == (0.9, 0.95)
    assert run_file.run.output_folder == "output/x"


def whole_numbers() -> list[str]:
    """Return every key whose value is a whole number."""
    return [key for key in all_keys() if (field := field_of(key)) is not None and field.annotation is int]


@pytest.mark.parametrize("key", whole_numbers())
def test_no_whole_number_is_so_large_that_something_else_breaks(sound: Path, key: str) -> None:
    """Unbounded, these ended without memory, or as a number that no float holds."""
    found = problems(sound, "model.preset=moe-tiny", f"{key}=1{'0' * 400}", world_size=2)
    assert any(line.startswith(f"{key} = 1000") and "must be at most " in line for line in found), found


def test_keys_beside_a_preset_win(sound: Path) -> None:
    run_file = read_run_file(sound, ["model.num_layers=6", "model.num_kv_heads=4"])
    assert (run_file.model.num_layers, run_file.model.num_kv_heads, run_file.model.hidden_size) == (6, 4, 64)


def test_the_experts_of_a_preset_can_be_changed_one_key_at_a_time(sound: Path) -> None:
    moe = read_run_file(sound, ["model.preset=moe-tiny", "model.moe.num_experts=16"]).model.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k) == (16, 2)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
[run]
name = "x"
[model]
preset = "llama3-8b"
num_kv_heads = 6
lr = 3
[data]
store = "s"
seq_len = 64
[train]
stps = 3
steps = 100
global_batch_size = 7
micro_batch_size = "4"
[optimzer]
eps = 1
[learning_rate]
peak = -1.0
warmup_steps = 200
[parallel]
ep = 5
[zero]
stage = 5
""",
    )
    found = problems(path, world_size=6)
    beginnings = [
        "model.lr: no such key; did you mean learning_rate.peak? [model] has: preset, pattern,",
        'train.micro_batch_size = "4": must be a whole number; write 4 without quotes',
        "train.stps: no such key; did you mean train.steps? [train] has: steps, global_batch_size,",
        "learning_rate.peak = -1.0: must be above 0",
        "zero.stage = 5: must be at most 3",
        "optimzer: no such table; did you mean optimizer? the tables are: run, model,",
        "model.num_kv_heads = 6: must divide model.num_heads = 32; one of [1, 2, 4, 8, 16, 32] would fit",
        "parallel.ep = 5: splits experts, and the model has none",
        "parallel.ep = 5: ep * etp = 5 must divide the 6 ranks",
        "train.global_batch_size = 7: must be a multiple of the 6 data-parallel ranks",
    ]
    for beginning in beginnings:
        assert any(line.startswith(beginning) for line in found), beginning
    # warm-up against steps follows from a key that is wrong itself
    assert len(found) == len(beginnings)


def test_the_message_counts_and_names_the_file(sound: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_run_file(sound, ["train.stps=3", "zero.stage=7"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{sound}: 2 problems, nothing was started"
    assert all(line.startswith("  ") for line in lines[1:])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.device=gpu", 'run.device = "gpu": must be one of ["auto", "cpu", "cuda", "mps"]; did you mean "cpu"?'),
        ("train.steps=0", "train.steps = 0: must be at least 1"),
        ("train.steps=2.5", "train.steps = 2.5: must be a whole number"),
        ("train.steps=true", "train.steps = true: must be a whole number"),
        ("train.compile=1", "train.compile = 1: must be true or false"),
        ("train.compile=yes", 'train.compile = "yes": must be true or false'),
        ("train.clip_norm=nan", "train.clip_norm = nan: must be a finite number"),
        ("learning_rate.final_fraction=1.5", "learning_rate.final_fraction = 1.5: must be at most 1.0"),
        ("optimizer.betas=[0.9]", "optimizer.betas[1]: is missing"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas[1] = 1.0: must be below 1.0"),
        ("optimizer.betas=0.9", "optimizer.betas = 0.9: must be a list, in brackets"),
        ('model.bias=["w"]', 'model.bias[0] = "w": must be one of ["q", "k", "v", "output", "ffn"]'),
        ("train.batch_ramp=[{samples=1, global_batch_size=1, x=2}]", "train.batch_ramp[0].x = 2: no such key"),
        ("optimizer.groups=[{eps=1e-6}]", "optimizer.groups[0].match: is missing"),
        ('optimizer.groups=[{match="*", eps=0}]', "optimizer.groups[0].eps = 0: must be above 0"),
        ('optimizer.groups=[{match="*", betas=[0.9, 1.0]}]', "optimizer.groups[0].betas[1] = 1.0: must be below 1.0"),
        ("model.d_model=64", "model.d_model: no such key; did you mean model.hidden_size?"),
        ("train.seq_len=64", "train.seq_len: no such key; did you mean data.seq_len?"),
        ("data=3", "data=3: data is a table; its keys are set one by one, such as data.store=...; [data] has: store,"),
        (f"run.name={'a' * 201}", f'run.name = "{"a" * 76}...: has 201 bytes; at most 200 would fit'),
        ("model.preset=llama3", 'model.preset = "llama3": there is no such preset; the presets are: dense-tiny,'),
        ("run.name=a/b", 'run.name = "a/b": does not have the form; Name of the run'),
    ],
)
def test_a_wrong_value_is_told_with_its_rule(sound: Path, override: str, line: str) -> None:
    found = problems(sound, override)
    assert len(found) == 1
    assert found[0].startswith(line)


def test_a_mistyped_preset_is_told_once_with_the_nearest(sound: Path) -> None:
    (line,) = problems(sound, "model.preset=dens-tiny")
    assert line.endswith("; did you mean dense-tiny?")
    assert line.count("did you mean") == 1


def test_a_missing_key_is_told_with_its_meaning_and_the_rest_is_checked(tmp_path: Path) -> None:
    text = SOUND.replace("steps = 100\n", "").replace('[run]\nname = "x"', "")
    found = problems(write(tmp_path, text), "parallel.ep=2", "model.num_kv_heads=3")
    assert found == (
        "[run]: the table is missing; it needs name",
        "train.steps: is missing; Updates of the weights in the whole run.",
        "model.num_kv_heads = 3: must divide model.num_heads = 4; one of [1, 2, 4] would fit",
        "parallel.ep = 2: splits experts, and the model has none (no table [model.moe]); 1 would fit",
    )


def test_a_model_without_a_size_is_not_held_to_a_size_nobody_gave(tmp_path: Path) -> None:
    text = SOUND.replace('preset = "dense-tiny"', "num_layers = 3\nnum_heads = 7\nnum_kv_heads = 2\nhead_dim = 3")
    found = [line.partition(":")[0] for line in problems(write(tmp_path, text))]
    assert found == ["model.hidden_size", "model.head_dim = 3", "model.num_kv_heads = 2"]
    without_head_dim = text.replace("head_dim = 3", "").replace("num_heads = 7", "num_heads = 1")
    found = [line.partition(":")[0] for line in problems(write(tmp_path, without_head_dim))]
    assert found == ["model.hidden_size", "model.num_kv_heads = 2"]


def test_a_wrong_size_hides_only_what_follows_from_it(sound: Path) -> None:
    wrong = ['model.hidden_size="16"', "model.num_heads=3", "model.num_kv_heads=2", "parallel.ep=3"]
    found = problems(sound, *wrong, world_size=1)
    assert [line.partition(":")[0] for line in found] == [
        'model.hidden_size = "16"',
        "model.num_kv_heads = 2",
        "parallel.ep = 3",
        "parallel.ep = 3",
    ]


def test_an_unknown_preset_says_nothing_of_what_its_model_lacks(sound: Path) -> None:
    found = problems(sound, "model.preset=moe-tny", "parallel.ep=2", "model.num_kv_heads=3", world_size=2)
    assert [line.partition(":")[0] for line in found] == ['model.preset = "moe-tny"']


def test_an_empty_file_is_told_all_that_it_needs(tmp_path: Path) -> None:
    found = problems(write(tmp_path, ""))
    assert [line.partition(":")[0] for line in found] == ["[run]", "[model]", "[data]", "[train]", "[learning_rate]"]


def test_broken_toml_is_told_with_its_line(tmp_path: Path) -> None:
    found = problems(write(tmp_path, SOUND + "[zero\nstage = 1\n"))
    assert len(found) == 1
    assert "is no TOML" in found[0]
    assert f"line {SOUND.count(chr(10)) + 1}" in found[0]


def test_a_key_given_twice_is_told(tmp_path: Path) -> None:
    assert "Cannot overwrite a value" in problems(write(tmp_path, SOUND + "peak = 2.0\n"))[0]


def test_a_file_that_is_no_text_or_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'[run]\nname = "caf\xe9"\n')
    assert problems(tmp_path / "latin.toml") == ("is no UTF-8 text: byte 17 is 0xe9",)
    assert problems(tmp_path / "none.toml")[0].startswith("there is no such file")
    assert problems(tmp_path)[0].startswith("cannot be read")


@pytest.mark.parametrize("value", ["3", "[]", '"x"'])
def test_a_table_that_is_none_is_told(tmp_path: Path, value: str) -> None:
    text = f"zero = {value}\n" + SOUND
    assert problems(write(tmp_path, text)) == (f"zero = {value}: must be a table",)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + SOUND.encode())
    assert read_run_file(tmp_path / "run.toml").run.name == "x"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        pytest.param("a = " + "[" * 5000 + "]" * 5000, "has lists or tables nested too deep", id="beyond the parser"),
        pytest.param("a = " + "[" * 100 + "]" * 100, "has lists or tables nested too deep", id="deep list"),
        pytest.param("a." * 100 + "b = 1", "has lists or tables nested too deep", id="deep table"),
        pytest.param("a = " + "9" * 5000, "has a number of more than 4,300 digits", id="digits"),
        pytest.param("a." * 20_000 + "b = 1", "line 15 has 20,000 dots; a key has at most 64 names", id="dots"),
        pytest.param("#" * 2**18, "has 262,299 bytes; at most 262,144 would fit", id="bytes"),
    ],
)
def test_what_would_end_the_parser_is_told(tmp_path: Path, line: str, told: str) -> None:
    found = problems(write(tmp_path, f"{SOUND}[x]\n{line}\n"))
    assert len(found) == 1
    assert found[0].startswith(told)


def test_a_number_of_many_digits_in_a_base_without_a_limit_is_told_shortly(tmp_path: Path) -> None:
    found = problems(write(tmp_path, SOUND.replace("steps = 100", f"steps = 0x{'f' * 5000}")))
    assert len(found) == 1
    assert found[0].startswith("train.steps = a number of about 6,021 digits: must be at most")


def test_only_an_ordinary_file_is_read(tmp_path: Path) -> None:
    """A pipe would be waited for, and a device read without end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        assert problems(tmp_path / name) == ("is a pipe, a socket or a device; a file on a disk would fit",)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc")
def test_a_file_that_says_it_is_empty_is_read_no_further_than_the_bound() -> None:
    """The files of /proc have a size of 0, whatever they hold."""
    with pytest.raises(ValueError, match="has more than the 3 bytes that would fit"):
        input_bytes("/proc/self/status", 3)


def test_an_output_folder_beneath_a_file_is_told(sound: Path) -> None:
    (sound.parent / "file").write_text("")
    for below in ("", "/run", "/deep/run"):
        folder = f"{sound.parent}/file{below}"
        with pytest.raises(ConfigError, match=r"file is there and is no folder; another would fit"):
            read_run_file(sound, [f"run.folder={folder}"], folders="if here")
    read_run_file(sound, [f"run.folder={sound.parent}/new/run"], folders="if here")
