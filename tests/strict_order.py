"""What the ranks called, held against each other: one stream of calls for each group, as NCCL would run them.

    rank 0   all_reduce   send to 1            all_gather
    rank 1   all_reduce   receive from 0       all_gather        each rank has a head; heads that fit are done together

A collective is done when it is the head of every rank of its group. Sends and receives of one batch are one head; a
send is done with a receive in the other rank's head. When nothing more can be done and a rank has a head left, the
ranks wait for each other for ever. The lines come from tests/strict_group.py; this file knows no process group.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class _Head:
    """What one rank waits in: one collective, or the sends and receives of a batch."""

    def __init__(self, line: Line) -> None:
        self.lines = [line]
        self.is_collective = line["op"] == "all"
        self.to_come = line.get("to_come", 0)

    def takes(self, line: Line) -> bool:
        """Say whether a line belongs to the same batch."""
        return line["op"] != "all" and line["batch"] is not None and line["batch"] == self.lines[0].get("batch")

    @property
    def is_complete(self) -> bool:
        """Say whether all of a batch was written down; until then its rank waits for nobody."""
        return not self.to_come

    def first(self, op: str, peer: int) -> Line | None:
        """Return the first send to, or receive from, a peer."""
        return next((line for line in self.lines if line["op"] == op and line["peer"] == peer), None)

    def __str__(self) -> str:
        said = [line["what"] if self.is_collective else _direction(line) for line in self.lines]
        return f"{self.lines[0]['call']}, at {self.lines[0]['at']}: {' + '.join(said)}"


def read_lines(log: Path) -> list[Line]:
    """Return what a rank wrote so far; of a line that is being written, nothing."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def disagreements(logs: Sequence[Sequence[Line]], ended: set[int]) -> list[str]:
    """Return what the ranks did not do alike, one text for each group.

    `ended` are the ranks that write nothing more: a call that they lack will not come.
    """
    found = []
    names = {line["group"]: line["ranks"] for log in logs for line in log}
    for name, ranks in names.items():
        streams = {rank: _heads(line for line in logs[rank] if line["group"] == name) for rank in ranks}
        text = _follow(streams, ended)
        if text:
            found.append(f"group {name} over the ranks {ranks}: {text}")
    return found


def _heads(lines: Iterable[Line]) -> list[_Head]:
    """Return a rank's heads, the last one first."""
    heads: list[_Head] = []
    for line in lines:
        if heads and heads[-1].takes(line):
            heads[-1].lines.append(line)
            heads[-1].to_come = line.get("to_come", 0)
        else:
            heads.append(_Head(line))
    return heads[::-1]


def _follow(streams: dict[int, list[_Head]], ended: set[int]) -> str:
    """Do what can be done until nothing can; return the first difference, or nothing."""
    while True:
        heads = {rank: stream[-1] for rank, stream in streams.items() if stream}
        if not heads:
            return ""
        if len(heads) == len(streams) and all(head.is_collective for head in heads.values()):
            difference = _compare({rank: head.lines[0] for rank, head in heads.items()})
            done = bool(heads)
            for head in heads.values():
                head.lines.clear()
        else:
            difference, done = _exchange(heads)
        if difference:
            return difference
        for stream in streams.values():
            while stream and not stream[-1].lines:
                stream.pop()
        if not done:
            # A rank without a head, or with half a batch, may still come and mend it.
            waiting = {rank for rank, head in heads.items() if head.is_complete}
            return _stuck(heads, sorted(streams)) if {*waiting, *ended} >= streams.keys() else ""


def _compare(lines: dict[int, Line]) -> str:
    """Hold one collective of all ranks against each other."""
    first = min(lines)
    for rank, line in lines.items():
        if line["what"] != lines[first]["what"]:
            return _both(first, lines[first], rank, line)
    if lines[first]["rows"] is None:
        return ""
    ranks = sorted(lines, key=lines[first]["ranks"].index)
    for at, rank in enumerate(ranks):
        for other_at, other in enumerate(ranks):
            sent, expected = lines[rank]["rows"][0][other_at], lines[other]["rows"][1][at]
            if sent != expected:
                return _both(rank, lines[rank], other, lines[other], f"sends {sent} rows", f"expects {expected}")
    return ""


def _exchange(heads: dict[int, _Head]) -> tuple[str, bool]:
    """Do every send whose receive stands in a head too; return a difference, and whether any was done."""
    done = False
    for rank, head in heads.items():
        for line in [line for line in head.lines if line["op"] == "send"]:
            peer = heads.get(line["peer"])
            answer = peer.first("recv", rank) if peer is not None else None
            # In each direction first come, first served, whatever the tags: NCCL has none.
            if peer is None or answer is None or head.first("send", line["peer"]) is not line:
                continue
            if answer["what"] != line["what"]:
                return _both(rank, line, line["peer"], answer, _direction(line), _direction(answer)), True
            head.lines.remove(line)
            peer.lines.remove(answer)
            done = True
    return "", done


def _stuck(heads: dict[int, _Head], ranks: list[int]) -> str:
    said = [
        f"rank {rank} in {heads[rank]}" if rank in heads else f"rank {rank} makes no further call" for rank in ranks
    ]
    return "would wait for ever: " + "; ".join(said)


def _both(rank: int, line: Line, other: int, theirs: Line, does: str = "", expects: str = "") -> str:
    return (
        f"rank {rank}, {line['call']}, at {line['at']}: {does or line['what']};"
        f" rank {other}, {theirs['call']}, at {theirs['at']}: {expects or theirs['what']}"
    )


def _direction(line: Line) -> str:
    return f"{'send to' if line['op'] == 'send' else 'receive from'} {line['peer']} of {line['what']}"
