"""The batches of an epoch: which targets of which users each worker reads in which step.

A pass over the targets has each of them once: a user with more than fit a visit is visited several times, with random
parts of nearly equal size. What a part has is drawn by a hash of seed, epoch, pass, user and target, the order of all
visits by a generator of seed, epoch and pass: any number of workers sees the same global batches, and a training that
goes on in the middle of an epoch sees those that it had not seen. Every worker deals out the targets of all users: a
step has to know what the others read. It deals many users at once.

Legend: U users, V visits, T targets, W workers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from training.data import Batch, Chosen, Joined, Spans, consecutive, distinct_of, items_read, make_batch, marked


class UserBatches:
    """Batches of one worker: its part of global batches that do not depend on how many workers share them.

    Args:
        users_per_step: visits of users in a global batch, of all workers together.
        seed: of the order of visits, and of the parts of a user's targets.

    Attributes:
        make: returns the batch of users and of the targets of each.
    """

    def __init__(self, joined: Joined, rank: int, world: int, users_per_step: int, seed: int) -> None:
        self.joined = joined
        self.rank, self.world, self.users_per_step, self.seed = rank, world, users_per_step, seed
        self.make: Callable[[np.ndarray, list[np.ndarray]], Batch] = functools.partial(make_batch, joined)

    def by_user(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the users that have any of sorted target positions, and where those of each begin, [U + 1]."""
        owner = np.searchsorted(self.joined.sequences.target_start, targets, side="right") - 1
        users, first = np.unique(owner, return_index=True)
        return users, np.append(first, len(targets))

    def epoch(
        self, targets: np.ndarray, epoch: int, targets_per_visit: int, min_steps: int = 1, max_steps: int | None = None
    ) -> Epoch:
        """Return the batches of an epoch: passes over the targets until there are `min_steps`; of those `max_steps`."""
        return Epoch(self, targets, epoch, targets_per_visit, min_steps, max_steps)

    def most_of(self, targets: np.ndarray) -> int:
        """Return how many batches `all_of` yields to the worker that gets most, which is the first one."""
        users, at_once = -(-len(self.by_user(targets)[0]) // self.world), -(-self.users_per_step // self.world)
        return -(-users // at_once)

    def all_of(self, targets: np.ndarray) -> Iterator[Batch]:
        """Yield batches that hold every target of this worker's share of the users once, in (user, target) order."""
        users, start = self.by_user(targets)
        mine = np.arange(len(users))[self.rank :: self.world]
        at_once = -(-self.users_per_step // self.world)
        for begin in range(0, len(mine), at_once):
            part = mine[begin : begin + at_once]
            yield self.make(users[part], [targets[start[i] : start[i + 1]] for i in part])


@dataclass(frozen=True)
class _Pass:
    """One pass over the targets, as far as it is known.

    Attributes:
        turn: its number; key: what its draws hang on. order: int64 [V], the visits as they come.
        is_dealt: bool [U], of which users the others are known.
        targets: int64 [T], positions, one visit after another.
        sizes: int64 [V, 2], targets and events.
    """

    turn: int
    key: np.uint64
    order: np.ndarray
    is_dealt: np.ndarray
    targets: np.ndarray
    sizes: np.ndarray


class Epoch:
    """This worker's batches of one epoch, by their number; None where the global batch has no visit for this worker.

    Args:
        targets: sorted positions in the flat target arrays.
    """

    def __init__(
        self,
        batches: UserBatches,
        targets: np.ndarray,
        number: int,
        targets_per_visit: int,
        min_steps: int,
        max_steps: int | None,
    ) -> None:
        self.batches, self.targets = batches, targets
        self.users, self.start = batches.by_user(targets)
        self.key = [batches.seed, number]
        counts = np.diff(self.start)
        self.visits = -(-counts // targets_per_visit)  # of each user
        self.first_visit = np.concatenate([[0], self.visits.cumsum()])
        self.user_of = np.arange(len(self.users)).repeat(self.visits)
        shortest, longer = np.divmod(counts, np.maximum(self.visits, 1))
        self.counts = shortest[self.user_of] + (
            consecutive(0, self.visits) < longer[self.user_of]
        )  # targets of each visit
        self.begin = self.counts.cumsum() - self.counts
        self.steps_per_pass = -(-len(self.user_of) // batches.users_per_step)
        steps = max(1, -(-min_steps // max(1, self.steps_per_pass))) * self.steps_per_pass
        self.steps = steps if max_steps is None else min(steps, max_steps)
        self.most = int(counts.max(initial=0))
        self._pass: _Pass | None = None  # the last one that was asked for

    def of(self, number: int) -> Epoch:
        """Return the batches of another epoch over the same targets."""
        other = copy.copy(self)
        other.key, other._pass = [self.batches.seed, number], None
        return other

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> Batch | None:
        users, targets = self.visited(number)
        return self.batches.make(users, targets) if len(users) else None

    def visited(self, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the users of this worker's part of a global batch, and the target positions of each visit."""
        return self._visited(number, self.batches.rank, self.batches.world)

    def shares(self, number: int) -> np.ndarray:
        """Return the targets and the events of every worker's part of a global batch, int64 [W, 2]."""
        now, visits = self._visits(number)
        world = self.batches.world
        sizes = np.concatenate([now.sizes[visits], np.zeros((-len(visits) % world, 2), np.int64)])
        return sizes.reshape(-1, world, 2).sum(0)

    def items(self, number: int) -> np.ndarray:
        """Return the distinct items of the whole global batch, in the partition's order, int64 [N]."""
        joined = self.batches.joined
        chosen = Chosen.of(joined.sequences, *self._visited(number, 0, 1))
        read = items_read(joined.sequences, chosen.events(), chosen.target)
        is_read = marked(read, joined.items.count)
        return distinct_of(read) if is_read is None else np.flatnonzero(is_read)

    def _visited(self, number: int, rank: int, world: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the users of a worker's part of a global batch, and the target positions of each visit."""
        now, visits = self._visits(number)
        mine = visits[rank::world]
        begins, ends = self.begin[mine], self.begin[mine] + self.counts[mine]
        parts = [now.targets[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        return self.users[self.user_of[mine]], parts

    def _visits(self, number: int) -> tuple[_Pass, np.ndarray]:
        """Return the pass of a global batch, with its users dealt, and its visits."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        turn, place = divmod(number, self.steps_per_pass)
        now = self._of(turn)
        visits = now.order[place * self.batches.users_per_step :][: self.batches.users_per_step]
        self._deal(now, self.user_of[visits])
        return now, visits

    def _of(self, turn: int) -> _Pass:
        now = self._pass  # another thread may ask for another pass
        if now is None or now.turn != turn:
            order = np.random.default_rng([*self.key, turn]).permutation(len(self.user_of))
            known = np.zeros(len(self.users), bool), np.empty_like(self.targets), np.empty((len(order), 2), np.int64)
            [key] = np.random.SeedSequence([*self.key, turn]).generate_state(1, np.uint64)
            now = self._pass = _Pass(turn, key, order, *known)
        return now

    def _deal(self, now: _Pass, users: np.ndarray) -> None:
        """Deal out the targets of those of some users whose targets are not: once, not for every visit."""
        users = np.unique(users[~now.is_dealt[users]])
        if not len(users):
            return
        count_U, visits_U = self.start[users + 1] - self.start[users], self.visits[users]
        key_U = hashed(self.batches.joined.sequences.user_id[self.users[users]].astype(np.uint64) ^ now.key)
        taken_T = dealt(count_U, visits_U, key_U, self.most) + self.start[users].repeat(count_U)
        place_T, visit_V = consecutive(self.start[users], count_U), consecutive(self.first_visit[users], visits_U)
        target_T = now.targets[place_T] = self.targets[taken_T]
        spans = Spans.of(self.batches.joined.sequences, target_T, self.counts[visit_V])
        now.sizes[visit_V] = np.stack([spans.count, spans.end - spans.first], axis=1)
        now.is_dealt[users] = True


def dealt(count_U: np.ndarray, parts_U: np.ndarray, key_U: np.ndarray, most: int) -> np.ndarray:
    """Deal the targets of each user out to parts at random, one after another; the first parts have one more.

    Args:
        count_U, parts_U: targets and parts of each user; key_U: uint64, what the draws of each hang on.
        most: targets that any user has, of these or others, so that the draws do not hang on who is dealt with.

    Returns:
        int64 [T], one user and one part after another: the target's number among its user's, in order within a part.
    """
    bits = max(1, most.bit_length())
    # A number is its draw and itself in one: a sort of such, small ones a user, takes a tenth of one of places.
    kind: type[np.unsignedinteger] = np.uint32 if bits <= 16 else np.uint64
    rank_T = consecutive(0, count_U).astype(kind)
    drawn_T = hashed(key_U.repeat(count_U) + rank_T) >> np.uint64(64 - 8 * kind(0).itemsize)
    number_T = _sorted_each(drawn_T.astype(kind) >> kind(bits), rank_T, count_U, bits)
    return _sorted_each(rank_T % parts_U.astype(kind).repeat(count_U), number_T, count_U, bits).astype(np.int64)


def hashed(value: np.ndarray) -> np.ndarray:
    """Return a hash of whole numbers, uint64 each (the finalizer of SplitMix64, Steele et al., 2014)."""
    value = (value + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _sorted_each(by_T: np.ndarray, number_T: np.ndarray, count_U: np.ndarray, bits: int) -> np.ndarray:
    """Return numbers of so many bits, sorted for each user by others and then by themselves."""
    kind, begin = by_T.dtype.type, 0
    both_T = (by_T << kind(bits)) | number_T
    for end in count_U.cumsum().tolist():
        both_T[begin:end].sort()
        begin = end
    return both_T & kind((1 << bits) - 1)
