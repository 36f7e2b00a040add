"""A run that begins from the weights of another, or from an export: in every layout, and never from a wrong one."""

from pathlib import Path

import pytest
import torch
from rank_pool import run_mesh
from tiny_exports import ModelWeights
from tiny_run import EP2, build, numbers, start, start_on, tiny_store
from torch import Tensor

from meshwright.data.prepare import PrepareOptions, prepare
from meshwright.data.store import TokenStore
from meshwright.launcher.ranks.one_outcome import one_outcome
from meshwright.launcher.runfile.messages import ConfigError
from meshwright.launcher.training.branching import begin_from
from meshwright.launcher.weights.hf_writer import ExportSettings, write_hf_folder
from meshwright.model.parts import reset_buffers
from meshwright.parallel.checkpoint import durable, verify
from meshwright.parallel.checkpoint.durable import FileSeal
from meshwright.parallel.checkpoint.folder import read_manifest
from meshwright.parallel.mesh import Mesh, Sizes


def test_a_run_branches_from_the_weights_of_another(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "branch").mkdir()
    start(tmp_path / "first")
    loss = numbers(tmp_path / "first", "validation_loss", "evaluation")[-1]
    source = f'init.from="{tmp_path / "first" / "run"}"'
    # A learning rate of almost nothing: the branch's first evaluation is of the weights that it began from.
    start(tmp_path / "branch", source, "learning_rate.peak=1e-12", "train.steps=1", "evaluation.every=1")
    assert numbers(tmp_path / "branch", "validation_loss", "evaluation") == pytest.approx([loss], rel=1e-6)
    assert numbers(tmp_path / "branch", "step") == [1.0]
    run_mesh(
        EP2,
        start_on,
        tmp_path / "branch",
        ["parallel.ep=2", "run.folder=" + str(tmp_path / "b2"), source, "train.steps=1"],
    )
    assert (tmp_path / "b2" / "checkpoints" / "step_00000001").is_dir()


def hashed_on(mesh: Mesh, folder: Path, overrides: list[str]) -> list[str]:
    """Train on the ranks of a mesh; return the files that this rank hashed."""
    hashed: list[str] = []

    def counting(path: Path) -> FileSeal:
        hashed.append(path.name)
        return durable.hash_file(path)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verify, "hash_file", counting)
        start_on(mesh, folder, overrides)
    return hashed


@pytest.mark.parametrize("source", ["run", pytest.param("run/checkpoints/step_00000001", marks=pytest.mark.slow)])
def test_a_branch_reads_each_file_of_its_source_once_over_the_ranks(tmp_path: Path, source: str) -> None:
    (tmp_path / "first").mkdir()
    start(tmp_path / "first", "train.steps=1", "evaluation.every=0")
    files = read_manifest(tmp_path / "first" / "run" / "checkpoints" / "step_00000001").files
    overrides = [f"run.folder={tmp_path / 'branch'}", f'init.from="{tmp_path / "first" / source}"', "train.steps=1"]
    by_rank = run_mesh(EP2, hashed_on, tmp_path / "first", ["parallel.ep=2", *overrides])
    assert sorted(name for names in by_rank for name in names) == sorted(files)
    assert all(by_rank)


def test_a_branch_of_another_shape_is_refused_with_every_difference(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    start(tmp_path / "first", "train.steps=1", "evaluation.every=0")
    (tmp_path / "branch").mkdir()
    with pytest.raises(ConfigError, match=r"init.from = ") as refused:
        start(tmp_path / "branch", f'init.from="{tmp_path / "first" / "run"}"', "model.moe.expert_hidden_size=20")
    assert "experts.gate" in str(refused.value)
    assert "experts.down" in str(refused.value)


def test_weights_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    start(tmp_path / "first", "train.steps=1", "evaluation.every=0")
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"{number} other words, of which another tokenizer is made " * 12)
    out = tmp_path / "other"
    prepare(PrepareOptions(out, (str(texts / "*.txt"),), vocab_size=290, validation_fraction=0.3, workers=1))
    (tmp_path / "branch").mkdir()
    overrides = (f'init.from="{tmp_path / "first" / "run"}"', f'data.store="{out}"', "train.steps=1")
    with pytest.raises(ConfigError, match=r"gives tokens other numbers than that of data\.store"):
        start(tmp_path / "branch", *overrides, "evaluation.every=0")
    assert not (tmp_path / "branch" / "run" / "checkpoints").exists()


