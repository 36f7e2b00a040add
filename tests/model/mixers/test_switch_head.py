"""SwitchHead against a loop over heads and experts; on meshes as on one process; by steps as all at once."""

import pickle
from copy import deepcopy

import pytest
import torch
from mixer_parity import assert_steps_are_the_whole, built, errors_on, too_far, where_of
from rank_pool import run_mesh
from torch import Tensor

from meshwright.kernels.attention.rope import apply_rope
from meshwright.model.mixers.attention import Look, Spread
from meshwright.model.mixers.switch_head import SwitchHead, SwitchSizes
from meshwright.model.positions import T5, Rope
from meshwright.model.routing_record import replay_routing
from meshwright.parallel.initialise import InitPolicy
from meshwright.parallel.mesh import Mesh, Sizes, single_process_mesh

S, B, H, N, D, E, K = 24, 2, 12, 4, 6, 3, 2
SIZES = SwitchSizes(N, D, E, K)
F64 = torch.float64
DOCUMENT = (torch.arange(S)[:, None] >= torch.tensor([5, 17])).long()
ROPE = Rope(50.0)
LOOKS = {"rope": Look(ROPE), "t5, window": Look(T5(8, 10), window=5)}


def make(mesh: Mesh, look: str = "rope", way: str = "ring") -> SwitchHead:
    spread = Spread(tp=mesh.tp, cp=mesh.cp, context=way)
    return SwitchHead(H, SIZES, look=LOOKS[look], init=InitPolicy("normal", std=0.5), spread=spread)


def x_of(s: int = S) -> Tensor:
    return torch.randn(s, B, H, dtype=F64, generator=torch.Generator().manual_seed(1))


def by_loop(part: SwitchHead, x: Tensor) -> Tensor:
    s = len(x)
    cos, sin = ROPE.angles(torch.arange(s), D, F64)
    y = torch.zeros_like(x)
    for b in range(B):
        for h in range(N):
            q, k = (
                apply_rope((x[:, b] @ column.weight[h * D : (h + 1) * D].T)[:, None, None], cos, sin)[:, 0, 0]
                for column in (part.q, part.k)
            )
            source, destination = (
                (x[:, b] @ gates[h * E : (h + 1) * E].T).sigmoid() for gates in (part.source, part.destination)
            )
            value = torch.zeros(s, D, dtype=F64)
            for e in range(E):
                chosen = (source.argsort(1, descending=True)[:, :K] == e).any(1, keepdim=True)
                value = value + chosen * source[:, e : e + 1] * (x[:, b] @ part.v[h * E + e].T)
            scores = (q @ k.T * D**-0.5).masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
            mixed = scores.softmax(1) @ value
            for e in range(E):
                chosen = (destination.argsort(1, descending=True)[:, :K] == e).any(1, keepdim=True)
                y[:, b] = y[:, b] + chosen * destination[:, e : e + 1] * (mixed @ part.output[h * E + e].T)
    return y


def test_switch_head_is_a_loop_over_heads_and_experts() -> None:
    part, x = built(make), x_of(9).requires_grad_()
    where = where_of(torch.zeros(9, B, dtype=torch.int64), single_process_mesh(), by_document=False)
    y, expected = part(x, where, None), by_loop(part, x)
    torch.testing.assert_close(y, expected)
    of, above = [x, *part.parameters()], torch.randn_like(y)
    pairs = zip(torch.autograd.grad(y, of, above), torch.autograd.grad(expected, of, above), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)


def case(mesh: Mesh, way: str) -> dict[str, float]:
    found = {}
    for look in LOOKS:
        errors = errors_on(mesh, lambda on, look=look: make(on, look, way), x_of(), DOCUMENT, True, True)
        found |= {f"{look}, {name}": error for name, error in errors.items()}
    return found


@pytest.mark.parametrize(
    ("sizes", "way"),
    [
        (Sizes(cp=2), "ulysses"),
        pytest.param(Sizes(tp=2, cp=2), "ring", marks=pytest.mark.slow),
    ],
)
def test_switch_head_on_a_mesh_is_that_of_one_process(sizes: Sizes, way: str) -> None:
    assert too_far(run_mesh(sizes, case, way)) == {}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("cuts", [[3, 1, 12, 1, 1, 6], [S]])
def test_steps_are_the_full_pass_and_record_its_choices(look: str, cuts: list[int]) -> None:
    part, x = built(lambda mesh: make(mesh, look)), x_of()
    state = assert_steps_are_the_whole(part, x, cuts)
    assert state.cache.keys.shape == (LOOKS[look].window or S, B, N, D)
    one_document = torch.zeros(S, B, dtype=torch.int64)
    where = where_of(one_document, single_process_mesh(), by_document=False).remembering()
    part(x, where, None)
    for what in ("source", "destination"):
        experts, gates = getattr(state, what).read()
        chosen = where.decisions[f"switch_head/{id(part)}/{what}"]
        assert torch.equal(experts.long(), chosen)
        each = (x @ getattr(part, what).T).unflatten(2, (N, E)).sigmoid()
        torch.testing.assert_close(gates, each.gather(3, chosen))


@pytest.mark.parametrize("look", LOOKS)
def test_a_state_its_copy_and_its_pickle_go_on_alike_and_are_replayed_alike(look: str) -> None:
    part, x = built(lambda mesh: make(mesh, look)).eval(), x_of()
    with torch.no_grad():
        state = part.initial_state(B)
        first = part.step(x[:9], state)
        copies = [deepcopy(state), pickle.loads(pickle.dumps(state))]
        whole = torch.cat([first, part.step(x[9:], state)])
        for copied in copies:
            assert torch.equal(part.step(x[9:], copied), whole[9:])
        for moved in (part.source, part.destination):
            moved.neg_()
            assert (part.step(x, part.initial_state(B)) - whole).abs().max() > 0.1
            for recorded in (state, *copies):
                again = replay_routing(part.initial_state(B, S), recorded)
                torch.testing.assert_close(torch.cat([part.step(piece, again) for piece in x.split([3, 20, 1])]), whole)


def test_a_recomputed_pass_chooses_nothing_again() -> None:
    part, x = built(make), x_of()
    where = where_of(DOCUMENT, single_process_mesh(), by_document=False).remembering()
    y = part(x, where, None)
    with torch.no_grad():
        part.source.neg_()  # would choose others
        kept = part._chosen(x, part.source, where).expert
        part.source.neg_()
    assert torch.equal(part(x, where, None), y)
    assert torch.equal(kept, part._chosen(x, part.source).expert)


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="top_k = 4 must be from 1 to num_experts = 3"):
        SwitchHead(H, SwitchSizes(N, D, 3, 4))
