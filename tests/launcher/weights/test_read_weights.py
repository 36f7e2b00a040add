"""Any rows of any weight are read by our name, from a checkpoint of any layout and from an exported folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_pool import run_mesh
from safetensors.torch import load_file, save_file
from tiny_exports import CONFIGS, tiny_model, write_tiny_export, write_tiny_run, write_tiny_store

from meshwright.data.store import TokenStore
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.weights import foreign_files
from meshwright.launcher.weights.read_weights import (
    CheckpointWeights,
    ExportWeights,
    fill_model,
    find_source,
    open_weights,
)
from meshwright.model.parts import build_model
from meshwright.parallel.checkpoint.describe import describe
from meshwright.parallel.checkpoint.folder import checkpoint_path
from meshwright.parallel.checkpoint.save import save_checkpoint
from meshwright.parallel.mesh import Mesh, Sizes
from meshwright.parallel.placement import placement_table

CONFIG = CONFIGS["qwen3_moe un-normalised, mixed, with biases"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return write_tiny_store(tmp_path_factory.mktemp("corpus") / "text")


def save_in_parts(mesh: Mesh, folder: Path) -> None:
    """Save a model of which each rank holds half of the experts, and of these a ZeRO part."""
    model = build_model(CONFIG, seed=1, mesh=mesh)
    table = placement_table(model)
    parts = {}
    for name, parameter in model.named_parameters():
        local, placement = parameter.detach(), table[name]
        chunks = local.chunk(placement.zero_axis(mesh).size)
        part = chunks[placement.zero_axis(mesh).rank] if placement.zero_axis(mesh).rank < len(chunks) else local[:0]
        parts[name] = describe(
            part.clone(), placement.global_shape(tuple(local.shape)), placement, mesh, zero_part=True
        )
    save_checkpoint(folder, 3, parts, {}, mesh, "tiny")


def test_a_checkpoint_in_parts_reads_as_the_whole(tmp_path: Path) -> None:
    run_mesh(Sizes(dp_shard=4, ep=2), save_in_parts, tmp_path)
    weights = CheckpointWeights(checkpoint_path(tmp_path, 3))
    expected = dict(build_model(CONFIG, seed=1).named_parameters())
    assert weights.shapes() == {name: tuple(parameter.shape) for name, parameter in expected.items()}
    for name, parameter in expected.items():
        assert torch.equal(weights.read(name), parameter), name
        assert torch.equal(weights.read(name, (1, 4)), parameter[1:4]), name  # across the parts of two ranks
    gate = "layers.1.feedforward.part.experts.gate"
    assert torch.equal(weights.read(gate, (2, 3)), expected[gate][2:3])
    assert weights.read(gate, (2, 2)).shape == (0, 20, 16)


@pytest.mark.parametrize("rows", [(-1, 2), (3, 2), (0, 5)])
def test_rows_outside_a_weight_are_refused(rows: tuple[int, int], tmp_path: Path) -> None:
    write_tiny_export(tmp_path, tiny_model(CONFIG), CONFIG)
    with pytest.raises(ValueError, match=r"are not within layers\.1\.feedforward\.part\.router\.weight \[4, 16\]"):
        ExportWeights(tmp_path).read("layers.1.feedforward.part.router.weight", rows)


def test_a_checkpoints_moments_and_buffers_are_no_weights(store: TokenStore, tmp_path: Path) -> None:
    weights = CheckpointWeights(write_tiny_run(tmp_path, CONFIG, store))
    assert weights.shapes().keys() == dict(tiny_model(CONFIG).named_parameters()).keys()


def test_a_changed_byte_is_found_before_anything_is_read(store: TokenStore, tmp_path: Path) -> None:
    path = write_tiny_run(tmp_path, CONFIG, store)
    content = bytearray((path / "rank_00000.bin").read_bytes())
    content[100] ^= 1
    (path / "rank_00000.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"rank_00000\.bin was changed"):
        CheckpointWeights(path)


def test_of_a_run_the_newest_checkpoint_that_verifies_is_taken(store: TokenStore, tmp_path: Path) -> None:
    older = write_tiny_run(tmp_path, CONFIG, store, step=3)
    newer = write_tiny_run(tmp_path, CONFIG, store, step=5)
    assert find_source(tmp_path).path == newer
    (newer / "rank_00000.bin").write_bytes(b"cut short")
    source = find_source(tmp_path)
    assert (source.path, source.run_folder, source.is_checkpoint) == (older, tmp_path, True)
    assert list(source.passed_over) == [newer]
    (older / "rank_00000.bin").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint that can be loaded(.|\n)*rank_00000\.bin is missing"):
        find_source(tmp_path)


def test_a_named_checkpoint_knows_its_run(store: TokenStore, tmp_path: Path) -> None:
    path = write_tiny_run(tmp_path, CONFIG, store)
    assert find_source(path).run_folder == tmp_path.resolve()


@pytest.mark.parametrize(
    ("name", "problem"),
    [("absent", "there is nothing"), ("", "neither a run, nor a checkpoint"), ("x" * 300, "cannot be looked at")],
)
def test_what_is_no_source_is_refused_with_what_would_be(name: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        open_weights(tmp_path / name)


def test_a_model_is_filled_from_either(store: TokenStore, tmp_path: Path) -> None:
    expected = tiny_model(CONFIG)
    write_tiny_export(tmp_path / "export", expected, CONFIG)
    for path in (write_tiny_run(tmp_path / "run", CONFIG, store), tmp_path / "export"):
        model = build_model(CONFIG, seed=9)
        fill_model(model, open_weights(path))
        for name, parameter in expected.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name


def test_another_model_is_not_filled(tmp_path: Path) -> None:
    write_tiny_export(tmp_path, tiny_model(CONFIG), CONFIG)
    with pytest.raises(ValueError, match=r"(?s)embedding\.weight is \[320, 16\], in the model \[384, 16\].*router"):
        fill_model(build_model(CONFIGS["qwen3"].model_copy(update={"vocab_size": 384})), ExportWeights(tmp_path))


def drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def add(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"extra": torch.ones(1)}, folder / "model.safetensors")


def folder_instead(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def pickle_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(17)}, folder / "model.safetensors")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def other_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))


def with_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def with_index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            with_config(num_hidden_layers=10**9),
            r"config\.json.*\n  num_hidden_layers = 1000000000: must be .* to 16384",
        ),
        (
            with_config(num_experts=2**24, num_local_experts=2**24),
            r"config\.json describes a model of more than 100,\d+ tensors, ",
        ),
        (
            with_config(num_experts=8),
            r"\n  num_local_experts = 4: is another name of num_experts = 8; leave one of them",
        ),
        (with_config(num_hidden_layers=3000), r"\n  and [0-9,]+ more$"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), r"config\.json.*\n.*nested too deep"),
        (with_config(x=json.loads("[" * 100 + "]" * 100)), r"config\.json.*\n.*nested too deep"),
        (with_index("{}"), r"index\.json.*\n  weight_map: must be an object"),
        (with_index('{"weight_map": [1, 2]}'), r"index\.json.*\n  weight_map: must be an object"),
        (
            with_index('{"weight_map": {"a": 3}}'),
            r'index\.json.*\n  weight_map: "a" is in the file 3: must be the name',
        ),
        (with_index('{"weight_map": {"a": "../b"}}'), r'weight_map: "a" is in the file "../b": must be the name'),
        (
            with_index(json.dumps({"weight_map": {"a": "x" * 300, "b": "\ud800", "c": "", "d": ".."}})),
            r'weight_map: "a" is in the file "x+\.\.\.: must be the name of a file in the same folder'
            r'\n  weight_map: "b" is in the file ".": must.*'
            r'\n  weight_map: "c" is in the file "": must.*\n  weight_map: "d" is in the file "\.\.": must',
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").mkdir(),
            r"index\.json: 1 problem.*\n  is a folder; an index in JSON, or none beside model\.safetensors, would fit",
        ),
        (folder_instead, r"model\.safetensors: 1 problem.*\n  is a folder; a safetensors file of this name would fit"),
        (drop, r"model\.norm\.weight \[16\] is missing"),
        (
            pickle_alone,
            r"is missing; pytorch_model\.bin cannot be read, save_pretrained of transformers writes safetens",
        ),
        (add, "extra has no place in the class"),
        (reshape, r"model\.norm\.weight is \[17\], config\.json says \[16\]"),
        (cut_short, r"model\.safetensors: 1 problem.*\n  is damaged"),
        (other_class, "model_type = 'gpt_neox': must be one of"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors: 1 problem.*\n  is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: 1 problem.*\n  is damaged: not JSON"),
    ],
)
def test_a_damaged_export_is_refused_by_name(damage: object, problem: str, tmp_path: Path) -> None:
    write_tiny_export(tmp_path, tiny_model(CONFIG), CONFIG)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=problem):
        ExportWeights(tmp_path)


def with_output(folder: Path, output: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": output}, path)


def test_an_output_that_a_tied_model_would_leave_unread_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_files, "COMPARED_BYTES", 1000)  # in many blocks, of which the last one alone differs
    config = CONFIGS["llama tied with biases"]
    write_tiny_export(tmp_path, tiny_model(config), config)
    output = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()
    with_output(tmp_path, output.clone())
    assert "output.weight" not in ExportWeights(tmp_path).shapes()
    output[-1, -1] += 1
    for other in (output, output[:-1].clone(), output.half()):
        with_output(tmp_path, other)
        rule = "lm_head.weight must be model.embed_tokens.weight once more, and is another matrix; false would fit"
        with pytest.raises(ConfigError, match=f"\n  tie_word_embeddings = true: {rule}$"):
            ExportWeights(tmp_path)


def test_a_class_that_is_tied_unless_told_otherwise_is_named(tmp_path: Path) -> None:
    write_tiny_export(tmp_path, tiny_model(CONFIGS["gemma"]), CONFIGS["gemma"])
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with_output(tmp_path, torch.ones(320, 16))
    with pytest.raises(ConfigError, match="tie_word_embeddings is not given, which GemmaForCausalLM takes as true: "):
        ExportWeights(tmp_path)


def in_two_files(folder: Path, first: set[str], second: set[str], weight_map: dict[str, str]) -> list[str]:
    """Spread the tensors over two files; return what is wrong with the index."""
    tensors = load_file(folder / "model.safetensors")
    for name, held in (("a.safetensors", first), ("b.safetensors", second)):
        save_file({key: tensors[key].clone() for key in held}, folder / name)
    with_index(json.dumps({"weight_map": weight_map}))(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json: ") as refused:
        ExportWeights(folder)
    return list(refused.value.problems)


def test_each_tensor_lies_where_the_index_says_and_nowhere_else(tmp_path: Path) -> None:
    write_tiny_export(tmp_path, tiny_model(CONFIGS["llama"]), CONFIGS["llama"])
    names = set(load_file(tmp_path / "model.safetensors"))
    norm, a, b = "model.norm.weight", "a.safetensors", "b.safetensors"
    right = dict.fromkeys(names, a) | {norm: b}
    wrong = {key: file for key, file in right.items() if key != "lm_head.weight"} | {norm: a, "ghost": b}
    assert in_two_files(tmp_path, names - {norm}, {norm}, wrong) == [
        f'weight_map: "{norm}" is in the file "{a}": must be there, and is not; "{b}" would fit',
        f'weight_map: "ghost" is in the file "{b}": must be there, and is not; an index without it would fit',
        f'weight_map: "lm_head.weight" of "{a}" is left out: must name each tensor of its files; "{a}" would fit',
    ]
    write_tiny_export(tmp_path, tiny_model(CONFIGS["llama"]), CONFIGS["llama"])
    assert in_two_files(tmp_path, names, {norm, "lm_head.weight"}, right) == [
        f'weight_map: "{norm}" is in the file "{b}": must be in one file, and is in "{a}" too;'
        f' "{a}" without it would fit',
        f'weight_map: "lm_head.weight" is in the file "{a}": must be in one file, and is in "{b}" too;'
        f' "{b}" without it would fit',
    ]


def test_a_file_of_all_tensors_beside_an_index_that_names_others_is_refused(tmp_path: Path) -> None:
    """As a model leaves it that was saved anew into its old folder; transformers reads the single file then."""
    write_tiny_export(tmp_path, tiny_model(CONFIG), CONFIG, max_shard_bytes=8000)
    ExportWeights(tmp_path)
    write_tiny_export(tmp_path, tiny_model(CONFIG), CONFIG)
    with pytest.raises(
        ConfigError, match=r"\n  model\.safetensors is there, and model\.safetensors\.index\.json names"
    ):
        ExportWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    ExportWeights(tmp_path)


def test_an_index_of_the_file_of_all_tensors_is_taken(tmp_path: Path) -> None:
    write_tiny_export(tmp_path, tiny_model(CONFIG), CONFIG)
    names = load_file(tmp_path / "model.safetensors")
    with_index(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))(tmp_path)
    ExportWeights(tmp_path)


def test_all_files_that_are_missing_are_told_at_once(tmp_path: Path) -> None:
    write_tiny_export(tmp_path, tiny_model(CONFIGS["llama"]), CONFIGS["llama"])
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (tmp_path / "a.safetensors").write_bytes(b"short")
    (tmp_path / "model.safetensors").unlink()
    with_index(json.dumps({"weight_map": weight_map}))(tmp_path)
    with pytest.raises(
        ConfigError, match=r"2 problems.*\n  a\.safetensors is damaged: .*\n  b\.safetensors is missing"
    ):
        ExportWeights(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_plain_floats_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    write_tiny_export(tmp_path, tiny_model(CONFIGS["llama"]), CONFIGS["llama"])
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    wrong = ["lm_head.weight", "model.norm.weight"]
    save_file(tensors | {name: tensors[name].to(dtype) for name in wrong}, path)
    with pytest.raises(ConfigError) as refused:
        ExportWeights(tmp_path)
    for name, line in zip(wrong, refused.value.problems, strict=True):
        assert line.startswith(f"{name} is of dtype ")
        assert line.endswith(": must be F64, F32, F16 or BF16; the weights as they were before quantising would fit")
    for fine in (torch.float64, torch.float16, torch.bfloat16):
        save_file({name: tensor.to(fine) for name, tensor in tensors.items()}, path)
        assert ExportWeights(tmp_path).read("final_norm.weight").dtype == fine


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_told_by_name_once_they_are_read(value: float, tmp_path: Path) -> None:
    write_tiny_export(tmp_path, tiny_model(CONFIGS["llama"]), CONFIGS["llama"])
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    wrong = ["lm_head.weight", "model.norm.weight"]
    for name in wrong:
        tensors[name].view(-1)[3] = value
    save_file(tensors, path)
    with pytest.raises(ConfigError) as refused:
        fill_model(build_model(CONFIGS["llama"]), ExportWeights(tmp_path))
    assert sorted(line.partition(": must be finite; ")[0] for line in refused.value.problems) == [
        f"{name} holds NaN or infinity" for name in wrong
    ]