@pytest.mark.parametrize("load", ["weights", "weights+optimizer"])
def test_a_branch_may_balance_its_experts_by_another_rule(tmp_path: Path, load: str) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "branch").mkdir()
    start(tmp_path / "first", "train.steps=1", "evaluation.every=0", "model.moe.load_balancing=sequence")
    overrides = (f'init.from="{tmp_path / "first" / "run"}"', f'init.load="{load}"', "train.steps=1")
    run = start(tmp_path / "branch", *overrides, "evaluation.every=0", "model.moe.load_balancing=step")
    assert all(torch.isfinite(buffer).all() for buffer in run.buffers().values())
    assert len(run.buffers()) == 2


BY_BUFFERS = {
    "sigmoid": ["model.moe.router=sigmoid", "model.moe.bias_rate=0.3"],
    "expert_choice": ["model.moe.router=expert_choice", "model.moe.bias_rate=0.05"],
}


@pytest.mark.parametrize("how", ["init.load=weights", "init.load=weights+optimizer", "init.pool_kv_heads=true"])
@pytest.mark.parametrize("router", BY_BUFFERS)
def test_what_routers_choose_by_comes_with_the_weights(tmp_path: Path, router: str, how: str) -> None:
    for name in ("first", "branch"):
        (tmp_path / name).mkdir()
    start(tmp_path / "first", *BY_BUFFERS[router], "model.num_kv_heads=2", "train.steps=5", "evaluation.every=5")
    loss = numbers(tmp_path / "first", "validation_loss", "evaluation")[-1]
    begun_from = [f'init.from="{tmp_path / "first" / "run"}"', how, *BY_BUFFERS[router]]
    heads = ["model.num_kv_heads=1" if "pool" in how else "model.num_kv_heads=2"]
    nothing_moves = ["learning_rate.peak=1e-30", "train.steps=1", "evaluation.every=1", "model.moe.bias_rate=0"]
    run = start(tmp_path / "branch", *begun_from, *heads, *nothing_moves)
    begun = {name: buffer.clone() for name, buffer in run.buffers().items() if ".router." in name}
    reset_buffers(run.model)
    assert begun
    assert not any(torch.equal(buffer, begun[name]) for name, buffer in run.buffers().items() if name in begun)
    if "pool" not in how:  # with fewer heads it is another model
        assert numbers(tmp_path / "branch", "validation_loss", "evaluation") == pytest.approx([loss], rel=1e-6)


# No family has shared experts beside norms of heads; a vocabulary of 303 does not divide by tp.
EXPORTED = ["model.moe.num_shared_experts=0", "model.vocab_size=303", "model.num_layers=4"]


def write_export(folder: Path, *overrides: str) -> dict[str, Tensor]:
    """Export a new model of one process; return its weights."""
    run = build(folder, [*EXPORTED, *overrides])
    for parameter in run.model.parameters():
        torch.nn.init.normal_(parameter)  # also what begins as ones or zeros
    tokenizer = (TokenStore.open(tiny_store()).path / "tokenizer.json").read_text()
    out = folder / "export"
    out.mkdir()
    weights = ModelWeights(run.model)
    write_hf_folder(out, run.run_file.model, weights, ExportSettings(tokenizer, None, max_positions=32))
    return {name: weights.read(name).clone() for name in weights.shapes()}


