"""The collectives of a compiled program, from its text: kind, size, group, how often."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4}
_BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) (?:\(.*)?.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERATION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # of devices: an array of them, and a transposition
_IOTA = re.compile(rf"replica_groups=\[\d+,(\d+)\]<={_ORDER}")
_MESH = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_ORDER}\))? ?\{{([^}}]*)\}}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"channel_id=(\d+)")
# What compilers for TPUs call a fusion that sums over devices and leaves each its slice of the sum.
_SCATTERING = "all-reduce-scatter"
_BEGUN = 'custom_call_target="AsyncCollectiveStart"'
_ELEMENT = re.compile(r"[su]32\[\]\S* get-tuple-element\(.*\), index=(\d+)")
_TUPLE = re.compile(r" tuple\((.*?)\)(?:,|$)")
_NAME = re.compile(r"%([\w.-]+)")
_ASSIGNED = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (.*)$")
_ADDED = re.compile(r"^[su]32\[\]\S* add\(%([\w.-]+), %([\w.-]+)\)")
_LIMIT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")


@dataclass(frozen=True)
class Collective:
    """A collective that every device takes part in, as often as a loop runs it.

    Attributes:
        kind: one of `KINDS`.
        size: bytes of its result on one device; of a reduce-scatter, of its argument.
        group: devices that exchange with each other.
        times: how often one step of the program runs it.
        groups: the devices of the first group, by number.
    """

    kind: str
    size: int
    group: int
    times: int
    groups: tuple[int, ...] = ()

    @property
    def moved(self) -> float:
        """Bytes that a device sends in one step, by the ring algorithm."""
        share = (self.group - 1) / self.group if self.group > 1 else 0.0
        once = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return once * self.size * self.times


def collectives(text: str, devices: int) -> list[Collective]:
    """Returns the collectives of an optimised HLO module's text.

    A loop's length is read from the constant that its counter is compared with.

    Args:
        text: `compiled.as_text()`.
        devices: that the program runs on.
    """
    bodies = _named_once(dict(_computations(text)))
    entry = next((name for name, (is_entry, _) in bodies.items() if is_entry), None)
    return [] if entry is None else list(_walk(bodies, entry, 1, devices))


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    name, is_entry, lines = "", False, []
    for line in text.splitlines():
        if not line.startswith((" ", "}")) and line.endswith("{") and (head := _HEAD.match(line)):
            name, is_entry, lines = head.group(1), line.startswith("ENTRY"), []
        elif line == "}" and name:  # the metadata of a kernel may begin a line with more of them
            yield name, (is_entry, lines)
            name = ""
        elif name:
            lines.append(line)


def _named_once(bodies: dict) -> dict:
    """Returns the computations without the repetitions of collectives that run beside other work.

    Those are named in the fusion that begins them, in every one that runs meanwhile, loops
    included, and in the one that ends them.
    """
    begin = {name for name, (_, lines) in bodies.items() if any(_BEGUN in line for line in lines)}
    channels = {
        _channel(line) for name in begin for line in bodies[name][1] if _OPERATION.match(line)
    }

    def repeated(name: str, line: str) -> bool:
        return name not in begin and bool(_OPERATION.match(line)) and _channel(line) in channels

    return {
        name: (is_entry, [line for line in lines if not repeated(name, line)])
        for name, (is_entry, lines) in bodies.items()
    }


def _channel(line: str) -> str | None:
    found = _CHANNEL.search(line)
    return None if found is None else found.group(1)


def _walk(bodies: dict, name: str, times: int, devices: int) -> Iterator[Collective]:
    for line in bodies.get(name, (False, []))[1]:
        if (found := _OPERATION.match(line)) is not None:
            yield _collective(found, line, times, devices, name.startswith(_SCATTERING))
        elif (loop := _WHILE.search(line)) is not None:
            condition, body = loop.groups()
            yield from _walk(bodies, body, times * _trips(bodies, line, condition, body), devices)
            continue
        called = _CALLED.findall(line)
        if (branches := _BRANCHES.search(line)) is not None:
            called += [each.strip().lstrip("%") for each in branches.group(1).split(",")]
        for each in called:
            yield from _walk(bodies, each, times, devices)


def _trips(bodies: dict, line: str, condition: str, body: str) -> int:
    if (told := _TRIPS.search(line)) is not None:
        return int(told.group(1))
    tested = bodies.get(condition, (False, []))[1]
    limit = max((int(n) for each in tested for n in _LIMIT.findall(each)), default=1)
    return -(-limit // _stride(tested, bodies.get(body, (False, []))[1]))


def _stride(tested: Sequence[str], lines: Sequence[str]) -> int:
    """Returns what a loop adds to its counter in each turn; 1 where the text does not say it."""
    places = [found[1] for each in tested if (found := _ELEMENT.search(each)) is not None]
    result = next((each for each in lines if each.lstrip().startswith("ROOT ")), "")
    if len(places) != 1 or (parts := _TUPLE.search(result)) is None:
        return 1
    values = {found[1]: found[2] for each in lines if (found := _ASSIGNED.match(each)) is not None}
    names = _NAME.findall(parts[1])
    added = _ADDED.search(values.get(names[int(places[0])], ""))
    constants = (values.get(name, "") for name in (added.groups() if added else ()))
    return next((int(found[1]) for each in constants if (found := _LIMIT.search(each))), 1)


def _collective(
    found: re.Match, line: str, times: int, devices: int, scattering: bool
) -> Collective:
    shapes, kind, started = found.groups()
    sizes = [_size(*each) for each in _ARRAY.findall(shapes) if each[0] in _BYTES]
    if started and kind in ("all-gather", "collective-permute"):
        # (arguments, results, and for permutes two counters)
        sizes = sizes[1:2] if kind == "collective-permute" else sizes[len(sizes) // 2 :]
    members = _group(line, devices)
    group = len(members)
    size = sum(sizes) * (group if kind == "reduce-scatter" else 1)
    kind = "reduce-scatter" if scattering and kind == "all-reduce" else kind
    return Collective(kind, size, group, times, members)


def _size(dtype: str, shape: str) -> int:
    count = 1
    for side in shape.split(","):
        count *= int(side) if side else 1
    return count * _BYTES[dtype]


def _group(line: str, devices: int) -> tuple[int, ...]:
    """Returns the first group's devices, however groups are written."""
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:
        return tuple(map(int, listed.group(1).split(",")))
    if re.search(r"replica_groups=\{\}", line) is not None:
        return tuple(range(devices))
    if (pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)) is not None:
        return tuple(map(int, pairs.groups()))
    if (iota := _IOTA.search(line)) is not None:
        count, dims, order = iota.groups()
        return tuple(_numbered(dims, order)[: int(count)].tolist())
    if (mesh := _MESH.search(line)) is not None:
        axes, dims, order, groups = mesh.groups()
        sizes = {axis: int(n) for axis, n in re.findall(r"'?(\w+)'?=(\d+)", axes)}
        within = re.findall(r"'?(\w+)'?", groups)
        first = tuple(slice(None) if axis in within else 0 for axis in sizes)
        ids = _numbered(dims or str(math.prod(sizes.values())), order)
        return tuple(ids.reshape(list(sizes.values()))[first].reshape(-1).tolist())
    if "replica_groups=" in line:
        raise ValueError(f"a collective's groups are written in an unknown way: {line.strip()}")
    return tuple(range(devices))


def _numbered(dims: str, order: str | None) -> np.ndarray:
    """Returns all devices in the order in which an array of them is read after a transposition."""
    sizes = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)


def by_kind(found: Sequence[Collective]) -> dict[str, tuple[int, float]]:
    """Returns for each kind how often it runs in a step and the bytes that a device sends."""
    return {
        kind: (
            sum(each.times for each in found if each.kind == kind),
            sum(each.moved for each in found if each.kind == kind),
        )
        for kind in KINDS
        if any(each.kind == kind for each in found)
    }
