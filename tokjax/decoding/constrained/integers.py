"""Regular expressions of ranges of integers, written in decimal digits without leading zeros."""


def integer_range(low: int | None, high: int | None) -> str | None:
    """Returns the expression of the integers from `low` to `high`, None if there is none.

    >>> integer_range(8, 21)
    '(?:[8-9]|(?:1[0-9]|2[0-1]))'
    """
    if low is not None and high is not None and low > high:
        return None
    parts = []
    if low is None or low < 0:
        # The mirror image: -high .. -low, of what is below zero.
        least = 1 if high is None else max(1, -high)
        parts += [f"-{part}" for part in _positive(least, None if low is None else -low)]
    if high is None or high >= 0:
        start = 0 if low is None else max(0, low)
        parts += ["0"] if start == 0 else []
        parts += _positive(max(1, start), high)
    return f"(?:{'|'.join(parts)})"


def _positive(low: int, high: int | None) -> list[str]:
    """Returns the expressions of the integers from `low`, at least 1, to `high`."""
    parts = []
    digits = len(str(low))
    while high is None or low <= high:
        last = 10**digits - 1
        if high is None and low == 10 ** (digits - 1):
            return [*parts, f"[1-9][0-9]{{{digits - 1},}}"]
        end = last if high is None else min(last, high)
        parts.append(_same_length(str(low), str(end)))
        low, digits = last + 1, digits + 1
    return parts


def _same_length(low: str, high: str) -> str:
    if not low:
        return ""
    rest = len(low) - 1
    from_start, to_end = set(low[1:]) <= {"0"}, set(high[1:]) <= {"9"}
    if from_start and to_end:
        return _digit(int(low[0]), int(high[0])) + (
            f"[0-9]{{{rest}}}" if rest > 1 else "[0-9]" * rest
        )
    if low[0] == high[0]:
        return low[0] + _same_length(low[1:], high[1:])
    first, last = int(low[0]), int(high[0])
    parts = []
    if not from_start:
        parts.append(low[0] + _same_length(low[1:], "9" * rest))
        first += 1
    middle = last if to_end else last - 1
    if first <= middle:
        parts.append(_same_length(str(first) + "0" * rest, str(middle) + "9" * rest))
    if not to_end:
        parts.append(high[0] + _same_length("0" * rest, high[1:]))
    return f"(?:{'|'.join(parts)})" if len(parts) > 1 else parts[0]


def _digit(first: int, last: int) -> str:
    return str(first) if first == last else f"[{first}-{last}]"