def begun(mesh: Mesh, folder: Path, overrides: list[str]) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Return where each part of a run that begins from the export lies, and what it is."""
    run = build(folder, [*EXPORTED, *overrides], mesh)
    begin_from(run, folder / "export", [])
    parts = run.engine.parts.items()
    return {name: (part.offset, part.real(part.parameter).detach().clone()) for name, part in parts}


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        (Sizes(tp=2), ["parallel.tp=2"]),
        (Sizes(pp=2, dp_shard=2, etp=2), ["parallel.pp=2", "parallel.etp=2", "zero.stage=1"]),
        (Sizes(tp=2, dp_shard=2, ep=2), ["parallel.tp=2", "parallel.ep=2", "zero.stage=3"]),
        (Sizes(pp=2), ["parallel.pp=2", "model.tie_embeddings=true"]),
    ],
    ids=str,
)
def test_a_run_begins_from_an_export_in_every_layout(tmp_path: Path, sizes: Sizes, overrides: list[str]) -> None:
    whole = write_export(tmp_path, *(text for text in overrides if text.startswith("model.")))
    ranks, seen = run_mesh(sizes, begun, tmp_path, overrides), set[str]()
    for held in ranks:
        for name, (offset, part) in held.items():
            stretch = tuple(slice(begin, begin + size) for begin, size in zip(offset, part.shape, strict=True))
            assert torch.equal(part, whole[name][stretch]), name
            seen |= {name} if part.numel() else set()
    assert seen == whole.keys()


def refusal(mesh: Mesh, folder: Path, overrides: list[str]) -> str:
    """Return the words in which an export is refused."""
    run = build(folder, overrides, mesh)
    with pytest.raises(ConfigError) as refused:
        begin_from(run, folder / "export", [])
    return str(refused.value)


def test_the_stages_of_a_pipeline_refuse_an_export_in_the_same_words(tmp_path: Path) -> None:
    write_export(tmp_path)
    changed = [*EXPORTED, "parallel.pp=2", "model.moe.expert_hidden_size=20", "model.tie_embeddings=true"]
    first, last = run_mesh(Sizes(pp=2), refusal, tmp_path, changed)
    assert first == last
    assert first.count("experts.") == 3 * 4
    assert "output.weight has no place in the model" in first
    assert first.count("has no place") == 1


def test_an_export_with_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    write_export(tmp_path)
    path = tmp_path / "export" / "tokenizer.json"
    path.write_text('{"cut')
    with pytest.raises(ConfigError, match=f"{path} cannot be read as a tokenizer"):
        begin_from(build(tmp_path, EXPORTED), tmp_path / "export", [])


def with_a_bad_disk(mesh: Mesh) -> str:
    """Do what fails on rank 1 alone, by an error that is none of ours."""

    def read() -> None:
        if mesh.world.rank == 1:
            raise OSError(5, "Input/output error")

    with pytest.raises(ConfigError) as refused:
        one_outcome(mesh, "x", read)
    return str(refused.value)


def test_a_disk_that_fails_under_one_rank_is_heard_of_by_all() -> None:
    first, second = run_mesh(EP2, with_a_bad_disk)
    assert first == second
    assert "rank 1: OSError: [Errno 5] Input/output error" in first


def refused_on_rank_1(mesh: Mesh, folder: Path, source: str, overrides: list[str]) -> str:
    """Begin from a source that rank 1 does not see, as on a node without the mount; return the words."""
    run = build(folder, overrides, mesh)
    here = folder / source
    if mesh.world.rank == 1:
        bare = folder / "bare"
        bare.mkdir()
        for name in ("config.json", "tokenizer.json") if source == "export" else ():
            (bare / name).write_bytes((here / name).read_bytes())
        here = bare
    with pytest.raises(ConfigError) as refused:
        begin_from(run, here, [])
    assert refused.value.is_same_on_all_ranks
    return "\n".join(refused.value.problems)


@pytest.mark.parametrize(("source", "why"), [("run", "neither a run"), ("export", "model.safetensors: is missing")])
def test_what_one_rank_alone_finds_ends_all_and_names_it(tmp_path: Path, source: str, why: str) -> None:
    if source == "run":
        start(tmp_path, "train.steps=1", "evaluation.every=0")
    else:
        write_export(tmp_path)
    first, second = run_mesh(EP2, refused_on_rank_1, tmp_path, source, ["parallel.ep=2", *EXPORTED])
    assert first == second
    assert first.startswith(f"rank 1: {tmp_path / 'bare'}")
    assert why in first
