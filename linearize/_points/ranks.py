"""Those who run a point together: ranks, where f communicates.

Each rank has a linearization of its own, and a product of one is a product of all: the
collectives in it match only if every rank runs the same product. So before each product the
ranks exchange a few numbers: what is about to be called, and whether something failed. A rank that
fails in the middle of a product takes part in the collectives that are left, so that nobody waits
for it, and says so afterwards.
"""

from __future__ import annotations

import contextlib
import json
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from .._capture.collectives import Collective, calls_so_far, group_of_context
from .._capture.contexts import ContextRecords, is_identity
from .._forms.plan import Plan
from .._torch.graphs import forward_class
from .._torch.modes import outside_transforms
from .._torch.ranks import (
    collective_kind,
    device_of,
    fail_if_told,
    group_of,
    members,
    store,
    timeout_of,
)
from ..errors import DistributedError, LinearizeError
from .failures import post, posted, went_well

T = TypeVar("T")


#: How many points were made of each group, by its name, so that all ranks count alike.
_POINTS: Counter[str] = Counter()
#: In a run of f ranks wait for those who are still in it until these give up.
_PATIENCE = 2


class Ranks:
    """The ranks that run the products of a point.

    Parameters
    ----------
    groups
        The process groups over which f communicates.
    """

    def __init__(self, groups: Iterable[Any]) -> None:
        self._groups = _largest(groups)
        for group in self._groups:
            _POINTS[group.group_name] += 1
        self._points = [_POINTS[group.group_name] for group in self._groups]
        self._lock = threading.RLock()
        #: The thread in which a product is running.
        self._thread = 0
        #: How many exchanges there were.
        self._count = 0
        #: A failure that the others have not been told of.
        self._owed: Exception | None = None
        #: What was raised on all of them last.
        self._told: BaseException | None = None
        #: What products are a part of.
        self._within = ""

    @property
    def inside(self) -> bool:
        """Whether this thread is inside of a product."""
        return self._thread == threading.get_ident()

    # -- exchanges ----------------------------------------------------------------------------

    def agree(
        self, what: str, failure: BaseException | None = None, *, closing: bool = False
    ) -> bool:
        """Tell each other what is done next, the same on all ranks, and what failed on this one.

        Return whether a rank wants another exchange at the end (`closing`). If a rank has failed,
        or does something else, that is a `DistributedError` on all; if all have failed, each
        raises its own.
        """
        self._count += 1
        what = self._within + what
        failed, differs = int(failure is not None), 0
        numbers = [failed, -failed, int(closing)]
        for group, point in zip(self._groups, self._points, strict=True):
            code = zlib.crc32(f"{what} {point}".encode())
            numbers = [code, -code, differs, *numbers]
            most, least, differs, *numbers = _summed(what, numbers, dist.ReduceOp.MAX, group)
            differs |= most != -least
        some, none, close = numbers
        if some or differs:
            self._explain(self.named(what), failure, everywhere=none == -1)
        return bool(close)

    def _explain(self, what: str, failure: BaseException | None, *, everywhere: bool) -> None:
        """Raise on all ranks what happened on some."""
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        known = {dist.get_rank(): (what, text)}
        for group in self._groups:
            for other in gathered(what, known, group):
                known |= other
        alike = everywhere and failure is not None
        self._told = failure if alike else parted(what, known)
        assert self._told is not None
        if alike:
            raise self._told
        raise self._told from failure

    @property
    def seed(self) -> int:
        """Of random numbers: another one on each rank."""
        return 4 + dist.get_rank()

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Return sums over all ranks.

        Where there are several groups, each rank counts as often as any other, as long as they
        are the rows and columns of a grid.
        """
        for group in self._groups:
            numbers = _summed("a sum over the ranks", numbers, dist.ReduceOp.SUM, group)
        return list(numbers)

    def gather(self, what: str, failure: BaseException | None) -> None:
        """Wait until f has run on all ranks, and see that it went alike.

        By the store, as a rank may still be in one of f's collectives. If f has failed on a rank,
        or did something else there, that is a `DistributedError` on all; if it has failed on all,
        each raises its own.
        """
        text = None if failure is None else f"{type(failure).__name__}: {failure}"
        known: dict[int, tuple[str, str | None]] = {dist.get_rank(): (what, text)}
        everywhere = True
        with reaching("a run of f", failure):
            for group, point in zip(self._groups, self._points, strict=True):
                place = f"linearize/{group.group_name}/{point}"
                known, all_failed = _met(place, group, known)
                everywhere &= all_failed
        if everywhere and failure is not None:
            raise failure
        if any(why for _, why in known.values()) or len({w for w, _ in known.values()}) > 1:
            raise parted("a run of f", known) from failure

    def most(self, number: float) -> float:
        """Return the largest of a number over all ranks."""
        numbers: list[float] = [number]
        for group in self._groups:
            numbers = _summed("a comparison of the ranks", numbers, dist.ReduceOp.MAX, group)
        return numbers[0]

    # -- products -----------------------------------------------------------------------------

    def some(self, what: str, test: Callable[[], bool]) -> bool:
        """Return whether something holds on a rank; if the test fails on one, so on all."""
        failure: Exception | None = None
        holds = False
        try:
            holds = test()
        except Exception as error:
            failure = error
        return self.agree(what, failure, closing=holds)

    def whole(self, what: str, prepare: Callable[[], T], work: Callable[[T], None]) -> None:
        """Do what takes several products, when all ranks are about to do the same.

        `prepare` does what may fail without any communication, `work` the rest with what it
        returns. Products in it are told apart from others by its name, `what`.
        """
        with self._lock:
            ready: list[T] = []
            self.some(what, lambda: bool(ready.append(prepare())))  # type: ignore[func-returns-value]
            outside, self._within = self._within, f"{what}: "
            failure: Exception | None = None
            try:
                work(ready[0])
            except Exception as error:
                if error is self._told:
                    raise
                failure = error
            finally:
                self._within = outside
            self.agree(f"the end of {what}", failure)

    def led(self, what: str, work: Callable[[], T]) -> T:
        """Do what leads to a product; if it fails before that, the others are told."""
        with self._lock:
            if self.inside:
                return work()
            before = self._count
            try:
                return work()
            except Exception as error:
                if self._count == before:
                    self.agree(what, error)
                raise

    def run(
        self,
        what: str,
        prepare: Callable[[], Plan],
        work: Callable[[], T],
        sizes: Sequence[int | None] = (None,),
    ) -> T:
        """Run a product when all ranks are about to run the same.

        `prepare` does what may fail without any communication, and returns what `work` runs.
        `sizes` tell how many vectors are taken at once in each pass, if it is not a single one.
        """
        with self._lock:
            failure: BaseException | None
            failure, self._owed = self._owed, None
            plan: Plan | None = None
            if failure is None:
                try:
                    fail_if_told()
                    plan = prepare()
                except Exception as error:
                    failure = error
            # What has settled, and calls no user code, has nothing left that could fail.
            risky = plan is not None and not (plan.quiet and _only_collectives(plan))
            closing = self.agree(what, failure, closing=risky)
            assert plan is not None
            return self._run(what, plan, work, sizes, closing=closing)

    def _run(
        self,
        what: str,
        plan: Plan,
        work: Callable[[], T],
        sizes: Sequence[int | None],
        *,
        closing: bool,
    ) -> T:
        before, self._thread = calls_so_far(), threading.get_ident()
        failure: BaseException | None = None
        result: T | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
            _answer(plan, sizes, calls_so_far() - before)
        finally:
            self._thread = 0
        if closing:
            self.agree(f"the end of {what}", failure)
        elif isinstance(failure, Exception):
            self._owed = failure
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def named(self, what: str) -> str:
        """Return a name that tells points apart."""
        return f"{what} of point {'/'.join(map(str, self._points))}"


def _largest(groups: Iterable[Any]) -> list[Any]:
    """Return groups, without those that lie within others, in the order in which f comes to them.

    In that order nobody waits for somebody who waits for him: else f itself would not have ended.
    Of a grid all rows come first, say, and then all columns, so that word gets everywhere.
    """
    by_members = {members(g): g for g in groups}
    return [
        g
        for ranks, g in by_members.items()
        if not any(set(ranks) < set(others) for others in by_members)
    ]


def group_of_records(records: ContextRecords) -> Any:
    """Return the group whose ranks have parts of one vector, None if f does not communicate."""
    groups = _largest([*map(group_of_context, records.communicating()), *records.meshes])
    if len(groups) > 1:
        return group_of(None)
    return groups[0] if groups else None


def _only_collectives(plan: Plan) -> bool:
    return all(isinstance(op, Collective) for op in plan.binding.ops)


def _answer(plan: Plan, sizes: Sequence[int | None], done: int) -> None:
    """Take part in the collectives that are left of a product that failed here."""
    ops = [op for op in plan.binding.ops if isinstance(op, Collective)]
    left = [(op, size) for size in sizes for op in ops][done:]
    try:
        with outside_transforms():
            for op, size in left:
                op.answered(size)
    except RuntimeError:  # nobody can be reached; the exchange has the words for it
        return


def _summed(what: str, numbers: Sequence[Any], operation: Any, group: Any) -> list[Any]:
    """Return numbers summed, or the like, over the ranks of a group."""
    with outside_transforms(), torch.no_grad():
        exact = torch.int64 if isinstance(numbers[0], int) else torch.float64
        values = torch.tensor(numbers, dtype=exact, device=device_of(group))
        with reaching(what):
            dist.all_reduce(values, operation, group=group)
        return list(values.tolist())


def gathered(what: str, item: Any, group: Any) -> list[Any]:
    """Return an object of each rank of a group."""
    items: list[Any] = [None] * dist.get_world_size(group)
    with reaching(what):
        dist.all_gather_object(items, item, group=group)
    return items


def parted(what: str, known: Mapping[int, tuple[str, str | None]]) -> DistributedError:
    """Return what to raise of what ranks were about to do, and of why they could not."""
    reasons = {rank: why for rank, (_, why) in sorted(known.items()) if why is not None}
    if reasons:
        told = "; ".join(f"rank {rank}: {why}" for rank, why in reasons.items())
        return DistributedError(f"{what} failed on {len(reasons)} of the ranks: {told}")
    told = "; ".join(f"rank {rank}: {other}" for rank, (other, _) in sorted(known.items()))
    return DistributedError(
        "the ranks do different things at one time; every rank must ask for the same "
        f"products, and run the same collectives in f, in the same order ({told})"
    )


@contextlib.contextmanager
def reaching(what: str, failure: BaseException | None = None) -> Iterator[None]:
    """Raise `DistributedError` where a rank does not answer, from this rank's own failure."""
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            f"{what}: a rank cannot be reached; it may have died, or raised an error elsewhere "
            f"({error}){posted()}"
        ) from (failure or error)


