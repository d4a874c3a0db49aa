import io

import pytest

from bigseg.errors import UsageError
from bigseg.progress import NullProgress, make_progress


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
        task.advance(412, voxels=2_062_000_000)
    line = stream.getvalue().splitlines()[1]
    assert line == "segment  412/1331 blocks  31 %  18.4 Mvox/s  left 0:04:10"


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
            make_progress(stream) as progress,
            progress.task("segment", total=2, unit="blocks") as task,
        ):
            task.advance(2, voxels=4_000_000)
    assert pipe.getvalue().startswith("segment  0/2 blocks  0 %\n")
    assert "\x1b" not in pipe.getvalue()
    assert "2/2 blocks" in terminal.getvalue()
    assert "100 %" in terminal.getvalue()
    assert "vox/s" in terminal.getvalue()


def test_bars_can_lie_within_bars_and_after_each_other():
    terminal = Terminal()
    progress = make_progress(terminal, kind="rich")
    with progress.task("outer", total=1, unit="stages"):
        for label in ("predict", "grow"):
            with progress.task(label, total=0, unit="blocks"):
                pass
    with progress.task("after", total=1, unit="blocks", done=1):
        pass
    for label in ("outer", "predict", "grow", "after"):
        assert label in terminal.getvalue()


def test_a_bar_is_closed_when_its_loop_fails():
    terminal = Terminal()
    progress = make_progress(terminal, kind="rich")
    with pytest.raises(ValueError, match="planted"), progress.task("a", total=2, unit="blocks"):
        raise ValueError("planted")
    assert "stopped after" in terminal.getvalue()


def test_none_says_nothing():
    stream = Terminal()
    for progress in (make_progress(stream, kind="none"), NullProgress()):
        with progress.task("segment", total=2, unit="blocks", done=1) as task:
            task.advance(voxels=3)
    assert stream.getvalue() == ""


def test_an_unknown_kind_is_refused_naming_the_known_ones():
    with pytest.raises(UsageError, match="progress 'fancy' is not known: choose auto, rich, plain"):
        make_progress(io.StringIO(), kind="fancy")  # type: ignore[arg-type]
