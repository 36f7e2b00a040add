"""Faults to plant, as data: one line of product source and what it becomes, and what `prove` must say of it.

The classes are those of bugs that other systems had, each on the smallest layout that shows it. `named` must stand in
the first difference; `axis` among the axes that are blamed. What is compared, and which line is broken, was written
down before `prove` read that quantity.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

DENSE = {
    "pattern": "*-", "num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 64,
    "ffn_hidden_size": 128, "bias": ["q", "k", "v", "output", "ffn"], "qk_norm": True,
}  # fmt: skip
MOE = DENSE | {
    "pattern": "*E",
    "tie_embeddings": True,
    "moe": {"num_experts": 8, "top_k": 2, "expert_hidden_size": 64, "num_shared_experts": 1},
}
TP, EP = {"tp": 2, "dp_shard": 1}, {"dp_shard": 2, "ep": 2}


@dataclass(frozen=True)
class Fault:
    """One line that is changed."""

    name: str
    file: str
    old: str
    new: str
    named: str = ""
    """"" where the change changes nothing, and the proof must pass."""
    axis: str = ""
    model: dict[str, Any] = field(default_factory=lambda: DENSE)
    layout: dict[str, int] = field(default_factory=lambda: TP)
    zero: int = 1
    train: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    mask_documents: bool = False
    passes: tuple[str, ...] = ("exact",)

    def request(self) -> dict[str, Any]:
        """Return the fault as plain values."""
        return asdict(self)


FAULTS = [
    Fault(
        "router gradient not summed under sequence parallelism",
        "model/routers/topk.py",
        'return {"weight": Placement(grad_sum=partial_over(self.tp))}',
        'return {"weight": Placement()}',
        named="feedforward.part.router.weight",
        axis="tp",
        model=MOE,
    ),
    Fault(
        "norm gradient not summed under sequence parallelism",
        "model/norms.py",
        'return {"weight": Placement(grad_sum=partial_over(self.tp))}',
        'return {"weight": Placement()}',
        named="gradient of final_norm.weight",
        axis="tp",
    ),
    Fault(
        "norms of queries and keys summed over the wrong ranks",
        "model/mixers/attention.py",
        "self.q_norm = RMSNorm(head_dim, qk_norm_eps, tp=tp) if",
        "self.q_norm = RMSNorm(head_dim, qk_norm_eps) if",
        named="mixer.part.q_norm.weight",
        axis="tp",
    ),
    Fault(
        "expert gradients summed over ranks with other experts",
        "parallel/placement.py",
        "return (mesh.edp,)",
        "return (mesh.ep, mesh.edp)",
        named="gradient of layers.1.feedforward.part.experts.",
        axis="ep",
        model=MOE,
        layout=EP,
    ),
    Fault(
        "expert gradients counted once for each rank that shares the experts",
        "model/feedforward/moe.py",
        'table["down_bias"] = Placement((of_experts,), grad_sum=partial_over(self.etp), factorisation="expert")',
        'table["down_bias"] = Placement((of_experts,), factorisation="expert")',
        named="experts.down_bias",
        axis="etp",
        model=MOE,
        layout={"dp_shard": 2, "etp": 2},
    ),
    Fault(
        "norm that clips leaves the other ranks' experts out",
        "parallel/grad_norm.py",
        "for axis in axes:",
        "for axis in axes[1:]:",
        named="norm",
        axis="ep",
        model=MOE,
        layout=EP,
        zero=0,
    ),
    Fault(
        "norm that clips counts copies of KV heads twice",
        "parallel/grad_norm.py",
        "total += square.item() / copies",
        "total += square.item()",
        named="norm",
        axis="tp",
        model=DENSE | {"num_kv_heads": 1},
    ),
    Fault(
        "loss averaged by rank instead of by token",
        "launcher/training/one_step.py",
        "all_reduce(count, run.mesh.dp)",
        "count *= run.mesh.dp.size",
        named="loss",
        axis="dp_shard",
        layout={"dp_shard": 2},
    ),
    Fault(
        "gradients averaged over the ranks by FSDP2",
        "parallel/zero/fsdp.py",
        "unit.set_gradient_divide_factor(1.0)",
        "unit.set_gradient_divide_factor(2.0)",
        named="gradient of output.weight",
        axis="ZeRO-3",
        layout={"dp_shard": 2},
        zero=3,
    ),
    Fault(
        "copies of the sharded state not summed",
        "parallel/zero/buckets.py",
        "for axis in self.axes[:-1]:",
        "for axis in self.axes[:0]:",
        named="gradient of output.weight",
        axis="dp_replicate",
        layout={"dp_replicate": 2, "dp_shard": 2},
    ),
    Fault(
        "a KV head assigned to the wrong rank",
        "parallel/placement.py",
        "return self.axis.rank // self.copies",
        "return self.axis.rank % self.parts",
        named="layers.0.mixer",
        axis="tp",
        layout={"tp": 4, "dp_shard": 1},
    ),
    Fault(
        "gradients of the copies of a KV head not summed",
        "parallel/linear.py",
        "Placement((self.split,), grad_sum=partial_over(self.copies))",
        "Placement((self.split,))",
        named="mixer.part.v.bias",
        axis="tp",
        model=DENSE | {"num_kv_heads": 1},
    ),
    Fault(
        "a bias added once for each rank",
        "parallel/linear.py",
        "y = scatter_sum(linear(x, self.weight), self.tp)",
        "return scatter_sum(linear(x, self.weight, self.bias), self.tp)",
        named="feedforward.part.down.bias",
        axis="tp",
    ),
    Fault(
        "fan-in taken from the local part",
        "model/mixers/attention.py",
        "to_residual = init.matrix(width, hidden_size, to_residual=True)",
        "to_residual = init.matrix(width // tp.size, hidden_size, to_residual=True)",
        named="layers.0.mixer",
        axis="tp",
        model=DENSE | {"init": "scaled"},
    ),
    Fault(
        "S1: every rank draws the same initial weights",
        "parallel/apply.py",
        "offset=part.offset",
        "offset=(0,) * len(part.offset)",
        named="output of embedding",
        axis="dp_shard",
        layout={"dp_shard": 2},
    ),
    Fault(
        "padding of the vocabulary takes part in the softmax",
        "parallel/vocabulary.py",
        "logits[:, own.real :] = -torch.inf",
        "logits[:, own.real :] = 0.0",
        named="loss",
        axis="tp",
        model=DENSE | {"vocab_size": 97},
    ),
    Fault(
        "each rank counts the experts' load of its own tokens",
        "model/feedforward/moe.py",
        "all_reduce(whole, self.token)",
        "whole.mul_(1)",
        named="sum of layers.0.balance",
        axis="tp",
        model=MOE,
    ),
    Fault(
        "every rank reads the first rank's samples",
        "data/batches.py",
        "first = position + self.rank * part",
        "first = position",
        named="tokens",
        axis="dp_shard",
        layout={"dp_shard": 2},
    ),
    Fault(
        "updated parts are not brought to the other ranks",
        "parallel/zero/buckets.py",
        "all_gather(rows.view(-1), row, bucket.axes[-1]).wait()",
        "rows[bucket.axes[-1].rank] = row",
        named="output of embedding",
        axis="dp_shard",
        layout={"dp_shard": 2},
    ),
    Fault(
        "S4: a checkpoint that takes every rank's part for the first",
        "launcher/training/progress.py",
        "tensors[name] = HeldPart(part.real(part.parameter.detach()), part.global_shape, part.offset)",
        "tensors[name] = HeldPart(part.real(part.parameter.detach()), part.global_shape, (0,) * len(part.offset))",
        named="of embedding.weight",
        axis="dp_shard",
        layout={"dp_shard": 2},
        passes=("exact", "checkpoint"),
    ),
    Fault(
        "moments of the first rank for every rank in a checkpoint",
        "launcher/training/saving.py",
        "tensors, state = held_tensors(self.run), state_of(self.run, progress)",
        "tensors, state = {n: type(t)(t.tensor * 2, t.global_shape, t.offset) if n.startswith('optimizer') else t "
        "for n, t in held_tensors(self.run).items()}, state_of(self.run, progress)",
        named="checkpoint of optimizer.exp_avg.",
        layout={"dp_shard": 2},
        passes=("checkpoint",),
    ),
    Fault(
        "rows come back to the wrong tokens",
        "parallel/experts.py",
        "return scatter_sum(whole, etp)[: shared.own].clone()",
        "return scatter_sum(whole, etp)[-shared.own :].clone()",
        named="layers.0.feedforward",
        axis="etp",
        model=MOE,
        layout={"dp_shard": 4, "ep": 2, "etp": 2},
    ),
    Fault(
        "jitter drawn by the rank's own count of tokens",
        "parallel/dropout.py",
        "position = where.position if position is None else position",
        "position = torch.arange(len(where.position)) if position is None else position",
        named="layers.0.feedforward.part.router",
        axis="tp",
        model=MOE | {"moe": MOE["moe"] | {"router_jitter": 0.3}},
    ),
    Fault(
        "capacity of the rank's tokens instead of the sequence's",
        "model/routers/capacity.py",
        "capacity = capacity_of(where.sequence_tokens, factor, top_k, num_experts)",
        "capacity = capacity_of(where.counted.sum(0), factor, top_k, num_experts)",
        named="layers.0.feedforward",
        axis="tp",
        model=MOE | {"moe": MOE["moe"] | {"capacity_factor": 1.0}},
    ),
    Fault(
        "a tied embedding counted at both ends of the pipeline",
        "parallel/grad_norm.py",
        'if any(axis.name == "ends" and axis.rank > 0 for axis in part.placement.grad_sum):',
        "if False:",
        named="norm",
        axis="pp",
        model=DENSE | {"tie_embeddings": True},
        layout={"pp": 2, "dp_shard": 1},
    ),
    Fault(
        "the two ends' gradients of a tied embedding not summed",
        "parallel/vocabulary.py",
        "if self.tp.is_split else (), grad_sum=self.copies)}",
        "if self.tp.is_split else ())}",
        named="gradient of embedding.weight",
        axis="pp",
        model=DENSE | {"tie_embeddings": True},
        layout={"pp": 2, "dp_shard": 1},
    ),
    Fault(
        "gradients divided by the number of micro-batches",
        "parallel/pipeline/adapter.py",
        "scale_grads=False",
        "scale_grads=True",
        named="gradient of output.weight",
        axis="pp",
        model=DENSE | {"num_layers": 4},
        layout={"pp": 2, "dp_shard": 1},
        tables={"pipeline": {"schedule": "zbv"}},
    ),
    Fault(
        "norm of one stage taken for the norm",
        "parallel/grad_norm.py",
        "all_reduce(of_stages, pp)",
        "of_stages.mul_(1.0)",
        named="norm",
        axis="pp",
        layout={"pp": 2, "dp_shard": 1},
    ),
    Fault(
        "S8: gradients taken by hooks under a schedule that splits the backward",
        "parallel/zero/engine.py",
        'take_at_end=schedule == "split backward"',
        "take_at_end=False",
        named="got no gradient in this step",
        axis="pp",
        model=DENSE | {"num_layers": 4},
        layout={"pp": 2, "dp_shard": 1},
        tables={"pipeline": {"schedule": "zbv"}},
    ),
    Fault(
        "S6: the loss is summed in bf16",
        "parallel/vocabulary.py",
        "losses = torch.zeros(x.shape[0], dtype=wide, device=x.device)",
        "losses = torch.zeros(x.shape[0], dtype=torch.bfloat16, device=x.device)",
        named="loss",
        axis="tp",
        train={"precision": "bf16"},
        passes=("own",),
    ),
    Fault(
        "S5: a bit of a checkpoint changes on its way to the disk",
        "parallel/checkpoint/durable.py",
        "written = os.write(self._fd, piece)",
        "written = os.write(self._fd, bytes([piece[0] ^ 1]) + bytes(piece[1:]))",
        named="is damaged",
        layout={"dp_shard": 2},
        passes=("checkpoint",),
    ),
    Fault(
        "S9: a row that sees nothing takes part in the merge of the ring",
        "kernels/flash.py",
        "lse[rows] = some_lse.permute(2, 0, 1).masked_fill(_blind(seen), -torch.inf)",
        "lse[rows] = some_lse.permute(2, 0, 1)",
        named="output of layers.0.mixer",
        axis="cp",
        layout={"cp": 2, "dp_shard": 1},
        mask_documents=True,
    ),
    Fault(
        "chunks dealt out in another order than the ring lets them meet",
        "parallel/context/order.py",
        "return rank, 2 * cp - 1 - rank",
        "return rank, rank + cp",
        named="output of layers.0.mixer",
        axis="cp",
        layout={"cp": 2, "dp_shard": 1},
    ),
    Fault(
        "gradients of keys and values left one rank short of home",
        "parallel/context/ring.py",
        "of_k, of_v = behind.wait().to(k.dtype).unbind()",
        "of_k, of_v = (behind.wait() * 0 + of_block).to(k.dtype).unbind()",
        named="gradient of layers.1.mixer.part.",
        axis="cp",
        layout={"cp": 4, "dp_shard": 1},
    ),
    Fault(
        "counted tokens of the samples summed once for each rank that shares them",
        "launcher/training/one_step.py",
        "all_reduce(count, run.mesh.dp)",
        "all_reduce(count, run.mesh.data)",
        named="loss",
        axis="cp",
        layout={"cp": 2, "dp_shard": 1},
    ),
    Fault(
        "what is gathered is rounded to fp32",
        "parallel/collectives.py",
        "_all_gather_flat(out, x.contiguous(), group=axis.group)",
        "_all_gather_flat(out, x.to(torch.float32).to(x.dtype).contiguous(), group=axis.group)",
        named="output of layers.0.mixer",
        axis="tp",
    ),
    Fault(
        "the grouped product is never taken",
        "kernels/grouped.py",
        "if x.shape[0] == 0 or x.dtype == torch.float64 or x.dtype != weight.dtype:",
        "if x.shape[0] >= 0:",
        named="aten::_grouped_mm",
        model=MOE,
        layout=EP,
        passes=("fast",),
    ),
]

HARMLESS = [
    Fault(
        "S7: rows beyond the last expert's are not zeroed, and nobody reads them",
        "parallel/experts.py",
        "return x.new_zeros((size, *x.shape[1:])).index_copy_(0, place, x)",
        "return x.new_full((size, *x.shape[1:]), 0.5).index_copy_(0, place, x)",
        model=MOE,
        layout={"dp_shard": 4, "ep": 2, "etp": 2},
    ),
    Fault(
        "experts' rows padded with ones, which nobody takes",
        "parallel/experts.py",
        "torch.nn.functional.pad(rows, (0, 0, 0, padded - own))",
        "torch.nn.functional.pad(rows, (0, 0, 0, padded - own), value=1.0)",
        model=MOE,
        layout={"dp_shard": 2, "etp": 2},
    ),
    Fault(
        "smaller buckets",
        "parallel/zero/buckets.py",
        "_BUCKET_BYTES = 32 << 20",
        "_BUCKET_BYTES = 1 << 10",
        layout={"dp_shard": 2},
    ),
    Fault(
        "the sum of squares in pieces of another size",
        "parallel/grad_norm.py",
        "_PIECE = 1 << 14",
        "_PIECE = 1 << 5",
    ),
]
