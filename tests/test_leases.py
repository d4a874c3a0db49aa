"""Every block is handed out until it is done, and only a guilty one is set aside."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg.leases import Lease, LeaseBook


def run(n_blocks, n_workers, *, kills=(), fails=(), seed=0):
    """A pool of pretended workers: blocks in `kills` kill theirs, those in `fails` raise."""
    rng = random.Random(seed)
    book = LeaseBook.of(range(n_blocks), n_blocks, n_workers=n_workers)
    flying = {worker: [] for worker in range(n_workers)}
    done, aside = [], []
    for _ in range(100 * n_blocks + 100):
        for leases in flying.values():
            while len(leases) < 2 and not (leases and leases[0].alone):
                lease = book.next(idle=not leases)
                if lease is None:
                    break
                leases.append(lease)
        busy = [w for w, leases in flying.items() if leases]
        if not busy:
            return done, aside
        worker = rng.choice(busy)
        lease = flying[worker][0]
        if any(b in kills for b in lease.blocks):
            aside += book.died(lease, flying[worker][1:])
            flying[worker] = []
            continue
        flying[worker].pop(0)
        for block in lease.blocks:
            if block not in fails:
                done.append(block)
            elif book.failed(block):
                aside.append(block)
        book.done(len(lease.blocks), 0.01 * len(lease.blocks))
    raise AssertionError("the pool never came to an end")


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 60),
    st.integers(1, 4),
    st.sets(st.integers(0, 59), max_size=4),
    st.sets(st.integers(0, 59), max_size=4),
    st.integers(0, 10),
)
def test_exactly_the_guilty_blocks_are_set_aside(n_blocks, n_workers, kills, fails, seed):
    done, aside = run(n_blocks, n_workers, kills=kills, fails=fails - kills, seed=seed)
    guilty = {b for b in kills | fails if b < n_blocks}
    assert sorted(aside) == sorted(guilty)
    assert set(done) == set(range(n_blocks)) - guilty
    assert len(done) == len(set(done))


def test_leases_grow_with_the_pace_and_shrink_at_the_end():
    book = LeaseBook.of(range(1000), 1000, n_workers=2)
    assert book.next(idle=True) == Lease((0,))
    book.done(1, 0.1)
    assert len(book.next(idle=True).blocks) == 100
    book.done(980, 98.0)
    assert len(book.next(idle=True).blocks) == 2


def test_a_suspect_goes_to_an_idle_worker_alone():
    book = LeaseBook.of(range(2), 2, n_workers=1)
    assert book.died(Lease((5, 6)), []) == []
    assert book.next(idle=False) == Lease((0,))
    assert book.next(idle=True) == Lease((5,), alone=True)
