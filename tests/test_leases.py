"""Every block is handed out until it is done, and only a guilty one is set aside."""

import itertools
import random
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg.leases import PUT_ON_HOLD_AFTER, UNKNOWN_PACE_S, WIDEST_STEP, Lease, LeaseBook

flags = st.lists(st.booleans(), max_size=80).map(lambda bits: np.array(bits, np.bool_))


def book_of(n_blocks, n_workers, **options):
    return LeaseBook(np.ones(n_blocks, np.bool_), n_workers, **options)


class Pool:
    """Pretended workers with two leases in flight: some blocks kill theirs, others raise.

    Everything raises in workers that are `broken`; one that the book finds out is given up.
    """

    def __init__(self, book, workers, *, kills=(), fails=(), broken=(), death_rate=0.0, seed=0):
        self.book = book
        self.broken, self.replaced = broken, []
        self.tried_by = defaultdict(list)
        self.kills, self.fails, self.death_rate = kills, fails, death_rate
        self.rng = random.Random(seed)
        self.flying = {worker: [] for worker in workers}
        self.done, self.aside = [], []
        self.charges = Counter()

    def run(self, *, most_steps=20_000):
        """Go on until no block waits or flies."""
        for _ in range(most_steps):
            # Workers ask in any order.
            for worker in self.rng.sample(list(self.flying), len(self.flying)):
                self.feed(worker)
            busy = [worker for worker, leases in self.flying.items() if leases]
            if not busy:
                assert self.book.is_empty()
                return
            self.step(self.rng.choice(busy))
        raise AssertionError("the pool never came to an end")

    def feed(self, worker):
        leases = self.flying[worker]
        while len(leases) < 2 and not any(lease.alone for lease in leases):
            lease = self.book.next(worker, idle=not leases)
            if lease is None:
                return
            assert lease.blocks
            leases.append(lease)

    def step(self, worker):
        leases = self.flying[worker]
        # The second lease is read while the first is computed: either can kill.
        within_reach = leases[: self.rng.choice([1, 2])]
        guilty = any(b in self.kills for lease in within_reach for b in lease.blocks)
        if guilty or self.rng.random() < self.death_rate:
            self.die(worker)
        else:
            self.finish(worker)

    def die(self, worker):
        leases, self.flying[worker] = self.flying[worker], []
        in_flight = [block for lease in leases for block in lease.blocks]
        if len(in_flight) == 1:
            self.charges[in_flight[0]] += 1
        self.aside += self.book.died(leases)

    def finish(self, worker):
        lease = self.flying[worker].pop(0)
        for block in lease.blocks:
            if block not in self.fails and worker not in self.broken:
                self.done.append(block)
                self.book.succeeded(block, worker)
                continue
            self.charges[block] += 1
            self.tried_by[block].append(worker)
            if self.book.failed(block, worker):
                self.aside.append(block)
        for number in self.book.broken():
            self.replaced.append(number)
            self.book.returned(self.flying[number])
            self.flying[number] = []
            self.book.retire(number)
        self.book.done(len(lease.blocks), self.rng.choice([0.01, 0.5, 4.0]) * len(lease.blocks))


@settings(max_examples=100, deadline=None)
@given(flags, st.integers(1, 5), st.integers(0, 10))
def test_every_pending_block_is_leased_exactly_once_when_nothing_fails(pending, n_workers, seed):
    # One worker more than there are parts: it lives on what it steals.
    pool = Pool(LeaseBook(pending, n_workers), range(n_workers + 1), seed=seed)
    pool.run()
    assert sorted(pool.done) == np.flatnonzero(pending).tolist()
    assert pool.aside == []


