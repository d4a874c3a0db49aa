import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg import progress
from bigseg.errors import UsageError
from bigseg.progress import RECENT_COUNTS, RECENT_S, NullProgress, make_progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(stream: io.StringIO, clock: Clock):
    return make_progress(stream, kind="plain", clock=clock)


def test_a_plain_loop_writes_a_first_line_one_every_ten_seconds_and_a_last_one():
    stream, clock = io.StringIO(), Clock()
    with plain(stream, clock).task("segment", total=100, unit="blocks") as task:
        for _ in range(100):
            clock.now += 0.25
            task.advance(voxels=1_000_000)
    assert stream.getvalue().splitlines() == [
        "segment  0/100 blocks  0 %",
        "segment  40/100 blocks  40 %  4.00 Mvox/s  left 0:00:15",
        "segment  80/100 blocks  80 %  4.00 Mvox/s  left 0:00:05",
        "segment  100/100 blocks  100 %  4.00 Mvox/s  in 0:00:25",
    ]


def test_the_line_reads_as_the_documentation_shows_it():
    stream, clock = io.StringIO(), Clock()
    with plain(stream, clock).task("segment", total=1331, unit="blocks") as task:
        clock.now = 112.067  # 412 blocks at a pace that leaves 4:10 for 919 more
        task.advance(412, voxels=2_062_000_000, note="busy 97 %")
    line = stream.getvalue().splitlines()[1]
    assert line == "segment  412/1331 blocks  31 %  18.4 Mvox/s  busy 97 %  left 0:04:10"
    assert f"    {line}\n" in (progress.__doc__ or "")


def test_a_live_line_has_the_pace_of_the_recent_past_and_the_last_one_that_of_the_whole():
    stream, clock = io.StringIO(), Clock()
    with plain(stream, clock).task("segment", total=800, unit="blocks") as task:
        for pace in (2.0, 8.0):
            for _ in range(round(60 * pace)):
                clock.now += 1 / pace
                task.advance(voxels=1_000_000)
    lines = stream.getvalue().splitlines()
    assert lines[6] == "segment  120/800 blocks  15 %  2.00 Mvox/s  left 0:05:40"
    assert lines[-2] == "segment  600/800 blocks  75 %  8.00 Mvox/s  left 0:00:25"
    assert lines[-1] == "segment  600/800 blocks  75 %  5.00 Mvox/s  in 0:02:00"


def test_the_recent_past_of_rare_steps_holds_many_of_them():
    stream, clock = io.StringIO(), Clock()
    with plain(stream, clock).task("segment", total=200, unit="blocks") as task:
        for n in range(100):
            # Three at a time, then a long pause: the pace is 72 an hour, later 36.
            clock.now += (145.0 if n < 40 else 295.0) if n % 3 == 0 else 2.5
            task.advance()
    rates = [line.split("  ")[3] for line in stream.getvalue().splitlines()[1:-1]]
    n_h = [float(rate.removesuffix(" blocks/h")) for rate in rates]
    assert all(60 < rate < 80 for rate in n_h[5:14])
    assert all(30 < rate < 40 for rate in n_h[-8:])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0.5, 3.0, 40.0]), st.randoms(use_true_random=False))
def test_the_recent_pace_is_counted_from_a_moment_neither_too_near_nor_too_far(longest_s, rng):
    steps = [(rng.uniform(0, longest_s), rng.randrange(9)) for _ in range(rng.randrange(1, 200))]
    clock = Clock()
    meter = progress._Meter("segment", 10_000, "blocks", 0, clock)
    history = [(0.0, 0)]
    for pause, n in steps:
        clock.now += pause
        meter.add(n, 0, "")
        history.append((clock.now, history[-1][1] + n))
    since = meter.recent[0]
    assert (since.time_s, since.n_units) in history
    assert len(meter.recent) <= max(RECENT_COUNTS, RECENT_S + 2)
    if since.time_s > 0:
        assert clock.now - since.time_s >= RECENT_S
    if len(meter.recent) > RECENT_COUNTS:
        assert clock.now - meter.recent[1].time_s < RECENT_S


def test_the_latest_note_is_shown_until_the_next_one_comes():
    stream, clock = io.StringIO(), Clock()
    with plain(stream, clock).task("segment", total=4, unit="blocks") as task:
        for note in ("busy 97 %", "", "busy 50 %  reading 48 %", ""):
            clock.now += 10.0
            task.advance(note=note)
    assert stream.getvalue().splitlines() == [
        "segment  0/4 blocks  0 %",
        "segment  1/4 blocks  25 %  0.10 blocks/s  busy 97 %  left 0:00:30",
        "segment  2/4 blocks  50 %  0.10 blocks/s  busy 97 %  left 0:00:20",
        "segment  3/4 blocks  75 %  0.10 blocks/s  busy 50 %  reading 48 %  left 0:00:10",
        "segment  4/4 blocks  100 %  0.10 blocks/s  busy 50 %  reading 48 %  left 0:00:00",
        "segment  4/4 blocks  100 %  0.10 blocks/s  busy 50 %  reading 48 %  in 0:00:40",
    ]