Told: TypeAlias = dict[int, tuple[str, str | None]]


def _met(place: str, group: Any, known: Told) -> tuple[Told, bool]:
    """Meet the other ranks of a group at a place in the store.

    Returns what is known and, if that is not the same for all, what the others know; and whether
    all have failed.
    """
    kept, ranks, me = store(), members(group), dist.get_rank()
    what, why = known[me]
    alike = len({w for w, _ in known.values()}) == 1 and all(y is None for _, y in known.values())
    code = zlib.crc32(what.encode()) if alike else 0
    kept.set(f"{place}/{me}", json.dumps(list(known.items())))
    codes = kept.add(f"{place}/codes", code)
    failed = kept.add(f"{place}/failed", int(why is not None))
    if kept.add(f"{place}/came", 1) == len(ranks):
        codes, failed = kept.add(f"{place}/codes", 0), kept.add(f"{place}/failed", 0)
        fine = codes == len(ranks) * code and alike
        kept.set(
            f"{place}/all", "fine" if fine else "failed" if failed == len(ranks) else "parted"
        )
    kept.wait([f"{place}/all"], _PATIENCE * timeout_of(group))
    verdict = kept.get(f"{place}/all")
    if verdict != b"fine":
        for rank in ranks:
            found = json.loads(kept.get(f"{place}/{rank}"))
            known |= {int(r): (w, y) for r, (w, y) in found}
    return known, verdict == b"failed"


# -- runs of f --------------------------------------------------------------------------------


def run_of_f(
    records: ContextRecords, work: Callable[[], T], *, held: bool
) -> tuple[T, Ranks | None]:
    """Run f, and see that it ran on all ranks that it communicates with.

    Return its result, and the ranks if there are such and they are to be `held` against each
    other. If it fails on one, or runs other collectives on another, that is an error on all.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    # Those through which no gradient goes here may be waited for elsewhere.
    seen = [ctx for ctx in records.collectives if not is_identity(ctx)]
    if not (seen or records.meshes) or not held:
        if failure is not None:
            post(failure)
            raise failure
        return result, None  # type: ignore[return-value]
    if isinstance(failure, RuntimeError) and not isinstance(failure, LinearizeError):
        others = posted()  # of those who failed before they came to a collective
        if others:
            raise DistributedError(f"f failed ({failure}){others}") from failure
    ranks = Ranks([*map(group_of_context, seen), *records.meshes])
    shared = records.communicating()
    names = ", ".join(collective_kind(forward_class(ctx)).strip("_") for ctx in shared)
    ranks.gather(f"{len(shared)} collectives that depend on the primals: {names}", failure)
    went_well()
    return result, ranks if records.communicates() else None  # type: ignore[return-value]
