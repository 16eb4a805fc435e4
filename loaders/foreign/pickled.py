"""How much a pickle makes, told from its operations before anything of it is made."""

from __future__ import annotations

import pickletools

# limits of a file's pickle: operations, lists and tables, and the values of any of them, each counted
# as often as it is referred to: enough for thousands of quantizers, little enough to be read and shown
MOST_OPERATIONS, MOST_HOLDERS, MOST_VALUES = 5 * 10**6, 10**6, 3 * 10**6
DEEPEST = 200
_MARK = None
_HOLDERS = ("LIST", "DICT", "SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


class _Value:
    """size: values in it, itself included; depth: of holders in it."""

    __slots__ = ("depth", "size")

    def __init__(self) -> None:
        self.size, self.depth = 1, 0

    def take(self, inner: list[_Value]) -> None:
        self.size += sum(one.size for one in inner)
        self.depth = max(self.depth, 1 + max((one.depth for one in inner), default=0))


def why_not(data: bytes) -> str | None:
    """Why the pickle should not be opened, or None. A list that holds itself is not seen; of what is no
    pickle nothing is said, opening it does.

    torch's reader hashes keys, and whoever shows a value goes through it: a tuple of one tuple ten times,
    and so on, keeps both busy for years, and one that is nested a million deep ends the process.
    """
    stack: list[_Value | None] = []
    memo: dict[int, _Value] = {}
    holders = 0
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            name = operation.name
            if count > MOST_OPERATIONS:
                return f"more than {MOST_OPERATIONS} operations"
            if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument)])
            elif name == "DUP":
                stack.append(stack[-1])
            elif name == "MARK":
                stack.append(_MARK)
            else:
                holders += name.endswith(_HOLDERS)
                made = _run(operation, stack)
                if holders > MOST_HOLDERS:
                    return f"more than {MOST_HOLDERS} lists and tables"
                if made is not None and made.size > MOST_VALUES:
                    return f"more than {MOST_VALUES} values, many of them the same one"
                if made is not None and made.depth > DEEPEST:
                    return f"values nested more than {DEEPEST} deep"
    except (ValueError, LookupError, AttributeError, TypeError):
        return None
    return None


def _run(operation: pickletools.OpcodeInfo, stack: list[_Value | None]) -> _Value | None:
    """Takes off the stack what the operation takes; what it makes or changes."""
    before, after = operation.stack_before, operation.stack_after
    taken: list[_Value] = []
    plain = len(before)
    if pickletools.markobject in before:
        plain = before.index(pickletools.markobject)
        while (one := stack.pop()) is not _MARK:
            taken.append(one)
    for _ in range(plain):
        taken.append(stack.pop())
    if not after:
        return None
    # what is filled keeps its identity: lists and tables are known by number before they are filled
    made = taken.pop() if operation.name in _FILLING else _Value()
    made.take(taken)
    stack.append(made)
    return made


_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
