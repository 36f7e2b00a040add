"""Faults to plant: what a checkpoint holds is not what the ranks hold."""

from mutations.fault import MOE, Fault

CHECKPOINT = [
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
        "moments twice as large in a checkpoint",
        "launcher/training/saving.py",
        "tensors, state = held_tensors(self.run), state_of(self.run, progress)",
        "tensors, state = {n: type(t)(t.tensor * 2, t.global_shape, t.offset) if n.startswith('optimizer') else t "
        "for n, t in held_tensors(self.run).items()}, state_of(self.run, progress)",
        named="checkpoint of optimizer.exp_avg.",
        is_alone=True,
        layout={"dp_shard": 2},
        passes=("checkpoint",),
    ),
    Fault(
        "moments left out of what is saved and loaded",
        "launcher/training/progress.py",
        "for moment, held in run.optimizer.moments(name).items() if optimizer else ():",
        "for moment, held in ():",
        named="checkpoint of optimizer.exp_avg.embedding.weight: is not in it",
        is_alone=True,
        layout={"dp_shard": 2},
        passes=("checkpoint",),
    ),
    Fault(
        "buffers left out of what is saved and loaded",
        "launcher/training/progress.py",
        "for name, buffer in run.buffers().items():",
        "for name, buffer in ():",
        named="previous_share: is not in it",
        is_alone=True,
        model=MOE | {"moe": MOE["moe"] | {"load_balancing": "step"}},
        layout={"dp_shard": 2},
        passes=("checkpoint",),
    ),
    Fault(
        "S5: a bit of a checkpoint changes on its way to the disk",
        "parallel/checkpoint/durable.py",
        "written = os.write(self._fd, piece)",
        "written = os.write(self._fd, bytes([piece[0] ^ 1]) + bytes(piece[1:]))",
        named="is damaged",
        is_alone=True,
        layout={"dp_shard": 2},
        passes=("checkpoint",),
    ),
]