def test_a_note_can_come_before_anything_is_done():
    stream, clock = io.StringIO(), Clock()
    with plain(stream, clock).task("segment", total=4, unit="blocks") as task:
        clock.now = 10.0
        task.advance(0, note="waits for workers")
    assert stream.getvalue().splitlines() == [
        "segment  0/4 blocks  0 %",
        "segment  0/4 blocks  0 %  waits for workers",
        "segment  0/4 blocks  0 %  waits for workers  in 0:00:10",
    ]


def test_a_bar_shows_notes_as_they_are_written():
    terminal = Terminal()
    with make_progress(terminal, kind="rich").task("a", total=1, unit="blocks") as task:
        task.advance(note="busy [red]97[/red] %")
    assert "busy [red]97[/red] %" in terminal.getvalue()


def test_what_was_done_before_counts_as_done_but_not_in_the_rate():
    stream, clock = io.StringIO(), Clock()
    with plain(stream, clock).task("train", total=100, unit="steps", done=50) as task:
        clock.now = 10.0
        task.advance(10)
    assert stream.getvalue().splitlines() == [
        "train  50/100 steps  50 %",
        "train  60/100 steps  60 %  1.00 steps/s  left 0:00:40",
        "train  60/100 steps  60 %  1.00 steps/s  in 0:00:10",
    ]


def test_a_loop_that_fails_says_where_it_stopped_and_lets_the_error_pass():
    stream, clock = io.StringIO(), Clock()

    def interrupted() -> None:
        with plain(stream, clock).task("segment", total=4, unit="blocks") as task:
            task.advance()
            clock.now = 3661.0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().splitlines()[-1] == (
        "segment  1/4 blocks  25 %  1.0 blocks/h  stopped after 1:01:01"
    )


@pytest.mark.parametrize(
    ("n", "seconds", "shown"),
    [
        (1, 4.0, "0.25 steps/s"),
        (1, 40.0, "90.0 steps/h"),
        (999, 1.0, "999 steps/s"),
        (1000, 1.0, "1.00 ksteps/s"),
        (123_456, 1.0, "123 ksteps/s"),
        (7_200_000_000, 1.0, "7.20 Gsteps/s"),
    ],
)
def test_rates_have_three_digits_and_a_prefix(n: int, seconds: float, shown: str):
    stream, clock = io.StringIO(), Clock()
    with plain(stream, clock).task("train", total=n, unit="steps") as task:
        clock.now = seconds
        task.advance(n)
    assert shown in stream.getvalue().splitlines()[-1].split("  ")


def test_a_hundred_percent_is_shown_only_when_all_is_done():
    stream, clock = io.StringIO(), Clock()
    with plain(stream, clock).task("train", total=10_000, unit="steps") as task:
        clock.now = 10.0
        task.advance(9_999)
    assert "9999/10000 steps  99 %" in stream.getvalue()


def test_a_loop_over_nothing_is_finished():
    stream = io.StringIO()
    with plain(stream, Clock()).task("segment", total=0, unit="blocks"):
        pass
    assert stream.getvalue().splitlines()[-1] == "segment  0/0 blocks  100 %  in 0:00:00"


def test_auto_is_plain_where_nobody_watches_and_a_bar_on_a_terminal():
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        with (
            make_progress(stream) as display,
            display.task("segment", total=2, unit="blocks") as task,
        ):
            task.advance(2, voxels=4_000_000)
    assert pipe.getvalue().startswith("segment  0/2 blocks  0 %\n")
    assert "\x1b" not in pipe.getvalue()
    assert "2/2 blocks" in terminal.getvalue()
    assert "100 %" in terminal.getvalue()
    assert "vox/s" in terminal.getvalue()


def test_bars_can_lie_within_bars_and_after_each_other():
    terminal = Terminal()
    display = make_progress(terminal, kind="rich")
    with display.task("outer", total=1, unit="stages"):
        for label in ("predict", "grow"):
            with display.task(label, total=0, unit="blocks"):
                pass
    with display.task("after", total=1, unit="blocks", done=1):
        pass
    for label in ("outer", "predict", "grow", "after"):
        assert label in terminal.getvalue()


def test_a_bar_is_closed_when_its_loop_fails():
    terminal = Terminal()
    display = make_progress(terminal, kind="rich")
    with pytest.raises(ValueError, match="planted"), display.task("a", total=2, unit="blocks"):
        raise ValueError("planted")
    assert "stopped after" in terminal.getvalue()


def test_none_says_nothing():
    stream = Terminal()
    for display in (make_progress(stream, kind="none"), NullProgress()):
        with display.task("segment", total=2, unit="blocks", done=1) as task:
            task.advance(voxels=3)
    assert stream.getvalue() == ""


def test_an_unknown_kind_is_refused_naming_the_known_ones():
    with pytest.raises(UsageError, match="progress 'fancy' is not known: choose auto, rich, plain"):
        make_progress(io.StringIO(), kind="fancy")  # type: ignore[arg-type]