@settings(max_examples=150, deadline=None)
@given(
    flags,
    st.integers(1, 4),
    st.sets(st.integers(0, 79), max_size=4),
    st.sets(st.integers(0, 79), max_size=4),
    st.integers(0, 1000),
)
def test_exactly_the_guilty_blocks_are_set_aside(pending, n_workers, kills, fails, seed):
    book = LeaseBook(pending, n_workers)
    pool = Pool(book, range(n_workers), kills=kills, fails=fails - kills, seed=seed)
    pool.run()
    waiting = set(np.flatnonzero(pending).tolist())
    guilty = (kills | fails) & waiting
    assert sorted(pool.aside) == sorted(guilty)
    assert sorted(pool.done) == sorted(waiting - guilty)


@settings(max_examples=150, deadline=None)
@given(
    flags,
    st.integers(1, 4),
    st.sets(st.integers(0, 79), max_size=3),
    st.floats(0, 0.5),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_whatever_dies_each_block_ends_done_or_with_all_its_tries_charged(
    pending, n_workers, kills, death_rate, max_tries, seed
):
    book = LeaseBook(pending, n_workers, max_tries=max_tries)
    pool = Pool(book, range(n_workers), kills=kills, death_rate=death_rate, seed=seed)
    pool.run()
    assert sorted(pool.done + pool.aside) == np.flatnonzero(pending).tolist()
    assert all(pool.charges[block] == max_tries for block in pool.aside)
    assert all(pool.charges[block] < max_tries for block in pool.done)


@settings(max_examples=60, deadline=None)
@given(flags, st.integers(2, 5), st.integers(0, 10), st.integers(0, 100))
def test_the_others_do_the_part_of_a_worker_that_is_gone_for_good(pending, n_workers, n_asks, seed):
    book = LeaseBook(pending, n_workers)
    flying = [book.next(0, idle=True) for _ in range(n_asks)]
    assert book.died([lease for lease in flying[-2:] if lease is not None]) == []
    finished = {b for lease in flying[:-2] if lease is not None for b in lease.blocks}
    pool = Pool(book, range(1, n_workers), seed=seed)
    pool.run()
    assert sorted([*pool.done, *finished]) == np.flatnonzero(pending).tolist()


@settings(max_examples=100, deadline=None)
@given(flags, st.integers(1, 5), st.randoms(use_true_random=False))
def test_each_worker_works_in_order_through_an_equal_part_of_its_own(pending, n_workers, rng):
    waiting = np.flatnonzero(pending).tolist()
    cuts = [k * len(waiting) // n_workers for k in range(n_workers + 1)]
    parts = [waiting[a:b] for a, b in itertools.pairwise(cuts)]
    book = LeaseBook(pending, n_workers)
    got = [[] for _ in parts]
    while unfinished := [w for w, part in enumerate(parts) if len(got[w]) < len(part)]:
        worker = rng.choice(unfinished)
        got[worker] += book.next(worker, idle=rng.random() < 0.5).blocks
        book.done(1, rng.choice([0.01, 1.0, 5.0]))
    assert got == parts
    assert book.is_empty()


@settings(max_examples=100, deadline=None)
@given(flags, st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_worker_without_a_part_steals_the_later_half_of_the_largest(pending, n_workers, rng):
    waiting = np.flatnonzero(pending).tolist()
    cuts = [k * len(waiting) // n_workers for k in range(n_workers + 1)]
    parts = [waiting[a:b] for a, b in itertools.pairwise(cuts)]
    book = LeaseBook(pending, n_workers)
    while any(parts):
        worker = rng.randrange(n_workers)
        if not parts[worker]:
            largest = max(parts, key=len)
            half = len(largest) // 2
            parts[worker] = largest[half:]
            del largest[half:]
        lease = book.next(worker, idle=True)
        n = len(lease.blocks)
        assert list(lease.blocks) == parts[worker][:n]
        del parts[worker][:n]
        book.done(1, rng.choice([0.01, 1.0, 5.0]))
    assert all(book.next(worker, idle=True) is None for worker in range(n_workers))
    assert book.is_empty()


def test_a_worker_at_work_leaves_what_is_of_others_to_them():
    book = book_of(4, 2)
    assert book.next(0, idle=True) == Lease((0,))
    assert book.next(0, idle=False) == Lease((1,))
    assert book.next(0, idle=False) is None
    assert book.next(1, idle=True) == Lease((2,))
    assert book.next(0, idle=True) == Lease((3,))


def test_leases_grow_with_the_pace_and_shrink_at_the_end():
    book = book_of(1000, 2)
    assert book.next(0, idle=True) == Lease((0,))
    book.done(1, 0.1)
    assert book.next(0, idle=True) == Lease(tuple(range(1, 101)))
    sizes = []
    while (lease := book.next(1, idle=True)) is not None:
        sizes.append(len(lease.blocks))
    assert sizes[0] == 100
    # Never more than a quarter of a worker's share of what waits: workers finish together.
    assert all(n <= max(1, sum(sizes[i:]) // 8) for i, n in enumerate(sizes))
    assert sizes[-1] == 1


def test_no_lease_is_longer_than_the_longest():
    book = book_of(100_000, 1, longest=256)
    book.done(1, 0.0)
    assert len(book.next(0, idle=True).blocks) == 256


def test_a_suspect_goes_to_an_idle_worker_alone():
    book = book_of(8, 1)
    assert book.died([Lease((5, 6))]) == []
    assert book.next(0, idle=False) == Lease((0,))
    assert book.next(0, idle=True) == Lease((5,), alone=True)


def test_all_that_a_dead_worker_had_in_flight_is_suspect():
    book = book_of(0, 1, max_tries=1)
    assert book.died([Lease((3,)), Lease((4,))]) == []
    assert not book.is_empty()
    assert book.next(0, idle=False) is None
    tried = [book.next(0, idle=True) for _ in range(2)]
    assert tried == [Lease((3,), alone=True), Lease((4,), alone=True)]
    assert book.is_empty()
    # Alone, it is the only one that can have done it.
    assert book.died([tried[0]]) == [3]
    assert book.is_empty()


def test_a_worker_that_dies_with_nothing_in_flight_blames_no_block():
    book = book_of(0, 1, max_tries=1)
    assert book.died([]) == []
    assert book.is_empty()


@pytest.mark.parametrize("gap", [1, 63, 64, WIDEST_STEP - 1, WIDEST_STEP, 3 * WIDEST_STEP + 7])
def test_blocks_that_are_done_are_passed_over_however_many_they_are(gap):
    pending = np.zeros(4 * gap + 3, np.bool_)
    wanted = [gap, gap + 1, 2 * gap + 1, len(pending) - 1]
    pending[wanted] = True
    pool = Pool(LeaseBook(pending, 2), [0, 1])
    pool.run()
    assert sorted(pool.done) == sorted(set(wanted))


def test_a_book_of_many_blocks_needs_little_memory():
    pending = np.ones(8_000_000, np.bool_)
    tracemalloc.start()
    try:
        book = LeaseBook(pending, 7)
        book.done(1, 0.0)
        for worker in itertools.islice(itertools.cycle(range(9)), 500):
            book.next(worker, idle=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@settings(max_examples=150, deadline=None)
@given(
    flags,
    st.integers(2, 5),
    st.sets(st.integers(0, 79), max_size=4),
    st.integers(0, 1000),
)
def test_a_broken_worker_costs_no_block(pending, n_workers, fails, seed):
    book = LeaseBook(pending, n_workers)
    pool = Pool(book, range(n_workers), fails=fails, broken={1}, seed=seed)
    pool.run()
    waiting = set(np.flatnonzero(pending).tolist())
    guilty = fails & waiting
    assert sorted(pool.aside) == sorted(guilty)
    assert sorted(pool.done) == sorted(waiting - guilty)
    assert set(pool.replaced) <= {1}


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(0, 1000))
def test_a_worker_at_which_everything_fails_is_found_out_early(n_workers, seed):
    pool = Pool(book_of(200, n_workers), range(n_workers), broken={0}, seed=seed)
    pool.run()
    assert sorted(pool.done) == list(range(200))
    assert pool.replaced == [0]
    # What it had in flight when it was put on hold, and little more.
    assert sum(pool.charges.values()) <= PUT_ON_HOLD_AFTER + 2 * 25


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.sets(st.integers(0, 79), max_size=9), st.integers(0, 1000))
def test_a_block_that_fails_is_tried_with_different_workers(n_workers, fails, seed):
    pool = Pool(book_of(80, n_workers), range(n_workers), fails=fails, seed=seed)
    pool.run()
    for block in fails:
        tried = pool.tried_by[block]
        assert len(tried) == 3
        assert len(set(tried)) == min(3, n_workers)


def test_when_everything_fails_with_everyone_it_comes_to_an_end():
    pool = Pool(book_of(60, 3), range(3), fails=set(range(60)))
    pool.run()
    assert sorted(pool.aside) == list(range(60))
    assert pool.replaced == []


def test_bad_input_says_nothing_of_the_worker():
    book = book_of(40, 2)
    for _ in range(10):
        (block,) = book.next(0, idle=True).blocks[:1]
        assert not book.failed(block, 0, is_input=True)
    assert book.next(0, idle=True) is not None
    assert book.broken() == set()


def test_a_worker_that_fails_again_and_again_waits_for_what_the_others_say():
    book = book_of(40, 2)
    failed = [book.next(0, idle=True).blocks[0] for _ in range(3)]
    for block in failed:
        assert not book.failed(block, 0)
    assert book.next(0, idle=True) is None
    assert book.next(1, idle=True) == Lease((failed[0],))
    book.succeeded(failed[0], 1)
    assert book.broken() == {0}
    assert book.broken() == set()
    # Started again, it begins afresh.
    assert book.next(0, idle=True) is not None


def test_where_others_fail_too_it_is_the_block():
    book = book_of(40, 2)
    failed = [book.next(0, idle=True).blocks[0] for _ in range(3)]
    for block in failed:
        book.failed(block, 0)
    assert book.next(1, idle=True).blocks == (failed[0],)
    assert not book.failed(failed[0], 1)
    assert book.next(0, idle=True) is not None
    assert book.broken() == set()


def test_nobody_waits_for_a_worker_that_is_retired():
    book = book_of(40, 2)
    book.retire(1)
    failed = [book.next(0, idle=True).blocks[0] for _ in range(5)]
    assert not any(book.failed(block, 0) for block in failed)
    assert book.next(0, idle=True) is not None
    assert book.next(1, idle=True) is None


def test_what_a_replaced_worker_had_in_flight_is_nobodys_fault():
    book = book_of(0, 1, max_tries=1)
    book.returned([Lease((3, 4)), Lease((5,))])
    assert not book.is_empty()
    seen = [book.next(0, idle=True).blocks for _ in range(3)]
    assert sorted(b for blocks in seen for b in blocks) == [3, 4, 5]


def test_deaths_on_a_node_that_is_lost_do_not_count():
    lost = set()
    book = LeaseBook(np.zeros(0, np.bool_), 1, is_lost=lost.__contains__)
    assert book.died([Lease((7,))], node="a") == []
    assert book.died([Lease((7,))], node="b") == []
    lost.update("ab")
    assert book.died([Lease((7,))], node="c") == []
    assert book.died([Lease((7,))], node="c") == []
    assert book.died([Lease((7,))], node="c") == [7]


def test_the_deadline_is_learned_from_the_slowest():
    book = book_of(100, 2, shortest_deadline_s=20.0)
    lease = Lease(tuple(range(8)))
    assert book.deadline_s(lease) == UNKNOWN_PACE_S
    book.done(4, 0.4)
    assert book.deadline_s(lease) == 20.0
    book.done(2, 6.0)
    book.done(4, 0.4)
    assert book.deadline_s(lease) == pytest.approx(10 * 3.0 * 8)
